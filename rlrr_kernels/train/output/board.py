"""TensorBoard logs of a run, continued where a stopped one goes on."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Raises ``ImportError`` with the command that installs it, unless tensorboard is there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "TensorBoard logs need the package tensorboard, which is not installed: "
            "pip install 'rlrr-kernels[tensorboard]'"
        )


class Board:
    """Scalars over the training steps in ``folder/tensorboard``; a disk that cannot take them ends the logs only."""

    def __init__(self, folder: Path, steps: int, warn: Callable[[str], None]) -> None:
        """``steps``: done before; what a stopped run has logged beyond them is discarded. ``warn``: of that end.

        Raises:
            ImportError: tensorboard is not installed.
        """
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._warn, self._writer = folder, warn, None
        with self._or_end():
            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=steps + 1 if steps else None)

    def log(self, scalars: Mapping[str, float], steps: int) -> None:
        """Adds a point to each curve."""
        with self._or_end():
            for name, value in scalars.items() if self._writer else ():
                self._writer.add_scalar(name, value, steps)

    def flush(self) -> None:
        """Puts what was logged on the disk."""
        with self._or_end():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Ends the logs."""
        with self._or_end():
            if self._writer:
                self._writer.close()

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._warn(f"the TensorBoard logs in {self._folder} end here: {error}")
