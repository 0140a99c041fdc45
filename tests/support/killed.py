"""Processes that are killed in their midst."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from rlrr_kernels.train.loop import checkpoint


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns as soon as ``reached()``, or the process has ended by itself, or after five minutes."""
    deadline = time.monotonic() + 300
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def run_and_kill(command: Sequence[str], reached: Callable[[], bool], stdout: int | IO = subprocess.DEVNULL) -> None:
    """Starts ``command`` and kills it (-9) as soon as ``reached()``; it must not have ended by itself before."""
    process = subprocess.Popen(command, stdout=stdout, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(reached, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def epochs_of(run: Path) -> int:
    """Of a run's checkpoint; 0 without one."""
    return checkpoint.load_checkpoint(run)["epoch"] if (run / checkpoint.NAME).exists() else 0
