"""How a model is trained: the settings of the loop."""

from __future__ import annotations

import dataclasses

from rlrr_kernels.train.config.files import check_types

METRICS = ("accuracy", "macro_f1")
PRECISIONS = ("auto", "no", "fp16", "bf16")
SCHEDULES = ("cosine", "restarts")
SCHEDULE_STEPS = ("update", "epoch")
TIES = ("loss", "first")

CHANGES_NO_NUMBER = ("workers", "checkpoint_minutes", "activation_checkpointing", "tensorboard")
"""Settings in which a run may differ from the one it goes on with or repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; the learning rate and weight decay of each tensor come with the optimizer groups.

    Args:
        epochs: passes over the training images.
        batch_size: images a process and step.
        accumulate: steps an optimizer update, whose gradient is the mean over all their images, as of one batch.
        drop_last: leave out an epoch's last batch where it would be short; other images each epoch.
        warmup_epochs: of these, spent rising to the learning rate; fractions too. None: one, or half of a single one.
        cooldown_epochs: of these, spent at the minimum, last; fractions too.
        schedule: of the learning rate after the warm-up: ``cosine``, one fall to the minimum, or ``restarts``, several.
        restart_epochs: length of the first cycle of ``restarts``; fractions too.
        restart_factor: how many times as long as the one before each further cycle is.
        schedule_per: how often the learning rate changes: ``update``, or ``epoch`` as timm's programs do.
        schedule_lag: epochs by which the learning rate is late: 1 where a loop steps its scheduler with the number,
            from 0, of the epoch that has just ended.
        warmup_within: whether the warm-up takes the place of the cosine's beginning (timm's default) instead of
            coming before it.
        min_lr: where the cosine ends.
        warmup_lr: where the warm-up starts.
        mixup: alpha of mixup; 0: none. With cutmix, every batch gets one of the two.
        cutmix: alpha of cutmix; 0: none.
        label_smoothing: of the cross-entropy, at least 0 and less than 1.
        ema_decay: of a moving average of what is trained, which is validated and kept in its place; None: no average.
        clip_grad: largest norm of the gradient; None: not clipped.
        mixed_precision: ``no`` (float32), ``fp16``, ``bf16``, or ``auto``: 16 bits where the device computes with them.
        activation_checkpointing: recompute a timm model's blocks in backward instead of keeping their activations.
        compile: train and validate by ``torch.compile``: a few minutes at the start, then fewer kernels. Each size of a
            batch is compiled by itself.
        fsdp: on several processes, spread the frozen weights over them (FSDP2) instead of copying them (DDP).
        seed: of the order of the images, their augmentation and dropout.
        workers: processes that load images; None: up to 8 beside a GPU, none beside a CPU that is busy training.
        select_by: validation metric the epoch is chosen by, ``accuracy`` or ``macro_f1``.
        ties: which of the epochs equal in that is chosen: the one of the least ``loss``, or the ``first``.
        choose_from: first epoch, counted from 1, that may be chosen.
        checkpoint_minutes: a checkpoint is written after every epoch, and within one after so many minutes.
        tensorboard: also write TensorBoard logs to the run folder.

    Raises:
        ValueError: a value is not allowed.
    """

    epochs: int = 20
    batch_size: int = 32
    accumulate: int = 1
    drop_last: bool = False
    warmup_epochs: float | None = None
    cooldown_epochs: float = 0
    schedule: str = "cosine"
    restart_epochs: float = 5
    restart_factor: int = 1
    schedule_per: str = "update"
    schedule_lag: int = 0
    warmup_within: bool = False
    min_lr: float = 1e-8
    warmup_lr: float = 1e-7
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    clip_grad: float | None = None
    mixed_precision: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    seed: int = 42
    workers: int | None = None
    select_by: str = "accuracy"
    ties: str = "loss"
    choose_from: int = 1
    checkpoint_minutes: float = 5
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "accumulate", "restart_factor", "choose_from"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("seed", "workers", "checkpoint_minutes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"clip_grad must be above 0; got {self.clip_grad}")
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(1, self.epochs / 2))
        for name in ("warmup_epochs", "cooldown_epochs", "schedule_lag", "min_lr", "warmup_lr", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        if self.warmup_epochs + self.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs + cooldown_epochs must be less than epochs = {self.epochs}; "
                f"got {self.warmup_epochs} + {self.cooldown_epochs}"
            )
        if self.choose_from > self.epochs:
            raise ValueError(f"choose_from must be one of the {self.epochs} epochs; got {self.choose_from}")
        if self.restart_epochs <= 0:
            raise ValueError(f"restart_epochs must be above 0; got {self.restart_epochs}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1; got {self.label_smoothing}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1; got {self.ema_decay}")
        if self.compile and self.fsdp:
            raise ValueError("compile goes with copies of the model, not with fsdp; got both")
        for name, choices in (
            ("schedule", SCHEDULES),
            ("schedule_per", SCHEDULE_STEPS),
            ("mixed_precision", PRECISIONS),
            ("select_by", METRICS),
            ("ties", TIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
