"""Checkpoints of a run: written atomically, read back only into the run that wrote them."""

from __future__ import annotations

import errno
import io
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from rlrr_kernels.train.models.weights import read_tensors
from rlrr_kernels.writing import write_together

FORMAT = 1

NAME = "checkpoint.pt"


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain data) to ``folder/checkpoint.pt``, replacing the one before in one step.

    Raises:
        OSError: it cannot be written; the one before is still there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_together(Path(folder), {NAME: buffer.getvalue()})


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Reads ``folder/checkpoint.pt``, tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this library, or one of another version.
    """
    path = Path(folder) / NAME
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint to resume from: {path} does not exist")
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version: expected format {FORMAT}")
    return state


def require_space(folder: str | Path, needed: int) -> None:
    """Raises ``OSError`` (no space left) when the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left: the run needs about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            str(folder),
        )


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the current GPU's random generators, as tensors and plain data."""
    import numpy as np

    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (augmentations draw from the global generator)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what :func:`rng_state` returned."""
    import numpy as np

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
