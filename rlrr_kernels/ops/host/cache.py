"""The folder for what was found on this user's GPUs, and the switches in the environment."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rlrr_kernels.writing import write_together

DIRECTORY_VARIABLE = "RLRR_CACHE_DIR"


def cache_folder() -> Path:
    """``RLRR_CACHE_DIR`` or a folder in the platform's own for caches, whether or not it exists."""
    if directory := os.environ.get(DIRECTORY_VARIABLE):
        return Path(directory)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rlrr_kernels"


def switched_on(variable: str, default: str = "on") -> bool:
    """Whether an environment variable says "on".

    Raises:
        ValueError: it is neither "on" nor "off".
    """
    value = os.environ.get(variable, default).lower()
    if value not in ("on", "off"):
        raise ValueError(f"environment {variable} must be on or off; got {value!r}")
    return value == "on"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The name a GPU's entries go by; "interpreter" on the CPU, and the device's type where there is no GPU."""
    if device.type != "cuda":
        return "interpreter" if device.type == "cpu" else device.type
    return torch.cuda.get_device_name(device)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file, its folder made where there is none; readers see the old file or the new one."""
    write_together(path.parent, {path.name: (json.dumps(content, indent=1) + "\n").encode()})
