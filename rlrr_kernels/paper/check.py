"""Whether a dataset on the disk is whole and what it should be, before hours are spent on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from rlrr_kernels.paper.data import read_listings, split_note
from rlrr_kernels.paper.hyperparameters import (
    BENCHMARKS,
    DatasetSettings,
    dataset_names,
    dataset_settings,
    selected_datasets,
)
from rlrr_kernels.train.data.folders import unreadable_images


@dataclasses.dataclass(frozen=True)
class DatasetCheck:
    """What was found.

    Attributes:
        settings: what was expected.
        counts: split file → images in it; a file that could not be read is left out.
        classes: how many of the classes have a training image.
        images: different image files, all of them decoded unless that was turned off.
        problems: what would spoil a result. warnings: what is worth knowing.
    """

    settings: DatasetSettings
    counts: dict[str, int]
    classes: int
    images: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def datasets_to_check(root: str | Path, benchmark: str | None, names: list[str] | None) -> list[DatasetSettings]:
    """The datasets named; else all of ``benchmark``; else all of each benchmark that has a folder in ``root``.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: unknown name, or nothing to check.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"the data folder {root} does not exist")
    if names:
        return [dataset_settings(name, benchmark) for name in dict.fromkeys(names)]
    if benchmark is not None:
        return selected_datasets(benchmark, None)
    present = [name for name in BENCHMARKS if any((root / dataset).is_dir() for dataset in dataset_names(name))]
    if not present:
        held = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{root} holds none of the datasets' folders, such as cifar or CUB_200_2011 (rlrr data list prints all); "
            f"it holds {held}"
        )
    return [settings for name in present for settings in selected_datasets(name, None)]


def check_dataset(
    root: str | Path,
    settings: DatasetSettings,
    *,
    decode: bool = True,
    track: Callable[[Iterable, int], Iterable] = lambda results, total: results,
) -> DatasetCheck:
    """Checks one dataset: files, entries, labels, numbers of images and classes, overlaps, and that images decode.

    Args:
        root: holds the dataset's folder.
        settings: what to expect.
        decode: also decode every image.
        track: wraps the decoding to show progress; gets the iterable and its length.
    """
    problems: list[str] = []
    warnings: list[str] = []
    try:
        note = split_note(root, settings)
    except ValueError as error:
        problems.append(str(error))
        note = None
    if note:
        warnings.append(f"{settings.name}: {note}")
    try:
        listings = read_listings(root, settings, tuple(settings.sizes))
    except (OSError, ValueError) as error:
        return DatasetCheck(settings, {}, 0, 0, (*problems, str(error)), tuple(warnings))
    for listing in listings.values():
        problems += listing.problems
    for name, listing in listings.items():
        found, expected = len(listing.paths), settings.sizes[name]
        if found != expected and not listing.problems:
            lenient = name in settings.varying or note is not None
            message = f"{listing.file}: {found:,} images, {expected:,} expected"
            (warnings if lenient else problems).append(message + (" (other versions exist)" if lenient else ""))
    content = {name: dict(zip(listing.paths, listing.labels, strict=True)) for name, listing in listings.items()}
    problems += _overlaps(settings, content)
    training = [name for name in content if name != "test"]
    seen = {label for name in training for label in content[name].values()}
    if len(seen) < settings.classes:
        tested = len(set(content["test"].values()) - seen)
        warnings.append(
            f"{settings.name}: {settings.classes - len(seen)} of {settings.classes} classes have no training image"
            + (f", {tested} of them are tested" if tested else "")
        )
    paths = sorted({path for images in content.values() for path in images})
    if decode:
        problems += unreadable_images(paths, track)
    counts = {name: len(listing.paths) for name, listing in listings.items()}
    return DatasetCheck(settings, counts, len(seen), len(paths), tuple(problems), tuple(warnings))


def _overlaps(settings: DatasetSettings, content: dict[str, dict[Path, int]]) -> list[str]:
    """Images that are in two splits, and lists that contradict each other."""
    names = ("train800", "val200", "test") if settings.benchmark == "vtab" else ("train", "val", "test")
    problems = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = content[first].keys() & content[second].keys()
            if both:
                problems.append(
                    f"{settings.name}: {len(both)} images are in both {first} and {second}, such as {min(both)}"
                )
    if settings.benchmark == "vtab" and content["train800val200"] != content["train800"] | content["val200"]:
        problems.append(f"{settings.name}: train800val200 is not train800 and val200 together")
    return problems
