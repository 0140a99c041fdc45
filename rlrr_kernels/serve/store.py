"""``AdapterStore``: a folder of adapter folders, and a bank that holds what is in it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rlrr_kernels.adapt.folder.files import TENSORS
from rlrr_kernels.bank import AdapterBank, BankedAdapter, HeldAdapter, UnknownAdapterError
from rlrr_kernels.bank.source import PEFT_CONFIG
from rlrr_kernels.serve.images import check_resized
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.task import Task
from rlrr_kernels.writing import check_present

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


class MisfitError(ValueError):
    """What lies in an adapter's folder now cannot be served, and what was there before was evicted."""


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
        self._checked: dict[str, Mapping[str, Any]] = {}  # name → metadata of what was checked last
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
                    _check_text("its folder's name", name)
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
                except (ValueError, OSError, ImportError) as error:
                    failed[_printable(name)] = _printable(str(error))
                except Exception as error:  # PEFT's readers raise almost anything: TypeError, RecursionError, ...
                    failed[_printable(name)] = _printable(f"it cannot be read: {error!r}")
            removed = [name for name in self.bank.names if name not in found]
            for name in removed:
                self.bank.remove(name)
                del self._seen[name]
                self._checked.pop(name, None)
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
        _check_text("a name of its classes", "".join(names))

    def _check_again(self, info: BankedAdapter) -> None:
        """As :meth:`_check`, once for each time that the adapter was read: every reading makes metadata of its own."""
        if self._checked.get(info.name) is not info.metadata:
            self._check(info)
            self._checked[info.name] = info.metadata

    def hold(self, name: str) -> HeldAdapter:
        """An adapter as :meth:`rlrr_kernels.AdapterBank.hold` gives it, checked: it may just have been read again.

        Raises:
            MisfitError: it was replaced in its folder by one that :meth:`rescan` would not take.
            UnknownAdapterError, FileNotFoundError, ValueError: as for the bank's.
        """
        held = self.bank.hold(name)
        try:
            self._check_again(held.info)
        except ValueError as error:
            raise MisfitError(f"the adapter {name!r} was replaced by one that cannot be served: {error}") from error
        return held

    def entries(self) -> dict[str, tuple[str, ...]]:
        """Name → classes of the adapters that can be asked for."""
        found = {}
        for name in self.bank.names:
            with contextlib.suppress(UnknownAdapterError, ValueError):  # removed since, or replaced as in :meth:`hold`
                self._check_again(info := self.bank.info(name))
                found[name] = classes_of(info)
        return found

    def preprocessing_of(self, info: BankedAdapter) -> Preprocessing:
        """How images become inputs of an adapter."""
        if "task" not in info.metadata:
            return self.preprocessing
        return Task.of_metadata(info.metadata, info.folder or info.name).preprocessing

    def input_of(self, info: BankedAdapter, image: Image.Image, max_pixels: float) -> Tensor:
        """``image`` as [3, image_size, image_size] for an adapter.

        Raises:
            TooManyPixelsError: on the way there it would have more than ``max_pixels``.
        """
        preprocessing = self.preprocessing_of(info)
        check_resized(image, preprocessing, max_pixels)
        return _transform(preprocessing)(image)


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

    Raises:
        FileNotFoundError: there is no such folder.
    """
    check_present(root, "the folder of adapters", folder=True)
    found = {path.name: _adapter_in(path) for path in sorted(root.iterdir()) if not path.name.startswith(".")}
    return {name: folder for name, folder in found.items() if folder is not None}


def _adapter_in(path: Path) -> Path | None:
    """The adapter folder that ``path`` is or holds; where that cannot be looked at ``path``, whose reader says why."""
    try:
        folders = (path, path / "adapter")
        return next((f for f in folders if any(_is_file(f / name) for name in (TENSORS, PEFT_CONFIG))), None)
    except OSError:
        return path


def _is_file(path: Path) -> bool:
    """As ``Path.is_file``, which from Python 3.14 on does not tell what cannot be looked at from what is not there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def first_task(root: Path) -> Task | None:
    """The task of the first adapter in ``root`` that says which it is."""
    for folder in find_adapters(root).values():
        try:
            return Task.of_adapter(folder)
        except Exception:  # as above: whoever reads it again says why
            continue
    return None


def _stamp(folder: Path) -> _Stamp:
    state = os.stat(folder / (TENSORS if _is_file(folder / TENSORS) else PEFT_TENSORS))
    return folder, state.st_ino, state.st_size, state.st_mtime_ns


def _check_text(what: str, text: str) -> None:
    """Raises ``ValueError`` where ``text``, a name in a folder or a document, cannot be sent."""
    if _printable(text) != text:
        raise ValueError(f"{what} is no Unicode text: {_printable(text)}")


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@functools.lru_cache(maxsize=64)
def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Any]:
    return preprocessing.transform()
