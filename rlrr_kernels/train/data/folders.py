"""Folders of images: finding the classes, splitting, checking, loading."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}

_SHOWN = 10
"""How many offending files a message names before it counts the rest."""


@dataclass(frozen=True)
class Samples:
    """Images of one split: ``paths[i]`` belongs to class ``classes[labels[i]]``.

    Raises:
        ValueError: there are more or fewer labels than images, or a label outside the class range (its image is named).
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise ValueError(f"every image needs one label; got {len(self.paths)} images and {len(self.labels)} labels")
        outside = [i for i, label in enumerate(self.labels) if not 0 <= label < len(self.classes)]
        if outside:
            more = f", and of {len(outside) - 1} more" if len(outside) > 1 else ""
            raise ValueError(
                f"labels must lie in 0 to {len(self.classes) - 1}, as there are {len(self.classes)} classes; "
                f"got {self.labels[outside[0]]} of {self.paths[outside[0]]}{more}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Iterable[int]) -> Samples:
        """The samples at ``indices``, in their order."""
        indices = tuple(indices)
        return Samples(tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes)


def find_samples(folder: str | Path, classes: Sequence[str] | None = None) -> Samples:
    """Reads ``folder/<class>/**/<image>``; classes in alphabetical order unless given.

    Args:
        folder: holds one folder a class.
        classes: the class names to expect, in label order; a class may then be absent from ``folder``.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: fewer than two classes, a class folder without an image, or a class not in ``classes``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the image folder {folder} does not exist")
    found = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} holds no class folders; expected {folder}/<class>/<image>")
    if classes is None:
        if len(found) == 1:
            raise ValueError(f"{folder} holds one class folder only, {found[0]!r}; a classifier needs at least two")
        classes = found
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ValueError(
            f"{folder} holds classes that the model does not have: {shorten([*map(repr, unknown)])}; it has "
            f"{shorten([*classes])}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        images = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if not images:
            raise ValueError(
                f"the class folder {folder / name} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it"
            )
        paths += images
        labels += [classes.index(name)] * len(images)
    return Samples(tuple(paths), tuple(labels), tuple(classes))


def find_splits(folder: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> dict[str, Samples]:
    """The splits of an image folder: ``train`` and ``val``, and ``test`` where there is one.

    Two layouts: ``folder/<class>/<image>``, and ``folder/{train,val,test}/<class>/<image>`` where ``val`` and ``test``
    may be missing. Without a ``val`` a share of the training images, the same in every class, is set aside for it.

    Args:
        folder: the image folder.
        val_fraction: share of the training images set aside; only used when there is no ``val``.
        seed: of that choice.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: as for :func:`find_samples`; or a class has one image only and a validation image is needed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the image folder {folder} does not exist")
    places = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in _SPLIT_NAMES.items()
    }
    train = find_samples(places["train"] or folder)
    splits = {"train": train}
    for split in ("val", "test"):
        if places["train"] and places[split]:
            splits[split] = find_samples(places[split], train.classes)
    if "val" not in splits:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1; got {val_fraction}")
        rest, chosen = stratified_split(train.labels, val_fraction, seed)
        lonely = [name for label, name in enumerate(train.classes) if train.labels.count(label) == 1]
        if lonely:
            raise ValueError(
                f"the class {', '.join(map(repr, lonely))} has one image only; without a folder {folder}/val every "
                "class needs at least two, one of them to choose the epoch by"
            )
        splits["train"], splits["val"] = train.subset(rest), train.subset(chosen)
    return splits


def stratified_split(keys: Sequence, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits ``range(len(keys))`` in two; the second part gets ``fraction`` of every key's items, at least one.

    A key with a single item keeps it in the first part. Sorted; the same on every platform.
    """
    rest: list[int] = []
    chosen: list[int] = []
    for key in sorted(set(keys)):
        members = [i for i, other in enumerate(keys) if other == key]
        random.Random(f"{seed} {key}").shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen += members[:count]
        rest += members[count:]
    return sorted(rest), sorted(chosen)


def read_image(path: str | Path) -> Image.Image:
    """Opens an image as RGB, turned as its EXIF data say; 16-bit grey keeps its upper 8 bits.

    Raises:
        ValueError: the file cannot be read as an image; the message names it and the reason.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read the image {path}: {error}") from error


def unreadable_images(
    paths: Sequence[Path],
    track: Callable[[Iterable, int], Iterable] = lambda results, total: results,
    threads: int | None = None,
) -> list[str]:
    """Decodes every image once; returns what is wrong with those that cannot be read, naming each file.

    Args:
        paths: the images.
        track: wraps the results to show progress; gets the iterable and its length.
        threads: how many are decoded at once; None: one a processor.
    """

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return [found for found in track(pool.map(problem, paths), len(paths)) if found]


def check_images(
    paths: Sequence[Path], track: Callable[[Iterable, int], Iterable] = lambda results, total: results
) -> None:
    """Decodes every image once, so that a broken one shows before the training and not hours into it.

    Args:
        paths, track: as for :func:`unreadable_images`.

    Raises:
        ValueError: some image cannot be read; names the first ten and counts the rest.
    """
    problems = unreadable_images(paths, track)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(paths)} images cannot be read; repair or remove them:\n{first_lines(problems)}"
        )


def first_lines(problems: Sequence[str]) -> str:
    """The first ten of ``problems``, a line each, and how many more there are."""
    more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "\n".join(problems[:_SHOWN]) + more


class ImageDataset(Dataset):
    """(image [3, H, W] float32, label) of ``samples``; what is random depends on seed, epoch and index alone.

    So a run that was killed and resumed, or uses another number of workers, sees the same augmented images.
    """

    def __init__(self, samples: Samples, transform: Callable[[Image.Image], Tensor], seed: int | None = None) -> None:
        """``seed`` None: the transform has nothing random in it."""
        self.samples, self.transform, self.seed, self.epoch = samples, transform, seed, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.samples.paths[index])
        if self.seed is None:
            return self.transform(image), self.samples.labels[index]
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(f"{self.seed} {self.epoch} {index}")
            torch.manual_seed(random.getrandbits(63))
            try:
                return self.transform(image), self.samples.labels[index]
            finally:
                random.setstate(before)


class EpochShuffle(Sampler[int]):
    """A new order every epoch, known from ``seed`` and ``epoch`` alone; ``skip`` leaves out the first so many."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.skip = length, seed, 0, 0

    def __len__(self) -> int:
        return self.length - self.skip

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return iter(order[self.skip :])


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    sampler: Sampler | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """A loader over ``dataset``, in order unless a ``sampler`` is given; the last batch may be short or dropped."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every pass draws from the global one, which a resumed run has restored
    )


def shorten(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first ``shown`` of ``names``, with commas, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
