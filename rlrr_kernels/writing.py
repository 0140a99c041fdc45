"""Files that are written whole or not at all, what killed processes leave of them, and what must be there to read."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp")
"""What a file is called that is not complete yet."""


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
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents:
        remove_leftovers(folder, name, older_than_minutes=60)
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    staged = {name: folder / f".{name}{suffix}" for name in contents}
    try:
        for name, path in staged.items():
            with open(path, "xb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():  # nothing is written any more; the last file is the one that counts
            os.replace(path, folder / name)
        _sync_directory(folder)
    except BaseException:
        for path in staged.values():
            path.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if empty
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
