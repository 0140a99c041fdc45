"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Starts a new measurement; on systems other than Linux the CPU's peak is that of the process since its start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # resets the high-water mark of the resident set


def peak_memory() -> int:
    """Bytes: the GPU allocator's peak where CUDA was used since the reset, else the process's peak resident set."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
