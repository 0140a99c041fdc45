"""A bar for each of several tasks that train side by side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.progress import Progress

from rlrr_kernels.train.output.progress import TrainProgress


class TaskProgress(TrainProgress):
    """One bar, over all batches of a task, among others; lines begin with the task's name.

    Attributes:
        expected: seconds that the training will still take, once that is known.
    """

    def __init__(self, bars: Progress, name: str, epochs: int, *, chosen_on: str, enabled: bool) -> None:
        """``bars``: started and stopped by whoever shares them; the rest as for :class:`TrainProgress`."""
        self._use(bars, epochs, chosen_on, enabled)
        self.name, self.expected = name, 0.0
        self._bar = bars.add_task(escape(name), total=None, note="")

    def start_epoch(self, epoch: int, batch: int, batches: int) -> None:
        self._progress.update(
            self._bar,
            total=self._count * batches,
            completed=epoch * batches + batch,
            description=f"{escape(self.name)} epoch {epoch + 1}",
        )

    def advance(self, loss: float, lr: float) -> None:
        self._progress.update(self._bar, advance=1, note=f"loss {loss:.3f}  lr {lr:.1e}")

    def expect(self, seconds: float) -> None:
        self.expected = seconds

    def validation(self, batches: Iterable) -> Iterable:
        self._progress.update(self._bar, note=self.chosen_on)
        yield from batches

    def finish_epoch(self, entry: dict[str, float], improved: bool) -> None:
        self._print(self._line(entry, improved))

    def remove(self) -> None:
        """Takes the bar away, when the task is done."""
        self._progress.remove_task(self._bar)

    def _print(self, line: str) -> None:
        super()._print(f"{escape(self.name)}: {line}")
