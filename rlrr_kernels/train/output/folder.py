"""Run folders, held by one process at a time, and what a command may replace."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADAPTER, CONFIG, ENVIRONMENT = "adapter", "config.json", "environment.json"
RESULT, CURVE = "result.json", "learning_curve.png"
LOCK = ".lock"

_held: set[str] = set()
"""Folders that runs of this process hold: a lock of POSIX keeps out other processes alone."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds ``folder``, which exists, for one run of this process; on Windows nothing keeps others out.

    The lock is the system's, on ``folder/.lock``: it ends with its process, however that ends, and a copy of the folder
    is not locked.

    Raises:
        ValueError: another run holds the folder; says which process, on which machine, since when.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: its file system knows no locks; the run goes on without.
    """
    key = os.path.realpath(folder)
    if key in _held:
        raise ValueError(f"{folder} is in use by another run of this process")
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            stack.enter_context(_locked(folder))
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def check_free(folder: Path) -> None:
    """Raises ``ValueError``, as :func:`hold`, where a run holds ``folder``."""
    if (folder / LOCK).exists():
        with hold(folder):
            pass


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    while True:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closing it ends the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder} is in use by {holder}; wait for it, stop it, or choose another folder with --out"
            ) from None
        except OSError as error:
            warnings.warn(f"{path} cannot be locked ({error.strerror}): start no second run in {folder}", stacklevel=4)
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the run before removed the file that was opened
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        who = f"process {os.getpid()} on {socket.gethostname()} since {now}: {shlex.join(sys.argv)}"
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            file.truncate(0)
            file.write(who.encode(errors="replace"))
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def check_target(target: Path, overwrite: bool, *, folder: bool, sources: Sequence[str | Path] = ()) -> None:
    """Whether a command may write ``target``, asked before its work; an empty folder may always be filled.

    Args:
        target: file or folder.
        overwrite: whether one that is there may be replaced.
        folder: whether ``target`` is to be a folder.
        sources: what the command reads, which it never replaces.

    Raises:
        FileExistsError: it may not.
        ValueError: it is one of ``sources``, or a pipe or device, in whose place a file would be put.
    """
    if not target.exists():
        return
    if any(os.path.exists(source) and os.path.samefile(target, source) for source in sources):
        raise ValueError(f"{target} is what is read; write to another {'folder' if folder else 'file'}")
    if not (target.is_dir() or target.is_file()):
        raise ValueError(f"{target} is a pipe or a device, which a file would replace; name a file")
    if target.is_dir() != folder:
        raise FileExistsError(f"{target} exists and is {'a file, no folder' if folder else 'a folder, no file'}")
    if not overwrite and not (folder and not any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists; replace it with --overwrite, or name another {'folder' if folder else 'file'}"
        )
