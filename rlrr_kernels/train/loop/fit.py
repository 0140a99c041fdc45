"""``fit``: trains what a model leaves trainable, on accelerate; survives being killed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlrr_kernels.train.config.train_config import CHANGES_NO_NUMBER, TrainConfig
from rlrr_kernels.train.data.folders import EpochShuffle, ImageDataset, make_loader, shorten
from rlrr_kernels.train.data.mixing import Mixing
from rlrr_kernels.train.evaluate import evaluate
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop.averaging import Average
from rlrr_kernels.train.loop.distributed import Exchange, copy_to_all, from_main, make_accelerator, shard_frozen
from rlrr_kernels.train.loop.optimizer import adamw
from rlrr_kernels.train.loop.record import FitResult, Record
from rlrr_kernels.train.loop.schedule import Schedule
from rlrr_kernels.train.loop.trained import is_frozen, trained_tensors
from rlrr_kernels.train.output.board import Board
from rlrr_kernels.train.output.progress import TrainProgress
from rlrr_kernels.writing import remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    train_set: ImageDataset,
    val_set: ImageDataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    chosen_on: str = "validation",
    resume: bool = False,
    started: Callable[[], None] = lambda: None,
    quiet: bool = False,
) -> FitResult:
    """Trains the parameters of ``model`` that require gradients by AdamW; leaves it with the best epoch's in place.

    The epoch is chosen by ``val_set`` alone; with ``config.ema_decay`` the averages are what is validated and kept. The
    checkpoint in ``folder`` holds the trained tensors of now and of the best epoch, the optimizer and the random
    states: a run that was killed, even by ``kill -9``, and resumed ends with the same numbers as one that was not. A
    checkpoint or log that cannot be written (no space left) is reported and the run goes on; the checkpoint before
    stays.

    On several processes each takes ``config.batch_size`` images a step; an epoch's last step is filled up with images
    of its start. The main process alone writes and reads the checkpoint.

    Args:
        model: images [B, 3, H, W] to logits [B, C].
        groups: optimizer groups with their ``lr`` and ``weight_decay``, see :func:`rlrr_kernels.parameter_groups`.
        train_set, val_set: the images; C is the number of their classes.
        config: how.
        folder: exists; gets ``checkpoint.pt``.
        identity: what else makes this run what it is (model, data, ...), as plain data: refused on resumption when
            it differs.
        accelerator: default: :func:`rlrr_kernels.train.loop.distributed.make_accelerator`.
        chosen_on: what the images of ``val_set`` are, for the lines and logs: ``validation`` or ``test``.
        resume: go on from the checkpoint in ``folder``. A run that has ended may get more epochs, by ``config.epochs``.
        started: called once nothing speaks against the run any more, before its first step.
        quiet: no progress bars and no line an epoch.

    Raises:
        ValueError: the checkpoint is of another run, a trained parameter got no gradient, or the model or the run is
            nothing that a setting can be applied to; names it.
        ImportError: ``config.tensorboard`` without tensorboard.
        FloatingPointError: the loss is no longer finite.
        OSError: less space on the disk of ``folder`` than two checkpoints need.
    """
    accelerator = accelerator or make_accelerator(config)
    run = Run(model, list(groups), train_set, val_set, config, Path(folder), accelerator, dict(identity or {}))
    if resume:
        run.load()
    started()
    talk = run.accelerator.is_main_process and not quiet
    with TrainProgress(config.epochs, chosen_on=chosen_on, enabled=talk) as progress:
        for step in run.steps(progress):
            with accelerator.autocast():
                logits = run.model(step.images)
            step.loss = run.loss(logits.float(), step.targets)
            accelerator.backward(step.share * step.loss)
    return run.finish()


@dataclasses.dataclass
class Step:
    """A batch between whose loading and whose optimizer step stand a forward and a backward.

    Attributes:
        images: [B, 3, H, W].
        targets: labels [B], or [B, C] where they are mixed.
        share: of the images of its optimizer update: what its loss counts in the gradient, so that several steps an
            update have the gradient of one batch of all their images.
        loss: mean over the batch, set by whoever computed it and the gradients of ``share`` times it.
    """

    images: Tensor
    targets: Tensor
    share: float
    loss: Tensor | None = None


class Run:
    """One run: the model, what trains it, and how far it is. See :func:`fit` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        train_set: ImageDataset,
        val_set: ImageDataset,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.train_set, self.classes = train_set, len(train_set.samples.classes)
        self.identity = identity | {
            "groups": [[group["lr"], group["weight_decay"], len(group["params"])] for group in groups],
            "images": len(train_set),
            "processes": accelerator.num_processes,
        }
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("the model has no parameter that requires a gradient; adapt it first")
        self.tensors = trained_tensors(model)
        # Now, best and average, two moments of AdamW; and the old file is there until the new one is complete.
        copies = 2 * (4 + (config.ema_decay is not None))
        self.space = copies * sum(p.nbytes for p in self.trained.values()) + 2**20  # bytes on the disk
        from_main(accelerator, lambda: checkpoint.require_space(folder, self.space))
        if config.activation_checkpointing:
            set_activation_checkpointing(model, True)
        if accelerator.is_main_process:
            remove_leftovers(folder)
        self.sampler = EpochShuffle(len(train_set), config.seed)
        workers = config.workers
        if workers is None:
            workers = min(8, torch.get_num_threads()) if accelerator.device.type != "cpu" else 0
        train_loader = make_loader(
            train_set, config.batch_size, sampler=self.sampler, workers=workers, drop_last=config.drop_last
        )
        val_loader = make_loader(val_set, config.batch_size, workers=workers)
        # Not its steps but its length counts here; accelerate deals the batches out to the processes.
        per_step = config.batch_size * accelerator.num_processes
        batches = len(train_set) // per_step if config.drop_last else math.ceil(len(train_set) / per_step)
        if batches == 0:
            raise ValueError(f"drop_last leaves no batch: {len(train_set)} training images, {per_step} images a step")
        self.updates_per_epoch = math.ceil(batches / config.accumulate)
        optimizer = adamw(groups, accelerator.device)
        self.schedule = Schedule(optimizer, config, self.updates_per_epoch)
        self.plain_model = model
        self.exchange = Exchange()
        self.sharded = config.fsdp and accelerator.num_processes > 1  # one process has nothing to spread
        self.model = (shard_frozen if self.sharded else copy_to_all)(model, accelerator, self.exchange)
        self.optimizer, self.train_loader, self.val_loader = accelerator.prepare(optimizer, train_loader, val_loader)
        self.mixing = None
        if config.mixup or config.cutmix:
            self.mixing = Mixing(config, self.classes, accelerator.process_index)
        self.average = None if config.ema_decay is None else Average(self.trained, config.ema_decay)
        self.board: Board | None = None
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.point_count = 0  # images since the last point of the curve
        self.session_updates = 0
        self.session_steps, self.timed_since = 0, 0.0
        self.checked_gradients = False
        self.extended: int | None = None  # epochs of the finished run that this one adds to
        torch.manual_seed(config.seed + accelerator.process_index)
        self.record = Record(batches)

    def steps(self, progress: TrainProgress) -> Iterator[Step]:
        """All that is left of the run: yields each batch, to get its loss and the gradients of that; ends when done.

        Whoever drives several runs at once gives each the random states it had, when it goes on with it.
        """
        self._start(progress)
        while self.record.epoch < self.config.epochs:
            yield from self._train_epoch(progress)
            self._validate(progress)
            self.save(progress)

    def _start(self, progress: TrainProgress) -> None:
        """What comes before the first epoch of a session."""
        decay, updates = self.config.ema_decay, self.config.epochs * self.updates_per_epoch
        if decay is not None and decay**updates > 0.1:
            progress.warn(
                f"ema_decay = {decay} is slow for {updates} updates: the last average will still hold "
                f"{decay**updates:.0%} of the initial values"
            )
        if self.extended is not None:
            progress.say(
                f"the finished run of {self.extended} epochs gets {self.config.epochs - self.extended} more, at the "
                f"learning rates of a run of {self.config.epochs}"
            )
        if self.config.tensorboard and self.accelerator.is_main_process:
            self.board = Board(self.folder, self.record.steps, progress.warn)

    def _train_epoch(self, progress: TrainProgress) -> Iterator[Step]:
        """The rest of the current epoch."""
        config, accelerator, record = self.config, self.accelerator, self.record
        self.sampler.epoch = self.train_set.epoch = record.epoch
        self.sampler.skip = record.batch * config.batch_size * accelerator.num_processes
        if record.batch >= record.batches:  # the checkpoint was written between the last update and the validation
            return
        progress.start_epoch(record.epoch, record.batch, record.batches)
        self._train_mode()
        saved = time.monotonic()
        pending: list[Tensor] = []  # losses that nobody has waited for yet
        every = max(1, record.batches // 20)
        for images, labels in self.train_loader:
            targets = labels
            if self.mixing is not None:
                images, targets = self.mixing(images, labels, record.epoch, record.batch)
            # Counted here, not by accelerate: it has one count for all the runs of a process.
            updates = (record.batch + 1) % config.accumulate == 0 or record.batch + 1 == record.batches
            with contextlib.nullcontext() if updates else accelerator.no_sync(self.model):
                step = Step(images, targets, self._share(record.batch))
                yield step
            assert step.loss is not None
            accelerator.sync_gradients = updates
            if updates:
                self._check_gradients()
                if self.sharded:
                    self.exchange.average_gradients(self.trained.values())
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(self.trained.values(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            pending.append(step.loss.detach() * len(labels))
            self.point_count += len(labels)
            record.batch += 1
            if updates:
                record.updates += 1
                self.session_updates += 1
                self.schedule.set(record.updates)
                if self.average is not None:
                    self.average.update()
            if record.batch % every == 0 or record.batch == record.batches:
                self._add_losses(pending)
                if self.board is not None:
                    scalars = {"train/loss": record.loss_curve[-1][1], "train/learning_rate": self.lr}
                    self.board.log(scalars, record.steps)
            progress.advance(record.mean_loss, self.lr)
            self._estimate(progress)
            if updates and self._checkpoint_is_due(saved):
                self._add_losses(pending)
                self.save(progress)
                saved = time.monotonic()

    def _share(self, batch: int) -> float:
        """Of the images of its optimizer update, those in ``batch``, counted from 0 in its epoch."""
        config, record = self.config, self.record
        first = batch - batch % config.accumulate
        last = min(first + config.accumulate, record.batches)
        images = len(self.train_set) if self.accelerator.num_processes == 1 else math.inf  # else every batch is full

        def before(batch: int) -> float:
            return min(batch * config.batch_size, images)

        return (before(batch + 1) - before(batch)) / (before(last) - before(first))

    def _estimate(self, progress: TrainProgress) -> None:
        """Says, after the first steps of a session, how long the rest will take. A first step is slower than others."""
        self.session_steps += 1
        if self.session_steps not in (1, 1 + _TIMED_STEPS):
            return
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.monotonic()
        if self.session_steps == 1:
            self.timed_since = now
            return
        record, step = self.record, (now - self.timed_since) / _TIMED_STEPS
        left = self.config.epochs * record.batches - record.steps
        scoring = (self.config.epochs - record.epoch) * len(self.val_loader)
        progress.expect(step * (left + _SCORING_SHARE * scoring))

    def _checkpoint_is_due(self, saved: float) -> bool:
        """Whether it is time, by the main process's clock: all processes take part in a checkpoint."""
        due = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
        if self.accelerator.num_processes == 1:
            return due
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(float(due), device=self.accelerator.device)))

    @property
    def lr(self) -> float:
        """The largest learning rate of the groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _last_lr(self) -> float:
        """That of the last update."""
        self.schedule.set(self.record.updates - 1)
        lr = self.lr
        self.schedule.set(self.record.updates)
        return lr

    def _train_mode(self) -> None:
        """Training mode, except for batch normalisation that is frozen: its statistics are part of the backbone."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and is_frozen(module):
                module.eval()

    def _add_losses(self, pending: list[Tensor]) -> None:
        if not pending:
            return
        sums = torch.stack(
            (torch.stack(pending).sum(), torch.tensor(float(self.point_count), device=pending[0].device))
        )
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        pending.clear()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the training loss is {total} in epoch {self.record.epoch + 1} at learning rate {self.lr:.2g}; lower "
                "the learning rate, or train without mixed precision"
            )
        self.record.add_losses(total, count)
        self.point_count = 0

    def _check_gradients(self) -> None:
        if self.checked_gradients:
            return
        missing = [name for name, parameter in self.trained.items() if parameter.grad is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.trained)} trained parameters got no gradient, so the model does not use "
                f"them: {', '.join(missing[:6])}" + (" ..." if len(missing) > 6 else "")
            )
        self.checked_gradients = True

    def _validate(self, progress: TrainProgress) -> None:
        """Scores the validation images, and keeps the trained tensors when they are the best so far."""
        training = dataclasses.replace(self.exchange)
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            scores = evaluate(self.model, self.val_loader, self.classes, self.accelerator, progress.validation)
            tensors = self._trained_tensors()
        self._note_exchange(training)
        entry, improved = self.record.finish_epoch(scores, self._last_lr(), self.config, tensors)
        if self.board is not None:
            scalars = {f"{progress.images}/{key}": entry[f"val_{key}"] for key in ("loss", "accuracy", "macro_f1")}
            scalars |= {"train/epoch_loss": entry["train_loss"], "epoch/seconds": entry["seconds"]}
            self.board.log(scalars, self.record.steps)
        progress.finish_epoch(entry, improved)

    def _note_exchange(self, training: Exchange) -> None:
        """Takes note of what the training exchanged, and leaves out what the validation did."""
        self.exchange.gradients, self.exchange.weights = training.gradients, training.weights
        if self.accelerator.num_processes > 1 and self.session_updates:
            self.record.exchanged = training.per_update(self.session_updates)

    def _trained_tensors(self) -> dict[str, Tensor]:
        return _on_cpu(self.tensors)

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config)
        for name in CHANGES_NO_NUMBER:
            del settings[name]
        shapes = {name: list(parameter.shape) for name, parameter in self.trained.items()}
        return settings | self.identity | {"parameters": shapes}

    def save(self, progress: TrainProgress) -> None:
        """Writes the checkpoint; says so when it cannot, and goes on."""
        from accelerate.utils import gather_object

        random_states = gather_object([checkpoint.rng_state()])  # every process takes part
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "settings": self._settings(),
            **self.record.state_dict(),
            "tensors": self._trained_tensors(),
            "average": None if self.average is None else _on_cpu(self.average.tensors),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random_states,
        }
        if self.board is not None:  # logs older than the checkpoint are what a resumed run keeps
            self.board.flush()
        try:
            checkpoint.save_checkpoint(self.folder, state)
        except OSError as error:
            progress.warn(f"the checkpoint in {self.folder} could not be written, the one before stays: {error}")

    def load(self) -> None:
        """Goes back to where the checkpoint was written."""
        state = from_main(self.accelerator, lambda: checkpoint.load_checkpoint(self.folder))
        try:
            self._go_back_to(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            path = self.folder / checkpoint.NAME
            raise ValueError(f"{path} is no checkpoint that this version wrote: {error!r}") from error

    def _go_back_to(self, state: dict[str, Any]) -> None:
        # A setting that did not exist when the checkpoint was written had what is now its default.
        ours, theirs = self._settings(), dataclasses.asdict(TrainConfig()) | state["settings"]
        ours = {name: value for name, value in ours.items() if name in theirs or name not in _ADDED}
        differing = [name for name in ours if ours[name] != theirs.get(name)]
        before = theirs["epochs"]
        if set(differing) <= {"epochs", "warmup_epochs"} and state["epoch"] == before < self.config.epochs:
            self.extended = before
        elif differing:
            details = dict.fromkeys(text for name in differing for text in _difference(name, theirs, ours))
            raise ValueError(
                f"the checkpoint in {self.folder} belongs to a run with other settings: {'; '.join(details)}"
            )
        self._put(state["tensors"])
        if self.average is not None:
            self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpoint.set_rng_state(state["random"][self.accelerator.process_index])
        self.record.load_state_dict(state)
        if self.extended is not None:
            self.record.extended.append(self.extended)
        self.schedule.set(self.record.updates)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def finish(self) -> FitResult:
        """Leaves the model as it came, with the best epoch's tensors in it."""
        self._put(self.record.best["tensors"])
        if self.sharded:
            self.plain_model.to(self.accelerator.device)
        else:  # also takes back the forward that accelerate wrapped for mixed precision
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.config.activation_checkpointing:
            set_activation_checkpointing(self.plain_model, False)
        if self.board is not None:
            self.board.close()
        return self.record.result()


def set_activation_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Has a timm model recompute its blocks in backward, or not.

    Raises:
        ValueError: the model cannot.
    """
    try:
        model.set_grad_checkpointing(enabled)
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"activation_checkpointing: a {type(model).__name__} has no checkpointing") from error


_TIMED_STEPS = 5
_SCORING_SHARE = 0.35
"""Of the time of a training step that a batch of validation images takes, about: a forward, of three like parts."""

_ADDED = {
    "images_digest": "the images are not the same (their names, sizes in bytes, labels or splits)",
    "backbone_digest": "the weights of the backbone are not the same",
}
"""Parts of a run's identity that older checkpoints do not have, and what to say where they differ."""

_GROUP = ("lr", "weight_decay", "parameters in a group")


def _difference(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """What to say of a setting called ``name`` that is not the same."""
    was, now = theirs.get(name), ours[name]
    if name == "parameters":
        yield "the trained tensors are others"
    elif name in _ADDED:
        yield _ADDED[name]
    elif isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*was, *now])
        was, now = ({key: value.get(key) for key in keys} for value in (was, now))
        for key in keys:
            if was[key] != now[key]:
                yield from _difference(key, was, now)
    elif name == "classes" and was:
        parts = (("without", {*was} - {*now}), ("with", {*now} - {*was}))
        changed = [f"{word} {shorten(sorted(names))}" for word, names in parts if names]
        yield f"classes are {' and '.join(changed) or 'in another order'}"
    elif name == "groups" and was:
        columns = zip(_GROUP, zip(*was, strict=True), zip(*now, strict=True), strict=True)
        for what, before, after in columns:
            if before != after:
                yield f"{what} was {_distinct(before)}, is {_distinct(after)}"
    else:
        yield f"{name} was {was}, is {now}"


def _distinct(values: Iterable[Any]) -> str:
    return " and ".join(map(str, dict.fromkeys(values)))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
