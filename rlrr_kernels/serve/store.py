"""``AdapterStore``: a folder of adapter folders, and a bank that holds what is in it."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rlrr_kernels.adapt.files import TENSORS
from rlrr_kernels.bank import AdapterBank, BankedAdapter
from rlrr_kernels.bank.source import PEFT_CONFIG
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.task import Task

PEFT_TENSORS = "adapter_model.safetensors"

_Stamp = tuple[Path, int, int, int]
"""A folder and its tensors' inode, size and time of change: another stamp is another version."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a look at the folder changed, by adapter name.

    Attributes:
        added, swapped, removed: names. failed: name → why it is not served, or not in its new version.
    """

    added: tuple[str, ...] = ()
    swapped: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


class AdapterStore:
    """Keeps a bank as the folder is, when told to look.

    Args:
        bank: what adapters go into.
        root: see :func:`find_adapters`.
        preprocessing: of images for adapters that do not say; all adapters' must have its ``image_size``.
    """

    def __init__(self, bank: AdapterBank, root: Path, preprocessing: Preprocessing) -> None:
        self.bank, self.root, self.preprocessing = bank, root, preprocessing
        self._seen: dict[str, _Stamp] = {}
        self._lock = threading.Lock()

    def rescan(self) -> Changes:
        """Adds, swaps and removes adapters as the folder has them now; one that does not fit leaves the rest alone.

        Raises:
            FileNotFoundError: the folder is gone; nothing is removed then.
        """
        with self._lock:
            found = find_adapters(self.root)
            added, swapped, failed = [], [], {}
            for name, folder in found.items():
                try:
                    name.encode()  # a name that is not UTF-8 is in no answer
                    stamp = _stamp(folder)
                    if self._seen.get(name) == stamp:
                        continue
                    self._check(self.bank.examine(folder))
                    known = name in self.bank
                    budget = self.bank.memory_budget
                    load = budget is None or self.bank.nbytes < budget  # else at first use, when others are evicted
                    (self.bank.swap if known else self.bank.add)(name, folder, load=load)
                    (swapped if known else added).append(name)
                    self._seen[name] = stamp
                except Exception as error:  # files that are not what they say fail in many ways
                    known = isinstance(error, ValueError | OSError | ImportError) and str(error)
                    failed[_printable(name)] = known or f"{type(error).__name__}: {error}"
            removed = [name for name in self.bank.names if name not in found]
            for name in removed:
                self.bank.remove(name)
                del self._seen[name]
            return Changes(tuple(added), tuple(swapped), tuple(removed), failed)

    def _check(self, info: BankedAdapter) -> None:
        size, names = self.preprocessing_of(info).image_size, classes_of(info)
        if size != self.preprocessing.image_size:
            raise ValueError(
                f"it was trained at {size} pixels; the server's backbone takes {self.preprocessing.image_size}"
            )
        if info.classes is None:
            raise ValueError("it has no head of its own, whose classes could be told")
        if len(names) != info.classes:
            raise ValueError(f"its head has {info.classes} outputs, and {len(names)} classes are named")

    def preprocessing_of(self, info: BankedAdapter) -> Preprocessing:
        """How images become inputs of an adapter."""
        if "task" not in info.metadata:
            return self.preprocessing
        return Task.of_metadata(info.metadata, info.folder or info.name).preprocessing

    def input_of(self, info: BankedAdapter, image: Image.Image) -> Tensor:
        """``image`` as [3, image_size, image_size] for an adapter."""
        return _transform(self.preprocessing_of(info))(image)


def classes_of(info: BankedAdapter) -> tuple[str, ...]:
    """The names of an adapter's classes, in label order; numbers where it does not say."""
    if "task" in info.metadata:
        return Task.of_metadata(info.metadata, info.folder or info.name).classes
    names = info.metadata.get("classes")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(map(str, range(info.classes or 0)))


def find_adapters(root: Path) -> dict[str, Path]:
    """Name → folder of the adapters in ``root``: its folders that are one, or a run's, which holds ``adapter/``.

    A folder that cannot be looked into is among them: who reads it is told why.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"the folder of adapters {root} does not exist")
    found = {}
    for path in sorted(root.iterdir()):
        try:
            folder = next(
                (f for f in (path, path / "adapter") if any((f / n).is_file() for n in (TENSORS, PEFT_CONFIG))), None
            )
        except OSError:
            folder = path
        if folder is not None and not path.name.startswith("."):
            found[path.name] = folder
    return found


def first_task(root: Path) -> Task | None:
    """The task of the first adapter in ``root`` that says which it is."""
    for folder in find_adapters(root).values():
        try:
            return Task.of_adapter(folder)
        except (ValueError, OSError):
            continue
    return None


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _stamp(folder: Path) -> _Stamp:
    state = os.stat(folder / (TENSORS if (folder / TENSORS).is_file() else PEFT_TENSORS))
    return folder, state.st_ino, state.st_size, state.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Any]:
    return preprocessing.transform()
