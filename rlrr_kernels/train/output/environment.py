"""What a run ran on: versions, commit, devices, command line."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlrr_kernels.backends import backend_report
from rlrr_kernels.train.config.files import read_json
from rlrr_kernels.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = (
    *("triton", "timm", "safetensors", "accelerate", "torchvision", "torchmetrics", "numpy", "pillow"),
    *("tensorboard", "typer", "rich", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Of this library, Python, torch and :data:`PACKAGES`; ``not installed`` where one is missing."""
    found = {
        "rlrr-kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # says more than the package's version: which CUDA it was built for
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What this process runs on, as JSON types."""
    device = accelerator.device
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "backends": backend_report(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("RLRR_", "OMP_"))},
    }


def add_session(document: Path, session: dict[str, Any], *, resumed: bool) -> bytes:
    """The JSON of the environments of a run: those in ``document`` when it is resumed, and ``session``."""
    sessions = []
    if resumed and document.exists():
        try:
            sessions = read_json(document)["sessions"]
        except (KeyError, TypeError, ValueError):
            sessions = None
        if not isinstance(sessions, list):
            sessions = []  # a damaged record of earlier sessions must not stop the run
    return json.dumps({"sessions": [*sessions, session]}, indent=2).encode()


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this library runs from, with ``-dirty`` where files differ; None outside a checkout of it."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--match", ""]
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False
        )
        if inside.returncode:
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
