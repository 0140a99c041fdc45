"""How far a run is and what came of it so far: the part of a checkpoint that is plain data, beside the best tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.evaluate import Scores
from rlrr_kernels.train.output.memory import peak_memory, reset_peak_memory


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What came of :func:`rlrr_kernels.train.loop.fit`.

    Attributes:
        best_epoch: counted from 1. best: its validation scores.
        history: one entry an epoch: epoch, lr, train_loss, val_loss, val_accuracy, val_macro_f1, seconds.
        loss_curve: (epochs done, mean training loss since the last point), about 20 an epoch.
        seconds: training and validation, over all the sessions of a resumed run.
        peak_memory: bytes; see :func:`rlrr_kernels.train.output.memory.peak_memory`.
        exchanged: bytes a process exchanges with the others for one optimizer update, see
            :class:`rlrr_kernels.train.loop.distributed.Exchange`; None in a single process.
        extended: lengths in epochs at which the run had ended before it was given more.
    """

    best_epoch: int
    best: Scores
    history: list[dict[str, float]]
    loss_curve: list[tuple[float, float]]
    seconds: float
    peak_memory: int
    exchanged: dict[str, int] | None
    extended: tuple[int, ...] = ()


class Record:
    """Where a run stands (epochs, batches of this epoch, updates), its losses, scores, time and memory."""

    def __init__(self, batches: int) -> None:
        """``batches``: of an epoch. The clock starts."""
        self.batches = batches
        self.epoch = self.batch = self.updates = 0
        self.loss_sum, self.loss_count = 0.0, 0  # of the epoch so far
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []
        self.loss_curve: list[tuple[float, float]] = []
        self.seconds = 0.0
        self.peak_memory = 0
        self.exchanged: dict[str, int] | None = None
        self.extended: list[int] = []
        self.clock = time.monotonic()
        reset_peak_memory()

    @property
    def steps(self) -> int:
        """Batches done since the start of the run."""
        return self.epoch * self.batches + self.batch

    @property
    def mean_loss(self) -> float:
        """Of the images of this epoch so far."""
        return self.loss_sum / max(self.loss_count, 1)

    def add_losses(self, total: float, count: float) -> None:
        """Takes in the sum of the losses of ``count`` images: the next point of the curve."""
        self.loss_sum += total
        self.loss_count += count
        self.loss_curve.append((self.epoch + self.batch / self.batches, total / count))

    def finish_epoch(
        self, scores: Scores, lr: float, config: TrainConfig, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], bool]:
        """Ends the epoch with its validation ``scores``; keeps ``tensors`` if it is the best by ``config`` so far.

        Returns:
            The epoch's entry of the history, and whether it is the best.
        """
        self.tick()
        entry = {
            "epoch": self.epoch + 1,
            "lr": lr,
            "train_loss": self.mean_loss,
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "val_macro_f1": scores.macro_f1,
            "seconds": self.seconds - sum(entry["seconds"] for entry in self.history),
        }
        self.history.append(entry)
        key = (getattr(scores, config.select_by), -scores.loss if config.ties == "loss" else 0.0)
        improved = self.epoch + 1 >= config.choose_from and (self.best is None or key > tuple(self.best["key"]))
        if improved:
            self.best = {
                "key": list(key),
                "epoch": self.epoch + 1,
                "scores": dataclasses.asdict(scores),
                "tensors": tensors,
            }
        self.epoch += 1
        self.batch, self.loss_sum, self.loss_count = 0, 0.0, 0
        return entry, improved

    def tick(self) -> None:
        """Brings time and peak memory up to now."""
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now
        self.peak_memory = max(self.peak_memory, peak_memory())

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        self.tick()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "updates": self.updates,
            "loss": [self.loss_sum, self.loss_count],
            "best": self.best,
            "history": self.history,
            "loss_curve": self.loss_curve,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "exchanged": self.exchanged,
            "extended": self.extended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned; the clock starts anew."""
        self.epoch, self.batch, self.updates = state["epoch"], state["batch"], state["updates"]
        self.loss_sum, self.loss_count = state["loss"]
        self.best, self.history, self.loss_curve = state["best"], state["history"], state["loss_curve"]
        self.seconds, self.peak_memory = state["seconds"], state["peak_memory"]
        self.exchanged = state["exchanged"]
        self.extended = list(state.get("extended", ()))
        self.clock = time.monotonic()

    def result(self) -> FitResult:
        """What came of a run that has ended."""
        scores = self.best["scores"]
        return FitResult(
            best_epoch=self.best["epoch"],
            best=Scores(**scores | {"recall": tuple(scores["recall"])}),
            history=self.history,
            loss_curve=[tuple(point) for point in self.loss_curve],
            seconds=self.seconds,
            peak_memory=self.peak_memory,
            exchanged=self.exchanged,
            extended=tuple(self.extended),
        )
