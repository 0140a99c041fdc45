"""Whether a dataset on the disk is whole and what it should be, before hours are spent on it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

from rlrr_kernels.paper.data import Listing, read_listings, split_note, training_files
from rlrr_kernels.paper.hyperparameters import (
    BENCHMARKS,
    DatasetSettings,
    dataset_names,
    dataset_settings,
    selected_datasets,
)
from rlrr_kernels.train.data.folders import read_image
from rlrr_kernels.writing import check_present

_CHANCE = 0.1
"""Share of a split's images up to which equal pixels in another split are the dataset's own: dSprites has the same
picture under several labels, other datasets have photographs twice."""


@dataclasses.dataclass(frozen=True)
class DatasetCheck:
    """What was found.

    Attributes:
        settings: what was expected.
        counts: split file → images in it; a file that could not be read is left out.
        classes: how many of the classes have a training image.
        images: different image files, all of them decoded unless that was turned off.
        problems: what would spoil a result. warnings: what is worth knowing.
        absent: whether there is no folder of the dataset at all.
    """

    settings: DatasetSettings
    counts: dict[str, int]
    classes: int
    images: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    absent: bool = False


def datasets_to_check(root: str | Path, benchmark: str | None, names: list[str] | None) -> list[DatasetSettings]:
    """The datasets named; else all of ``benchmark``; else all of each benchmark that has a folder in ``root``.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: unknown name, or nothing to check.
    """
    root = Path(root)
    check_present(root, "the data folder", folder=True)
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

    Every file of the published archives names its own copies of the images, so files are compared by what the images
    show: by a digest of the decoded pixels, or without ``decode`` by paths and labels alone.

    Args:
        root: holds the dataset's folder.
        settings: what to expect.
        decode: also decode every image.
        track: wraps the decoding to show progress; gets the iterable and its length.
    """
    folder = Path(root) / settings.name
    if not folder.is_dir():
        return DatasetCheck(settings, {}, 0, 0, (f"the dataset folder {folder} does not exist",), (), absent=True)
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
        listings = read_listings(root, settings, files_to_check(root, settings))
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
    paths = sorted({path for listing in listings.values() for path in listing.paths})
    digests: dict[Path, str] | None = None
    if decode:
        digests, unreadable = _decode(paths, track)
        problems += unreadable
    _compare(settings, listings, digests, problems, warnings)
    seen = {label for name, listing in listings.items() if name != "test" for label in listing.labels}
    if len(seen) < settings.classes:
        tested = len(set(listings["test"].labels) - seen)
        warnings.append(
            f"{settings.name}: {settings.classes - len(seen)} of {settings.classes} classes have no training image"
            + (f", {tested} of them are tested" if tested else "")
        )
    counts = {name: len(listing.paths) for name, listing in listings.items()}
    return DatasetCheck(settings, counts, len(seen), len(paths), tuple(problems), tuple(warnings))


def files_to_check(root: str | Path, settings: DatasetSettings) -> tuple[str, ...]:
    """The split files, without ending, that a dataset has to have: of FGVC, ``trainval.json`` or the two it holds."""
    if settings.benchmark == "vtab":
        return tuple(settings.sizes)
    there = [name for name in settings.sizes if (Path(root) / settings.name / f"{name}.json").is_file()]
    whole, *parts = training_files(settings)
    if whole in there and not set(parts) & set(there):
        return (whole, "test")
    return tuple(name for name in settings.sizes if name != whole or name in there)


def _decode(paths: list[Path], track: Callable[[Iterable, int], Iterable]) -> tuple[dict[Path, str], list[str]]:
    """A digest of the pixels of every image, and what is wrong with those that cannot be read."""

    def digest(path: Path) -> tuple[str | None, str]:
        try:
            image = read_image(path)
        except ValueError as error:
            return None, str(error)
        return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest(), ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(track(pool.map(digest, paths), len(paths)))
    digests = {path: found for path, (found, _) in zip(paths, results, strict=True) if found is not None}
    return digests, [problem for _, problem in results if problem]


def _compare(
    settings: DatasetSettings,
    listings: Mapping[str, Listing],
    digests: Mapping[Path, str] | None,
    problems: list[str],
    warnings: list[str],
) -> None:
    """Adds what is wrong, or worth a note, between split files: images in two of them, files that contradict others."""
    whole, *parts = training_files(settings)
    training = [name for name in parts if name in listings] or [whole]
    twofold = whole in listings and training != [whole]
    for first, second in (*combinations([*training, "test"], 2), *([(whole, "test")] if twofold else [])):
        shared = set(listings[first].paths) & set(listings[second].paths)
        if shared:
            problems.append(
                f"{settings.name}: {len(shared)} images are in both {first} and {second}, such as {min(shared)}"
            )
        elif digests is not None and first in training:  # all of them are compared with the pixels of whole below
            _compare_pixels(settings, listings, (first, second), digests, problems, warnings)
    if twofold:
        together = [entry for name in training for entry in _entries(listings[name])]
        difference = _difference(_entries(listings[whole]), together, digests)
        if difference:
            problems.append(f"{settings.name}: {whole} is not {' and '.join(training)} together: {difference}")


def _compare_pixels(
    settings: DatasetSettings,
    listings: Mapping[str, Listing],
    names: tuple[str, str],
    digests: Mapping[Path, str],
    problems: list[str],
    warnings: list[str],
) -> None:
    """Adds the images of the first file that are in the second as other files with the same pixels."""
    first, second = ([path for path in listings[name].paths if path in digests] for name in names)
    theirs = {digests[path]: path for path in second}
    same = [path for path in first if digests[path] in theirs]
    if same:
        example = f"{same[0]} and {theirs[digests[same[0]]]}"
        few = len(same) <= _CHANCE * len(first)
        message = (
            f"{settings.name}: {len(same)} of {len(first):,} images of {names[0]} have the pixels of one of {names[1]}"
        )
        (warnings if few else problems).append(f"{message}, such as {example}")


def _entries(listing: Listing) -> list[tuple[Path, int]]:
    return list(zip(listing.paths, listing.labels, strict=True))


def _difference(
    whole: list[tuple[Path, int]], parts: list[tuple[Path, int]], digests: Mapping[Path, str] | None
) -> str | None:
    """How ``whole`` differs from ``parts``, in any order: by the files, else by their pixels and labels; None: not."""
    if Counter(whole) == Counter(parts):
        return None
    if digests is None:
        ours, theirs = (Counter(label for _, label in entries) for entries in (whole, parts))
        return None if ours == theirs else "the labels differ"
    if any(path not in digests for path, _ in (*whole, *parts)):
        return None  # told already, as images that cannot be read
    ours, theirs = (Counter((digests[path], label) for path, label in entries) for entries in (whole, parts))
    missing, strange = (theirs - ours).total(), (ours - theirs).total()
    if not missing and not strange:
        return None
    example = next(
        path for path, label in (*whole, *parts) if ours[digests[path], label] != theirs[digests[path], label]
    )
    return (
        f"{missing} of their images with these labels are not in it, {strange} of its are not theirs, such as {example}"
    )
