"""The paper's datasets as they lie on the disk: VTAB-1k's lists of images, FGVC's JSON files, and their transforms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from pathlib import Path

from rlrr_kernels.paper.hyperparameters import DatasetSettings
from rlrr_kernels.train.config.files import read_json, read_text
from rlrr_kernels.train.data.folders import Samples, first_lines
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.writing import check_present

SPLITS = ("honest", "paper")
"""``honest``: the epoch is chosen on validation images and the test images are scored once. ``paper``: as the authors
did, trained on the training and validation images together, and the best epoch of the test images reported."""

_MEAN = _STD = (0.5, 0.5, 0.5)

_FGVC_CROP = 224 / 256

SOURCE = "source.json"
"""In a dataset's folder: where its images came from, if not from the published archive."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """What one split file names: ``paths[i]`` is of class ``labels[i]``; whatever is wrong with it is in ``problems``.

    ``classes`` are the names of all classes of the dataset, in label order.
    """

    file: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    problems: tuple[str, ...]


def load_splits(root: str | Path, settings: DatasetSettings, split: str = "honest") -> dict[str, Samples]:
    """The images of a dataset by split.

    Two layouts. VTAB-1k: ``root/<dataset>/{train800,val200,train800val200,test}.txt`` with a line
    ``relative/path.jpg label`` an image. FGVC: ``root/<dataset>/{train,val,trainval,test}.json``,
    ``{image path: class}``; labels follow the sorted classes, as the authors' do: numbers by size, words, also those
    made of digits, by the alphabet ("10" before "2").

    Args:
        root: holds one folder a dataset.
        settings: of the dataset, see :func:`rlrr_kernels.paper.hyperparameters.dataset_settings`.
        split: ``honest`` gives train, val and test: VTAB-1k's 800, 200 and test images, FGVC's three files. ``paper``
            gives train (those two together; FGVC's ``trainval.json``, or without one its two files) and test.

    Raises:
        ValueError: unknown ``split``; a line that cannot be read, a label outside the class range, an image that is
            not there: each with file and line.
        FileNotFoundError: the dataset's folder or a split file is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    listings = read_listings(root, settings, needed_files(root, settings, split))
    raise_problems(root, settings, listings)
    whole, first, second = training_files(settings)
    samples = {name: Samples(item.paths, item.labels, item.classes) for name, item in listings.items()}
    if split == "honest":
        return {"train": samples[first], "val": samples[second], "test": samples["test"]}
    if whole in samples:
        return {"train": samples[whole], "test": samples["test"]}
    train, val = samples[first], samples[second]
    both = Samples(train.paths + val.paths, train.labels + val.labels, train.classes)
    return {"train": both, "test": samples["test"]}


def raise_problems(root: str | Path, settings: DatasetSettings, listings: Mapping[str, Listing]) -> None:
    """Raises ``ValueError`` with what is wrong in any of ``listings``, if something is."""
    problems = [problem for listing in listings.values() for problem in listing.problems]
    if problems:
        raise ValueError(f"{settings.name} in {root} is damaged:\n{first_lines(problems)}")


def training_files(settings: DatasetSettings) -> tuple[str, str, str]:
    """The names, without ending, of the files that name all training images, those to train on, those to choose by."""
    return ("train800val200", "train800", "val200") if settings.benchmark == "vtab" else ("trainval", "train", "val")


def needed_files(root: str | Path, settings: DatasetSettings, split: str) -> tuple[str, ...]:
    """The names, without ending, of the files that hold a split."""
    whole, first, second = training_files(settings)
    if split == "paper" and (settings.benchmark == "vtab" or _split_file(root, settings, whole).is_file()):
        return (whole, "test")
    return (first, second, "test")


def _split_file(root: str | Path, settings: DatasetSettings, name: str) -> Path:
    return Path(root) / settings.name / f"{name}{'.txt' if settings.benchmark == 'vtab' else '.json'}"


def read_listings(root: str | Path, settings: DatasetSettings, names: tuple[str, ...]) -> dict[str, Listing]:
    """Reads split files of a dataset, and whether the images they name are there.

    Raises:
        FileNotFoundError: the dataset's folder or one of the files is missing.
    """
    folder = Path(root) / settings.name
    check_present(folder, "the dataset folder", folder=True)
    files = {name: _split_file(root, settings, name) for name in names}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        whole, test = (_split_file(root, settings, name) for name in (training_files(settings)[0], "test"))
        enough = whole.is_file() and test.is_file()
        hint = f"; {whole.name} alone is enough for --split paper" if enough else ""
        raise FileNotFoundError(f"the split file {' and '.join(missing)} is missing{hint}")
    if settings.benchmark == "vtab":
        return {name: _read_vtab(file, settings) for name, file in files.items()}
    return _read_fgvc(files, settings)


def split_note(root: str | Path, settings: DatasetSettings) -> str | None:
    """What to say beside every result where a dataset does not lie there in its published split; None where it does.

    Raises:
        ValueError: the file that says so cannot be read.
    """
    file = Path(root) / settings.name / SOURCE
    if not file.exists():
        return None
    document = read_json(file)
    try:
        return None if document["published_split"] else f"{document['source']}, not the published split"
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error


def preprocessing(settings: DatasetSettings, image_size: int = 224) -> Preprocessing:
    """The paper's transform, whatever the shape of an image.

    VTAB-1k's are resized straight to the square, bicubic; FGVC's, bilinear, to a square of 8/7 of it, then cropped.
    """
    crop, interpolation = (1.0, "bicubic") if settings.benchmark == "vtab" else (_FGVC_CROP, "bilinear")
    return Preprocessing(image_size, crop, interpolation, _MEAN, _STD, "squash")


def augmentation(settings: DatasetSettings) -> str:
    """Of the training images, as ``FinetuneConfig.augment``: a random crop and flip in FGVC, a flip where flagged."""
    if settings.benchmark == "fgvc":
        return "crop"
    return "flip" if settings.flip else "none"


def _read_vtab(file: Path, settings: DatasetSettings) -> Listing:
    paths: list[Path] = []
    labels: list[int] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for number, line in enumerate(read_text(file, "the split file").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, label = line.rsplit(maxsplit=1)
            label = int(label)
        except ValueError:
            problems.append(f"{file}, line {number}: expected 'relative/path label'; got {line.strip()[:80]!r}")
            continue
        if not 0 <= label < settings.classes:
            problems.append(
                f"{file}, line {number}: the label must be from 0 to {settings.classes - 1}, {settings.name} has "
                f"{settings.classes} classes; got {label}"
            )
            continue
        path = file.parent / name
        if path in seen:
            problems.append(f"{file}, line {number}: the image {name} is named twice")
            continue
        seen.add(path)
        if not path.is_file():
            problems.append(f"{file}, line {number}: the image {path} is missing")
            continue
        paths.append(path)
        labels.append(label)
    if not paths and not problems:
        problems.append(f"{file} names no image")
    return Listing(file, tuple(paths), tuple(labels), tuple(map(str, range(settings.classes))), tuple(problems))


def _read_fgvc(files: dict[str, Path], settings: DatasetSettings) -> dict[str, Listing]:
    """The class of a file is any number or word; labels follow their order, the same in all splits."""
    pairs = {name: _read_pairs(file) for name, file in files.items()}
    given = [value for entries, _ in pairs.values() for _, value in entries]
    identify = str if any(isinstance(value, str) for value in given) else int
    classes = sorted(set(map(identify, given)))
    labels = {value: label for label, value in enumerate(classes)}
    names = tuple(map(str, classes))
    listings = {}
    for name, file in files.items():
        entries, problems = pairs[name]
        if len(classes) != settings.classes and not problems:
            problems.append(
                f"{file}: the split files name {len(classes)} classes together; {settings.name} has {settings.classes}"
            )
        base = _image_base(file.parent, settings, [path for path, _ in entries])
        there = []
        for path, value in entries:
            if (base / path).is_file():
                there.append((base / path, labels[identify(value)]))
            else:
                problems.append(f"{file}, entry {path!r}: the image {base / path} is missing")
        listings[name] = Listing(
            file, tuple(path for path, _ in there), tuple(label for _, label in there), names, tuple(problems)
        )
    return listings


def _read_pairs(file: Path) -> tuple[list[tuple[str, Hashable]], list[str]]:
    """(path, class) of every entry, and what is wrong."""
    try:
        pairs = json.loads(read_text(file, "the split file"), object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        return [], [f"{file}, line {error.lineno}: {error.msg}"]
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return [], [f"{file} cannot be read: {error}"]
    if not isinstance(pairs, _Pairs) or not pairs:
        return [], [f"{file} must hold one JSON object, {{image path: class}}, with at least one entry"]
    good, problems, seen = [], [], set()
    for path, value in pairs:
        if not isinstance(value, int | str) or isinstance(value, bool):
            problems.append(f"{file}, entry {path!r}: the class must be a number or a word; got {str(value)[:80]}")
        elif path in seen:
            problems.append(f"{file}, entry {path!r}: the image is named twice")
        else:
            seen.add(path)
            good.append((path, value))
    return good, problems


class _Pairs(list):
    """A JSON object with its entries in order, twice where a key is there twice."""


def _image_base(folder: Path, settings: DatasetSettings, paths: list[str]) -> Path:
    """Where the paths start: as published, unless the first is found from the dataset's own folder."""
    if paths and not (folder / settings.image_folder / paths[0]).is_file() and (folder / paths[0]).is_file():
        return folder
    return folder / settings.image_folder
