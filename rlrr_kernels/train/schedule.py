"""The learning rate over a run: linear warm-up, cosine, and a last stretch at the minimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from timm.scheduler import CosineLRScheduler


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    updates: int,
    *,
    warmup_updates: int = 0,
    cooldown_updates: int = 0,
    min_lr: float = 1e-8,
    warmup_lr: float = 1e-7,
) -> CosineLRScheduler:
    """timm's cosine scheduler, stepped by ``step_update(n)`` after the n-th optimizer update; it keeps no state.

    Args:
        optimizer: every group peaks at its own ``lr``.
        updates: of the whole run.
        warmup_updates: linear rise from ``warmup_lr``.
        cooldown_updates: the last ones, spent at ``min_lr``.
        min_lr, warmup_lr: learning rates; the paper's by default.

    Raises:
        ValueError: warm-up and cool-down leave nothing in between.
    """
    from timm.scheduler import CosineLRScheduler

    between = updates - warmup_updates - cooldown_updates
    if between < 1:
        raise ValueError(
            f"warm-up ({warmup_updates}) and cool-down ({cooldown_updates}) must be shorter than the run, "
            f"{updates} updates"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=between,
        lr_min=min_lr,
        warmup_t=warmup_updates,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
