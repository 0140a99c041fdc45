"""The learning rate over a run: linear warm-up, one cosine or several, and a last stretch at the minimum."""

from __future__ import annotations

import math

import torch

from rlrr_kernels.train.config.train_config import TrainConfig


class Schedule:
    """timm's cosine scheduler as a :class:`TrainConfig` describes it; it keeps no state."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> None:
        """Sets the learning rate of the first update; every group of ``optimizer`` peaks at its own ``lr``.

        Raises:
            ValueError: at so few updates an epoch, warm-up and cool-down leave nothing in between.
        """
        from timm.scheduler import CosineLRScheduler

        self.updates_per_epoch = updates_per_epoch
        self.per_epoch = config.schedule_per == "epoch"
        total, warmup, cooldown, cycle = (
            epochs if self.per_epoch else round(epochs * updates_per_epoch)
            for epochs in (config.epochs, config.warmup_epochs, config.cooldown_epochs, config.restart_epochs)
        )
        before = 0 if config.warmup_within else warmup
        between = total - before - cooldown
        if between <= 0 or cycle <= 0:
            raise ValueError(
                f"warm-up ({warmup}), a cycle ({cycle}) and cool-down ({cooldown}) must be shorter than the run and "
                f"not 0; the run has {total} {'epochs' if self.per_epoch else 'updates'}"
            )
        if config.schedule == "cosine":
            cycle = between
        cycles = math.ceil(between / cycle)
        self.cooldown_start = total - cooldown
        self.after_all_cycles = before + cycles * cycle
        self.timm = CosineLRScheduler(
            optimizer,
            t_initial=cycle,
            cycle_limit=cycles,
            lr_min=config.min_lr,
            warmup_t=warmup,
            warmup_lr_init=config.warmup_lr,
            warmup_prefix=not config.warmup_within,
            t_in_epochs=self.per_epoch,
        )
        self.set(0)

    def set(self, updates: int) -> None:
        """Sets the learning rate for the update after the first ``updates``."""
        time = updates // self.updates_per_epoch if self.per_epoch else updates
        if time >= self.cooldown_start:  # also where the last cycle would go on
            time = self.after_all_cycles
        (self.timm.step if self.per_epoch else self.timm.step_update)(time)
