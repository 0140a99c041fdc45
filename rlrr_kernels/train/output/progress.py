"""Progress bars and the line an epoch leaves behind, by rich."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
"""Where the library and its command-line program print."""

error_console = Console(stderr=True)
"""Where the program's errors and warnings go."""


def say(text: str) -> None:
    """Prints ``text`` as it is: brackets in a path or a class name are no markup, long lines are not broken."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def program() -> str:
    """How the command-line program was started, for commands to try next."""
    if Path(sys.argv[0]).name != "rlrr":
        return "python -m rlrr_kernels.cli"
    return "rlrr" if shutil.which("rlrr") == sys.argv[0] else shlex.quote(sys.argv[0])


def command(*arguments: object) -> str:
    """A command of the program that can be pasted into a shell, whatever the arguments hold."""
    words = [f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in arguments]
    return f"{program()} {shlex.join(words)}"


def make_progress(*, enabled: bool = True) -> Progress:
    """Bars that vanish when done; nothing where output is no terminal, beyond what is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not enabled,
    )


def track(items: Iterable, total: int, description: str, *, enabled: bool = True) -> Iterable:
    """Yields from ``items`` under a bar of its own."""
    with make_progress(enabled=enabled) as progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


def time_to_go(seconds: float) -> str | None:
    """What to say of the time a training still takes; None where that is no more than a minute."""
    minutes = seconds / 60
    if minutes <= 1:
        return None
    return f"about {minutes / 60:.1f} h to go" if minutes > 90 else f"about {minutes:.0f} min to go"


class TrainProgress:
    """A bar over the epochs, one over the batches of the current one, and a printed line for each that is done."""

    def __init__(self, epochs: int, *, chosen_on: str = "validation", enabled: bool = True) -> None:
        """``chosen_on``: the images that are scored after every epoch, ``validation`` or ``test``."""
        self._use(make_progress(enabled=enabled), epochs, chosen_on, enabled)
        self._epochs = self._progress.add_task("epochs", total=epochs, note="")
        self._batches = self._progress.add_task("training", total=None, note="", visible=False)

    def _use(self, bars: Progress, epochs: int, chosen_on: str, enabled: bool) -> None:
        self.chosen_on, self.images = chosen_on, {"validation": "val"}.get(chosen_on, chosen_on)
        self._progress, self._count, self._enabled = bars, epochs, enabled

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start_epoch(self, epoch: int, batch: int, batches: int) -> None:
        """``epoch`` and ``batch`` have been done before."""
        self._progress.update(self._epochs, completed=epoch)
        self._progress.reset(
            self._batches, total=batches, completed=batch, description=f"epoch {epoch + 1}", visible=True
        )

    def advance(self, loss: float, lr: float) -> None:
        """One batch done; ``loss`` is the epoch's mean so far."""
        self._progress.update(self._batches, advance=1, note=f"loss {loss:.3f}  lr {lr:.1e}")

    def expect(self, seconds: float) -> None:
        """Prints how long the training will still take, if that is more than a minute."""
        if (text := time_to_go(seconds)) is not None:
            self.say(text)

    def validation(self, batches: Iterable) -> Iterable:
        """Yields from ``batches`` under the batch bar."""
        self._progress.reset(self._batches, total=len(batches), description=self.chosen_on, visible=True)
        for batch in batches:
            yield batch
            self._progress.update(self._batches, advance=1)

    def finish_epoch(self, entry: dict[str, float], improved: bool) -> None:
        """Prints the line of an epoch; ``entry`` as in ``FitResult.history``."""
        self._progress.update(self._epochs, completed=entry["epoch"])
        self._print(self._line(entry, improved))

    def _line(self, entry: dict[str, float], improved: bool) -> str:
        return (
            f"epoch {entry['epoch']:>{len(str(self._count))}}/{self._count}  train loss {entry['train_loss']:.3f}  "
            f"{self.images} loss {entry['val_loss']:.3f}  {self.images} accuracy {entry['val_accuracy']:.3f}  "
            f"{self.images} macro-F1 {entry['val_macro_f1']:.3f}  {entry['seconds']:.0f} s"
            + ("  best so far" if improved else "")
        )

    def warn(self, message: str) -> None:
        """Prints a warning above the bars."""
        self._print(f"[yellow]warning:[/yellow] {escape(message)}")

    def say(self, message: str) -> None:
        """Prints a line above the bars."""
        self._print(escape(message))

    def _print(self, line: str) -> None:
        if self._enabled:
            self._progress.console.print(line, highlight=False, soft_wrap=True)
