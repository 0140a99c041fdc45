"""Files that are written whole or not at all, what killed processes leave of them, and what must be there to read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp")
"""What a file is called that is not complete yet."""

_ABANDONED = 24 * 3600
"""Seconds since its start after which nobody is filling a folder any more."""


def check_present(path: Path, what: str, *, folder: bool) -> None:
    """Raises ``FileNotFoundError``, which calls it ``what``, unless ``path`` is a folder, or can be read as a file."""
    if not path.exists() or path.is_dir() != folder:  # a pipe is read as a file
        problem = f"is no {'folder' if folder else 'file'}" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {problem}")


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes all files beside their targets first, then replaces these in order.

    An error while writing, such as a full disk, leaves all targets as they were. A process that dies between two
    replacements leaves the earlier targets new and the later ones old. What a process that was killed while it wrote
    one of these files has left, an hour or more ago, is removed.

    Raises:
        OSError: a file cannot be written, or its folder not be made; names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents:
        remove_leftovers(folder, name, older_than_minutes=60)
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    staged = {name: folder / f".{name}{suffix}" for name in contents}
    try:
        for name, path in staged.items():
            with _named(folder / name), open(path, "xb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():  # nothing is written any more; the last file is the one that counts
            with _named(folder / name):
                os.replace(path, folder / name)
        _sync_directory(folder)
    except BaseException:
        for path in staged.values():
            path.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if empty
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Has errors name ``path``: those of a full disk name nothing, others the file beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which is called ``folder`` once that is done; of one that is not, nothing stays.

    Raises:
        OSError: it cannot be made, or the disk is full; names ``folder``.
    """
    for path in folder.parent.glob(f".{folder.name}.*.partial"):  # what killed processes have left
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= _ABANDONED:
                shutil.rmtree(path)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _named(folder):
            partial.mkdir(parents=True)
        try:
            yield partial
        except OSError as error:
            if error.filename is None and error.errno is not None:  # as Pillow's
                raise OSError(error.errno, error.strerror, str(folder)) from error
            raise
        with _named(folder):
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None, older_than_minutes: float = 0) -> None:
    """Removes the incomplete files in ``folder`` that a process killed while writing has left.

    Args:
        folder: nobody else may be writing there, unless an age says that the file is not being written any more.
        name: of the file that was to be written; None: any.
        older_than_minutes: since the last byte was written.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and name in (None, match["name"]):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= 60 * older_than_minutes:
                    path.unlink()
