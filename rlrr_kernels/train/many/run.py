"""``finetune_many``: several datasets' adapters trained side by side over one frozen backbone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.folder.save_load import trained_tensors
from rlrr_kernels.bank import AdapterBank, AdapterState
from rlrr_kernels.train.data.folders import ImageDataset, Samples, shorten
from rlrr_kernels.train.data.images import ImageError
from rlrr_kernels.train.grid.runs import read_result
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop.distributed import make_accelerator
from rlrr_kernels.train.loop.fit import Run, Step
from rlrr_kernels.train.many.drops import TaskDrops
from rlrr_kernels.train.many.progress import TaskProgress
from rlrr_kernels.train.many.streams import RandomStream
from rlrr_kernels.train.methods.baselines import optimizer_groups
from rlrr_kernels.train.models.attention import fastest_attention
from rlrr_kernels.train.models.backbones import create_model
from rlrr_kernels.train.models.drop import set_drop
from rlrr_kernels.train.output.folder import RESULT, check_free
from rlrr_kernels.train.output.progress import make_progress, say, time_to_go
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.run.results import conclude
from rlrr_kernels.train.run.start import (
    PreparedRun,
    check_splits,
    check_start,
    describe_run,
    look_for_run,
    prepare,
    take_folder,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGEST_BATCH = 128

_NOT_HERE = {
    "method": ("rlrr", "a bank holds RLRR's adapters; train others by rlrr finetune"),
    "form": ("rescaled", "a bank holds no additive ones"),
    "scale_grad_rows": (1.0, "mixed batches have exact gradients alone"),
    "recompute": (False, "mixed batches keep their activations"),
    "train.activation_checkpointing": (False, "mixed batches keep their activations"),
    "train.compile": (False, "mixed batches are not compiled"),
    "train.fsdp": (False, "one process trains all tasks"),
}
"""Settings of a fine-tune that a mixed batch does not have: the value it must have, and why."""

_OF_ONE_TASK = (FloatingPointError, OSError, ImageError)
"""Errors of a training that end its task alone."""


def finetune_many(
    configs: Mapping[str, FinetuneConfig],
    *,
    splits: Mapping[str, Mapping[str, Samples]] | None = None,
    largest_batch: int = LARGEST_BATCH,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Trains the adapters of several tasks over one backbone, their images side by side in its batches.

    Every task ends with what :func:`rlrr_kernels.train.finetune.finetune` of its configuration ends with, within
    rounding, and leaves the same folder: its order of images, augmentation, mixing and dropout come from random streams
    of its own, and its learning rate, schedule, number of epochs and choice of the epoch are its own. A step takes a
    batch of each task that is not done; where some are behind the others, as after ``kill -9``, of these alone.

    A task whose training fails (its loss is no longer finite, its folder is full, an image is gone or damaged since the
    start) ends there; the others go on.

    Args:
        configs: name → run of each task; ``out`` are different folders. Model, weights, image size, precision and
            device are the same for all.
        splits: name → images of the tasks that have no folder in ``data``.
        largest_batch: most images a forward and backward of a step takes, which bounds the memory; a step of more is
            computed in parts. A task's own batch is never divided.
        resume: go on from the checkpoints that are there; tasks without one start.
        quiet: print nothing.

    Where ``workers`` of a task is None, as many processes load its images beside a GPU as there is a processor for.

    Returns:
        Name → result document, as in ``result.json``; its seconds are those of the clock while the task trained beside
        the others.

    Raises:
        ValueError: the configurations do not go together, or as for ``finetune``; before any task trains.
        FloatingPointError, OSError: of a task, named; all others have been trained to their end. OSError where an image
            cannot be read.
        FileNotFoundError, ConnectionError, ImportError: as for ``finetune``.
    """
    _check(configs, largest_batch)
    results: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        with _of_task(name):
            check_start(config)
            check_free(config.out)
            if look_for_run(config.out, resume) and (result := _finished(config)) is not None:
                results[name] = result
    left = {name: config for name, config in configs.items() if name not in results}
    if results and not quiet:
        say(f"{len(results)} of {len(configs)} tasks are finished: {shorten([*results])}")
    if left:
        with contextlib.ExitStack() as held:
            training = _Training(left, splits or {}, largest_batch, resume, not quiet, held)
            results |= training.run()
    return {name: results[name] for name in configs}


@dataclasses.dataclass
class _TaskRun:
    """A task in training.

    Attributes:
        name: its own. prepared: its run, whose model is the one in the bank. sets: images by split.
        accelerator, run: as in a fine-tune alone. stream: what it draws from. progress: its bar.
        step: the batch that waits for its loss; None: the training has ended, for a reason in ``failure`` or its own.
    """

    name: str
    prepared: PreparedRun
    sets: Mapping[str, ImageDataset]
    accelerator: Accelerator
    run: Run
    stream: RandomStream
    progress: TaskProgress
    steps: Iterator[Step] | None = None
    step: Step | None = None
    failure: Exception | None = None

    def advance(self) -> None:
        """Goes on to the next batch."""
        if self.steps is None:
            self.steps = self.run.steps(self.progress)
        with self.stream.in_use():
            try:
                self.step = next(self.steps, None)
            except _OF_ONE_TASK as error:
                self.step, self.failure = None, error


class _Training:
    """All that several tasks share while they train."""

    def __init__(
        self,
        configs: Mapping[str, FinetuneConfig],
        splits: Mapping[str, Mapping[str, Samples]],
        largest_batch: int,
        resume: bool,
        talk: bool,
        held: contextlib.ExitStack,
    ) -> None:
        self.largest_batch, self.talk, self.count = largest_batch, talk, len(configs)
        first = next(iter(configs.values()))
        self.accelerator = make_accelerator(first.train, cpu=first.cpu)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"finetune-many trains in one process; got {self.accelerator.num_processes}. Start one process a GPU, "
                "each with some of the tasks"
            )
        prepared = self._prepare(configs, splits)
        if talk:
            _introduce(prepared)
        for name, each in prepared.items():
            with _of_task(name):
                take_folder(Path(each.config.out), held)
        found = {name: look_for_run(Path(each.config.out), resume) for name, each in prepared.items()}
        for model in (self.bank.model, *(each.model for each in prepared.values())):
            held.enter_context(fastest_attention(model, self.accelerator, self.image_size))
        self.bars = make_progress(enabled=talk)
        self.tasks = [self._start(name, each, found[name]) for name, each in prepared.items()]
        folder = Path(first.out).parent
        checkpoint.require_space(folder, sum(task.run.space for task in self.tasks))
        # Tasks whose vectors have the same shapes are adjacent in every batch, which the bank then need not sort.
        forms = [self.bank.hold(task.name).task.form for task in self.tasks]
        self.tasks.sort(key=lambda task: forms.index(self.bank.hold(task.name).task.form))
        models = {task.name: task.prepared.model for task in self.tasks}
        self.drops = TaskDrops(self.bank.model, models, {task.name: task.stream for task in self.tasks})
        self.bank.model.train()
        for module in self.bank.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics are part of the backbone
        for task in self.tasks:
            describe_run(task.prepared.config, task.accelerator, found[task.name])
        self.checked_draws = False

    def _prepare(
        self, configs: Mapping[str, FinetuneConfig], splits: Mapping[str, Mapping[str, Samples]]
    ) -> dict[str, PreparedRun]:
        """Makes each task's model as a fine-tune alone makes it, and puts it into the bank."""
        prepared: dict[str, PreparedRun] = {}
        for name, config in configs.items():
            with _of_task(name):
                each = prepare(config, splits.get(name))
                size = each.task.preprocessing.image_size
                if not prepared:
                    self.image_size = size
                    plain, _ = create_model(
                        config.model, len(each.task.classes), image_size=size, weights=config.weights
                    )
                    self.bank = AdapterBank(plain.to(self.accelerator.device))
                elif size != self.image_size:
                    raise ValueError(f"its images have {size} pixels, those of the first task {self.image_size}")
                first = next(iter(prepared.values()), each)
                if each.digests["backbone_digest"] != first.digests["backbone_digest"]:
                    raise ValueError(
                        "its backbone has other weights than that of the first task; a random start (--weights none) "
                        "depends on the number of classes: save one to a file and give that"
                    )
                prepared[name] = dataclasses.replace(each, model=self._banked(name, each))
        check_splits([each.splits for each in prepared.values() if each.config.check], self.talk)
        return prepared

    def _banked(self, name: str, prepared: PreparedRun) -> nn.Module:
        tensors, others = trained_tensors(prepared.model)
        if others:
            raise ValueError(f"it trains more than adapter and head: {shorten(others)}")
        assert isinstance(prepared.method, RLRRConfig)
        self.bank.add(name, AdapterState(prepared.method, tensors))
        model = self.bank.trainable(name)
        if prepared.config.drop is not None:
            set_drop(model, prepared.config.drop, prepared.config.drop_kind)
        return model

    def _start(self, name: str, prepared: PreparedRun, found: bool) -> _TaskRun:
        config, model, sets = prepared.config, prepared.model, prepared.sets()
        training = config.train
        if training.workers is None and self.accelerator.device.type != "cpu":
            training = dataclasses.replace(training, workers=(os.cpu_count() or 1) // self.count)
        accelerator = make_accelerator(config.train, cpu=config.cpu)  # of each: the scale of fp16 gradients is in it
        stream = RandomStream()
        with _of_task(name), stream.in_use():
            run = Run(
                model,
                optimizer_groups(model, config.lr, config.weight_decay),
                sets["train"],
                sets[prepared.config.deciding],
                training,
                Path(config.out),
                accelerator,
                prepared.identity,
            )
            if found:
                run.load()
        progress = TaskProgress(
            self.bars, name, config.train.epochs, chosen_on=config.epoch_chosen_on, enabled=self.talk
        )
        return _TaskRun(name, prepared, sets, accelerator, run, stream, progress)

    def run(self) -> dict[str, dict[str, Any]]:
        """Trains all tasks to their end."""
        results: dict[str, dict[str, Any]] = {}
        moved, said = self.tasks, False
        with self.bars:
            while True:
                for task in moved:
                    task.advance()
                    if task.step is None:
                        self._end(task, results)
                waiting = [task for task in self.tasks if task.step is not None]
                if not waiting:
                    break
                behind = min(task.run.record.steps for task in waiting)
                moved = [task for task in waiting if task.run.record.steps == behind]
                for part in _parts(moved, self.largest_batch):
                    self._compute(part)
                if not said and all(task.progress.expected for task in waiting):
                    said = True
                    self._say_expected(max(task.progress.expected for task in waiting))
        _raise_failures([task for task in self.tasks if task.failure is not None], len(self.tasks))
        return results

    def _compute(self, tasks: Sequence[_TaskRun]) -> None:
        """The losses of the batches of ``tasks`` and all their gradients, in one forward and one backward."""
        steps = [task.step for task in tasks if task.step is not None]
        sizes = [len(step.images) for step in steps]
        names = [task.name for task, size in zip(tasks, sizes, strict=True) for _ in range(size)]
        self.drops.segments = [(task.name, size) for task, size in zip(tasks, sizes, strict=True)]
        before = None if self.checked_draws else _states()
        with self.bank.tasks(names):
            with self.accelerator.autocast():
                logits = self.bank.model(torch.cat([step.images for step in steps]))
            if before is not None and any(not torch.equal(*pair) for pair in zip(before, _states(), strict=True)):
                raise ValueError(
                    f"{type(self.bank.model).__name__} draws random numbers for all tasks at once where it is neither "
                    "nn.Dropout nor timm's DropPath: a task would not get those that it gets alone; train its tasks by "
                    "rlrr finetune"
                )
            self.checked_draws = True
            total: Any = 0
            for task, step, rows in zip(tasks, steps, logits.split(sizes), strict=True):
                step.loss = task.run.loss(rows[:, : task.run.classes].float(), step.targets)
                share, scaler = step.share * step.loss, task.accelerator.scaler
                total = total + (share if scaler is None else scaler.scale(share))
            total.backward()

    def _end(self, task: _TaskRun, results: dict[str, dict[str, Any]]) -> None:
        task.progress.remove()
        if task.failure is None:
            try:
                conclude(task.prepared, task.sets, task.run.finish(), task.accelerator, talk=False)
                result = read_result(task.prepared.config.out / RESULT)
                if result is None:
                    raise OSError(
                        f"{task.prepared.config.out / RESULT} could not be written; the training is safe, run it again "
                        "with --resume"
                    )
                results[task.name] = result
            except _OF_ONE_TASK as error:
                task.failure = error
        if task.failure is not None:
            task.progress.warn(str(task.failure))
        elif self.talk:
            task.progress.say(f"finished; epoch {results[task.name]['epoch']} is kept in {task.prepared.config.out}")

    def _say_expected(self, seconds: float) -> None:
        if self.talk and (text := time_to_go(seconds)) is not None:
            self.bars.console.print(text, highlight=False)


def _parts(tasks: Sequence[_TaskRun], largest: int) -> Iterator[list[_TaskRun]]:
    """``tasks`` in lists whose batches have at most ``largest`` images together, or are one alone."""
    part: list[_TaskRun] = []
    count = 0
    for task in tasks:
        size = 0 if task.step is None else len(task.step.images)
        if part and count + size > largest:
            yield part
            part, count = [], 0
        part.append(task)
        count += size
    yield part


def _states() -> tuple[torch.Tensor, ...]:
    """Of torch's generators."""
    return torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def _check(configs: Mapping[str, FinetuneConfig], largest_batch: int) -> None:
    """Raises ``ValueError`` unless the tasks can be trained together."""
    if not configs:
        raise ValueError("configs must name at least one task; got none")
    if largest_batch < 1:
        raise ValueError(f"largest_batch must be at least 1; got {largest_batch}")
    first_name, first = next(iter(configs.items()))
    folders: dict[Path, str] = {}
    for name, config in configs.items():
        for setting, (needed, why) in _NOT_HERE.items():
            if (value := _get(config, setting)) != needed:
                short = setting.rpartition(".")[2]
                raise ValueError(f"task {name}: {short} must be {needed} in finetune-many ({why}); got {value}")
        for setting in ("model", "weights", "image_size", "cpu", "train.mixed_precision"):
            if (value := _get(config, setting)) != (theirs := _get(first, setting)):
                short = setting.rpartition(".")[2]
                raise ValueError(
                    f"{short} must be the same for all tasks; {first_name} has {theirs}, {name} has {value}"
                )
        other = folders.setdefault(Path(config.out).resolve(), name)
        if other != name:
            raise ValueError(f"out must be another folder for each task; {other} and {name} have {config.out}")


def _get(config: FinetuneConfig, setting: str) -> Any:
    return functools.reduce(getattr, setting.split("."), config)


def _finished(config: FinetuneConfig) -> dict[str, Any] | None:
    """The result of a run that ended with these settings; None where there is none, or one to go on with."""
    result = read_result(Path(config.out) / RESULT)
    return None if result is None or config.differing_settings(result["settings"]) else result


def _introduce(prepared: Mapping[str, PreparedRun]) -> None:
    first = next(iter(prepared.values()))
    size = first.task.preprocessing.image_size
    say(f"{first.task.model}, weights {first.task.weights}, {size} x {size} px; {len(prepared)} tasks")
    for name, each in prepared.items():
        counts = ", ".join(f"{len(samples):,} {split}" for split, samples in each.splits.items())
        say(
            f"{name}: {len(each.task.classes)} classes, {counts} images; {each.report.trained:,} parameters trained, "
            f"learning rate {each.config.lr:g}, {each.config.train.epochs} epochs"
        )


@contextlib.contextmanager
def _of_task(name: str) -> Iterator[None]:
    """Errors within name the task."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(f"task {name}: {error}") from error


def _raise_failures(failed: Sequence[_TaskRun], count: int) -> None:
    failures = [(task.name, task.failure) for task in failed if task.failure is not None]
    if failures:
        kind = FloatingPointError if any(isinstance(error, FloatingPointError) for _, error in failures) else OSError
        raise kind(
            f"{len(failures)} of {count} tasks failed, the others were trained to their end: "
            + "; ".join(f"{name}: {error}" for name, error in failures)
        )
