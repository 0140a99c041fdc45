"""How a model is trained: the settings of the loop."""

from __future__ import annotations

import dataclasses
import math

METRICS = ("accuracy", "macro_f1")
PRECISIONS = ("auto", "no", "fp16", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; the learning rate and weight decay of each tensor come with the optimizer groups.

    Args:
        epochs: passes over the training images.
        batch_size: images a process and step.
        accumulate: steps an optimizer update.
        drop_last: leave out an epoch's last batch where it would be short; other images each epoch.
        warmup_epochs: of these, spent rising to the learning rate; fractions too. None: one, or half of a single one.
        cooldown_epochs: of these, spent at the minimum, last; fractions too.
        min_lr: where the cosine ends.
        warmup_lr: where the warm-up starts.
        label_smoothing: of the cross-entropy, 0 to 1.
        clip_grad: largest norm of the gradient; None: not clipped.
        mixed_precision: ``no`` (float32), ``fp16``, ``bf16``, or ``auto``: 16 bits where the device computes with them.
        seed: of the order of the images, their augmentation and dropout.
        workers: processes that load images; None: up to 8 beside a GPU, none beside a CPU that is busy training.
        select_by: validation metric the epoch is chosen by, ``accuracy`` or ``macro_f1``; the loss breaks ties.
        checkpoint_minutes: a checkpoint is written after every epoch, and within one after so many minutes.

    Raises:
        ValueError: a value is not allowed.
    """

    epochs: int = 20
    batch_size: int = 32
    accumulate: int = 1
    drop_last: bool = False
    warmup_epochs: float | None = None
    cooldown_epochs: float = 0
    min_lr: float = 1e-8
    warmup_lr: float = 1e-7
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    mixed_precision: str = "auto"
    seed: int = 42
    workers: int | None = None
    select_by: str = "accuracy"
    checkpoint_minutes: float = 5

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(1, self.epochs / 2))
        for name in ("warmup_epochs", "cooldown_epochs", "min_lr", "warmup_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        if self.warmup_epochs + self.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs + cooldown_epochs must be less than epochs = {self.epochs}; "
                f"got {self.warmup_epochs} + {self.cooldown_epochs}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to 1; got {self.label_smoothing}")
        for name, choices in (("mixed_precision", PRECISIONS), ("select_by", METRICS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
