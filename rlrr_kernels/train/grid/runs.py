"""Many fine-tuning runs in one folder: each is done once, whatever stops the process in between."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rlrr_kernels.train.config.files import read_json
from rlrr_kernels.train.data.folders import Samples
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.output.folder import RESULT
from rlrr_kernels.train.run.config import FinetuneConfig

METRICS = {
    "val_accuracy": ("validation", "accuracy"),
    "val_macro_f1": ("validation", "macro_f1"),
    "test_accuracy": ("test", "accuracy"),
    "test_macro_f1": ("test", "macro_f1"),
}
"""Where a result document holds the scores of a run."""


@dataclasses.dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Args:
        name: relative path with slashes, its folder in the grid's: ``cifar/seed-1``.
        config: the run; ``config.out`` is replaced by the folder.
        splits: makes the images by split in place of those in ``config.data``; called when the run starts.
    """

    name: str
    config: FinetuneConfig
    splits: Callable[[], Mapping[str, Samples]] | None = None


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample; None for a single value) of values."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        values = tuple(values)
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def run_grid(
    runs: Iterable[GridRun],
    out: str | Path,
    *,
    keep_checkpoints: bool = True,
    on_result: Callable[[str, dict[str, Any]], None] = lambda name, result: None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Does every run in its folder ``out/name``: a finished one is read, a stopped one gone on with, others started.

    A run is finished once its ``result.json`` is there, which is written in one step at its end; until then its
    checkpoint holds every finished epoch. So the process may be killed at any moment and started again.

    Args:
        runs: in the order in which they are done.
        out: folder of the grid.
        keep_checkpoints: ``False`` removes the checkpoint of a run once its result is there.
        on_result: gets the name and the result document of every run, as soon as it is read or done; in every process.
        quiet: print nothing.

    Returns:
        Name → result document, as in ``result.json``.

    Raises:
        ValueError: two runs have one name, a name is no relative path, or a result is there that was made with other
            settings (named); all of these before the first run. Or as for :func:`rlrr_kernels.train.finetune.finetune`.
        OSError: a result could not be written.
    """
    runs, out = list(runs), Path(out)
    check_names([run.name for run in runs])
    results = {run.name: result for run in runs if (result := finished_result(run, out)) is not None}
    for name, result in results.items():
        on_result(name, result)
    started, done = time.monotonic(), 0
    for number, run in enumerate(runs, 1):
        if run.name in results:
            continue
        folder = out / run.name
        finetune(
            dataclasses.replace(run.config, out=folder),
            splits=None if run.splits is None else run.splits(),
            resume=(folder / checkpoint.NAME).exists(),
            title=f"run {number} of {len(runs)}: {run.name}{_time_left(started, done, len(runs) - len(results))}",
            quiet=quiet,
        )
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the main process writes the result
        result = finished_result(run, out)
        if result is None:
            raise OSError(f"{folder / RESULT} could not be written; the training is safe in {folder}, run it again")
        results[run.name] = result
        on_result(run.name, result)
        if not keep_checkpoints:
            (folder / checkpoint.NAME).unlink(missing_ok=True)
        done += 1
        gc.collect()
    return {run.name: results[run.name] for run in runs}


def finished_result(run: GridRun, out: str | Path) -> dict[str, Any] | None:
    """The result document of ``run`` in the grid's folder ``out``; None where it is not finished.

    Raises:
        ValueError: there is one, of other settings or damaged.
    """
    path = Path(out) / run.name / RESULT
    result = read_result(path)
    if result is None:
        return None
    differing = run.config.differing_settings(result["settings"])
    if differing:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(differing)}. Choose another folder, or remove this one"
        )
    return result


def read_result(path: Path) -> dict[str, Any] | None:
    """The result document in the file ``path``; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return _checked(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no result of this version: {error!r}; remove it to repeat the run"
        ) from error


def _checked(result: Any) -> dict[str, Any]:
    """``result``, if it holds what is made of results: the settings, and scores or None where :data:`METRICS` are."""
    if not isinstance(result["settings"], dict):
        raise TypeError("settings must be a mapping")
    for part, key in METRICS.values():
        if result[part] is not None and not isinstance(result[part][key], float | int):
            raise TypeError(f"{part}: {key} must be a number")
    return result


def check_names(names: list[str]) -> None:
    """Raises ``ValueError`` unless every run of a grid can have a folder of its own under its name."""
    for name in names:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
            raise ValueError(f"the name of a run must be a relative path such as 'cifar/seed-1'; got {name!r}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"runs must have different names; these occur twice: {', '.join(twice)}")
    inside = [(a, b) for a in names for b in names if b.startswith(f"{a}/")]
    if inside:
        raise ValueError(f"the folder of a run must not lie in another's: {inside[0][1]} lies in {inside[0][0]}")


def _time_left(started: float, done: int, left: int) -> str:
    if not done:
        return ""
    minutes = (time.monotonic() - started) / done * left / 60
    return f", about {minutes / 60:.1f} h left" if minutes > 90 else f", about {minutes:.0f} min left"
