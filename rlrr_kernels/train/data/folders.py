"""Folders of images: finding the classes, splitting, checking, loading."""

from __future__ import annotations

import hashlib
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlrr_kernels.train.data.images import is_large, read_image
from rlrr_kernels.writing import check_present

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

_MADE_BY_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Hidden folders without a dot: what zips of a Mac, Synology's file servers and file systems add."""

_SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout", "heldout"),
}
_SPLITS = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_ANY_WORD = "|".join(sorted(_SPLITS, key=len, reverse=True))
_FILLER = "(?:set|subset|split|data|image|img|photo|photograph|picture|pic|sample|file|folder|dir|seg|jpg|jpeg|png)s?"
# Of words with spaces between them. A single letter says nothing where it stands alone: x_train, trainA, test_v2.
_SPLIT_NAME = re.compile(rf"(?:{_FILLER} ?|\b[a-z] )*({_ANY_WORD})(?: ?{_FILLER}| [a-z]\b)*")

_BEGINNING = 4096
"""Bytes of a file that are compared before all of it."""

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
    """Reads ``folder/<class>/**/<image>``; classes in alphabetical order unless given. Hidden files and folders (those
    that begin with a dot, and what systems add, such as ``__MACOSX`` and ``@eaDir``) are skipped at any depth.

    Args:
        folder: holds one folder a class.
        classes: the class names to expect, in label order; a class may then be absent from ``folder``.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: fewer than two classes, a class folder without an image or with splits in it, or a class not in
            ``classes``; or the folders are called like splits.

    Warns:
        UserWarning: files in the class folders that are no images by their endings, or broken links, and images beside
            these folders: how many.
    """
    folder = Path(folder)
    check_present(folder, "the image folder", folder=True)
    found = _folders_in(folder)
    if not found:
        raise ValueError(f"{folder} holds no class folders; expected {folder}/<class>/<image>")
    if classes is None:
        if len(found) == 1:
            raise ValueError(f"{folder} holds one class folder only, {found[0]!r}; a classifier needs at least two")
        like_splits = _like_splits(found)
        if like_splits:
            raise ValueError(
                f"{folder} must hold a folder a class; its folders are called like splits: {shorten(like_splits)}; "
                "call splits train, val and test, with the class folders in them, and classes otherwise"
            )
        classes = found
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in found if name not in label_of]
    if unknown:
        raise ValueError(
            f"{folder} holds classes that the model does not have: {shorten([*map(repr, unknown)])}; it has "
            f"{shorten([*classes])}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    skipped = Counter({"images beside the class folders": _loose_images(folder)})
    for name in found:
        images, others = _images_in(folder / name)
        if not images:
            raise ValueError(
                f"the class folder {folder / name} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it"
            )
        paths += images
        labels += [label_of[name]] * len(images)
        skipped += others
    if +skipped:
        kinds = [f"{count:,} {kind}" for kind, count in (+skipped).most_common()]
        warnings.warn(f"{folder}: {skipped.total():,} files are not used: {shorten(kinds)}", stacklevel=2)
    return Samples(tuple(paths), tuple(labels), tuple(classes))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _MADE_BY_SYSTEMS


def _folders_in(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name))


def _loose_images(folder: Path) -> int:
    return sum(path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file() for path in folder.iterdir())


def _images_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images at any depth, sorted, and how many other files there are, by kind."""
    images, others = [], Counter()
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        splits = [name for name in folders if split_of(name)]
        if len({*map(split_of, splits)}) > 1:
            raise ValueError(
                f"{base}, in place of images of a class, holds folders that are called like splits: {shorten(splits)}; "
                f"expected {folder.parent}/{{train,val,test}}/<class>/<image>"
            )
        others["links to folders"] += sum(os.path.islink(os.path.join(base, name)) for name in folders)
        for path in (Path(base, name) for name in files if not name.startswith(".")):
            suffix = path.suffix.lower()
            if not path.is_file():
                others["broken links"] += 1
            elif suffix in SUFFIXES:
                images.append(path)
            else:
                others[suffix or "without an ending"] += 1
    return sorted(images), +others


def split_of(name: str) -> str | None:
    """The split that a folder's name says it is, ``train``, ``val`` or ``test``; None for other names.

    In any case, with words around it that say nothing, such as ``set``, ``data`` or ``images``, single letters and
    numbers: ``Training``, ``dev``, ``test_set``, ``data_train``, ``ValidationDataset``, ``val2017``, ``trainA``.
    """
    match = _SPLIT_NAME.fullmatch(" ".join(_words(name)))
    return _SPLITS[match[1]] if match else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _like_splits(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that seem to mean splits, understood or not.

    All of them where each holds the word of a split and not all the same (``flowers_train``, ``birds_test``; but kinds
    of trains are classes). Else those that differ in this word alone (``acme_train``, ``acme_test`` beside ``more``).
    """
    held = [{split for word in _words(name) if (split := split_of(word))} for name in names]
    if all(held) and (len(set().union(*held)) > 1 or all(map(split_of, names))):
        return [*names]
    alike: dict[str, list[str]] = {}
    for name in names:
        rest, count = re.subn(_ANY_WORD, "", name.lower())
        if count:
            alike.setdefault(rest, []).append(name)
    return [name for group in alike.values() if len(group) > 1 for name in group]


def split_folders(folder: str | Path) -> dict[str, Path]:
    """The folders in ``folder`` that are called like splits, by split; empty where it holds classes.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: two folders are called like the same split.
    """
    folder = Path(folder)
    check_present(folder, "the image folder", folder=True)
    places: dict[str, Path] = {}
    for name in _folders_in(folder):
        split = split_of(name)
        if split in places:
            raise ValueError(
                f"{folder} holds two folders that are called like the split {split}: "
                f"{places[split].name} and {name}; keep one"
            )
        if split is not None:
            places[split] = folder / name
    return places


def scored_folder(folder: str | Path, split: str | None = None) -> Path:
    """Which images of ``folder`` are scored: those of the folder called ``split``, or like it (:func:`split_of`);
    None: those of its test split, or all of them where there are no splits.

    Raises:
        FileNotFoundError: ``folder`` does not exist, or has no such split.
        ValueError: as for :func:`split_folders`.
    """
    folder = Path(folder)
    places = split_folders(folder)
    if split is None:
        wanted = places.get("test") if places else folder
    else:
        wanted = folder / split if (folder / split).is_dir() else places.get(split_of(split))
    if wanted is None:
        raise FileNotFoundError(
            f"{folder} holds no split {split or 'test'}; "
            + (f"there are {shorten([place.name for place in places.values()])}" if places else "there are no splits")
        )
    return wanted


def find_splits(folder: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> dict[str, Samples]:
    """The splits of an image folder: ``train`` and ``val``, and ``test`` where there is one.

    Two layouts: ``folder/<class>/<image>``, and ``folder/{train,val,test}/<class>/<image>`` where ``val`` and ``test``
    may be missing and the splits may have other common names (:func:`split_of`). Without a ``val`` a share of the
    training images, the same in every class, is set aside for it.

    Args:
        folder: the image folder.
        val_fraction: share of the training images set aside; only used when there is no ``val``.
        seed: of that choice.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: as for :func:`find_samples` and :func:`split_folders`; there are splits but none to train on; or a
            class has one image only and a validation image is needed.

    Warns:
        UserWarning: as for :func:`find_samples`; folders and images beside the splits, and classes without an image in
            a split.
    """
    folder = Path(folder)
    places = split_folders(folder)
    if places and "train" not in places:
        named = " and ".join(place.name for place in places.values())
        raise ValueError(
            f"{folder} holds {named}, which are called like splits, but none to train on, such as {folder}/train; "
            "classes must have other names"
        )
    unused = [name for name in _folders_in(folder) if places and folder / name not in places.values()]
    if unused and not _folders_in(places["train"]):
        raise ValueError(
            f"{places['train']} is called like a split, but holds no class folders; if it is a class beside "
            f"{shorten(unused)}, give it another name"
        )
    if unused:
        warnings.warn(f"{folder}: the folders beside the splits are not used: {shorten(unused)}", stacklevel=2)
    if places and (loose := _loose_images(folder)):
        warnings.warn(f"{folder}: {loose:,} images beside the splits are not used", stacklevel=2)
    train = find_samples(places.get("train", folder))
    splits = {"train": train}
    for split in ("val", "test"):
        if split in places:
            splits[split] = find_samples(places[split], train.classes)
            absent = [train.classes[label] for label in sorted({*train.labels} - {*splits[split].labels})]
            if absent:
                warnings.warn(
                    f"{places[split]} has no image of {len(absent)} of {len(train.classes)} classes: {shorten(absent)}",
                    stacklevel=2,
                )
    if "val" not in splits:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1; got {val_fraction}")
        rest, chosen = stratified_split(train.labels, val_fraction, seed)
        counts = Counter(train.labels)
        lonely = [name for label, name in enumerate(train.classes) if counts[label] == 1]
        if lonely:
            raise ValueError(
                f"the class {shorten([*map(repr, lonely)])} has one image only; without a folder {folder}/val every "
                "class needs at least two, one of them to choose the epoch by"
            )
        splits["train"], splits["val"] = train.subset(rest), train.subset(chosen)
    return splits


def stratified_split(keys: Sequence, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits ``range(len(keys))`` in two; the second part gets ``fraction`` of every key's items, at least one.

    A key with a single item keeps it in the first part. Sorted; the same on every platform.
    """
    members_of: dict = {}
    for i, key in enumerate(keys):
        members_of.setdefault(key, []).append(i)
    rest: list[int] = []
    chosen: list[int] = []
    for key, members in sorted(members_of.items()):
        random.Random(f"{seed} {key}").shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen += members[:count]
        rest += members[count:]
    return sorted(rest), sorted(chosen)


def shared_images(splits: Mapping[str, Samples]) -> list[tuple[Path, Path]]:
    """Pairs of files of two splits, equal byte for byte; for each file the first of another split before it."""
    return _equal_files({path: split for split, samples in splits.items() for path in samples.paths})


def contradicting_images(samples: Samples) -> list[tuple[Path, Path]]:
    """As :func:`shared_images`, pairs of files of two classes."""
    return _equal_files(dict(zip(samples.paths, samples.labels, strict=True)))


def _equal_files(places: Mapping[Path, Any]) -> list[tuple[Path, Path]]:
    """Pairs of equal files of two places.

    Files of one size are compared by a digest, first of their beginnings: what is read twice is little.
    """
    groups = [[*places]]
    for key in (lambda path: path.stat().st_size, lambda path: _digest(path, _BEGINNING), _digest):
        finer: dict = {}
        for number, group in enumerate(groups):
            for path in group:
                finer.setdefault((number, key(path)), []).append(path)
        groups = [group for group in finer.values() if len({places[path] for path in group}) > 1]
    pairs = []
    for group in groups:
        for i, path in enumerate(group):
            other = next((earlier for earlier in group[:i] if places[earlier] != places[path]), None)
            if other is not None:
                pairs.append((other, path))
    return pairs


def _digest(path: Path, length: int = -1) -> bytes:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(length), digest_size=16).digest()


def fingerprint(splits: Mapping[str, Samples]) -> str:
    """A digest of the images of all ``splits``: names below their common folder, sizes in bytes, labels, order."""
    paths = [path for samples in splits.values() for path in samples.paths]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    digest = hashlib.sha256()
    for split, samples in splits.items():
        digest.update(repr((split, samples.classes)).encode())
        for path, label in zip(samples.paths, samples.labels, strict=True):
            name = os.path.relpath(path, root).replace(os.sep, "/")
            digest.update(f"{name}\0{path.stat().st_size}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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

    Warns:
        UserWarning: images so large that Pillow warns of them, which does not say which.
    """

    def look(path: Path) -> tuple[str | None, bool]:
        try:
            read_image(path)
        except ValueError as error:
            return str(error), False
        return None, is_large(path)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        found = list(track(pool.map(look, paths), len(paths)))
    large = [str(path) for path, (_, is_so) in zip(paths, found, strict=True) if is_so]
    if large:
        warnings.warn(
            f"{len(large)} images have more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, which are decoded in "
            f"every epoch: {shorten(large)}",
            stacklevel=2,
        )
    return [problem for problem, _ in found if problem]


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
