"""The learning rate over a run: linear warm-up, one cosine or several, and a last stretch at the minimum."""

from __future__ import annotations

import math

import torch

from rlrr_kernels.train.config.train_config import TrainConfig


class Schedule:
    """The learning rate that a :class:`TrainConfig` describes; it keeps no state."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> None:
        """Sets the learning rate of the first update; every group of ``optimizer`` peaks at its own ``lr``.

        Raises:
            ValueError: at so few updates an epoch, warm-up and cool-down leave nothing in between.
        """
        self.optimizer, self.config, self.updates_per_epoch = optimizer, config, updates_per_epoch
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.per_epoch = config.schedule_per == "epoch"
        total, self.warmup, cooldown, self.cycle = (
            epochs if self.per_epoch else round(epochs * updates_per_epoch)
            for epochs in (config.epochs, config.warmup_epochs, config.cooldown_epochs, config.restart_epochs)
        )
        self.cosine_start = 0 if config.warmup_within else self.warmup
        self.cooldown_start = total - cooldown
        between = self.cooldown_start - self.cosine_start
        if between <= 0 or self.cycle <= 0:
            raise ValueError(
                f"warm-up ({self.warmup}), a cycle ({self.cycle}) and cool-down ({cooldown}) must be shorter than the "
                f"run and not 0; the run has {total} {'epochs' if self.per_epoch else 'updates'}"
            )
        if config.schedule == "cosine":
            self.cycle = between
        self.set(0)

    def set(self, updates: int) -> None:
        """Sets the learning rate for the update after the first ``updates``."""
        late = max(updates - self.config.schedule_lag * self.updates_per_epoch, 0)
        time = late // self.updates_per_epoch if self.per_epoch else late
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = self._rate(peak, time)

    def _rate(self, peak: float, time: int) -> float:
        """The learning rate at ``time``, in epochs or updates, of a group that peaks at ``peak``."""
        config = self.config
        if time < self.warmup:
            return config.warmup_lr + (peak - config.warmup_lr) * time / self.warmup
        if time >= self.cooldown_start:  # also where the last cycle would go on
            return config.min_lr
        within, cycle = time - self.cosine_start, self.cycle
        if config.restart_factor == 1:
            within %= cycle
        while within >= cycle:
            within, cycle = within - cycle, cycle * config.restart_factor
        return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * within / cycle))
