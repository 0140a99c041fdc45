"""A run before its first step: what can stop it is told, images and model are made ready."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, recompute_activations
from rlrr_kernels.train.config.files import read_config, write_config
from rlrr_kernels.train.data.folders import (
    ImageDataset,
    Samples,
    check_images,
    contradicting_images,
    find_splits,
    fingerprint,
    shared_images,
)
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.methods.baselines import (
    TITLES,
    Baseline,
    BaselineReport,
    apply_method,
    check_method,
    recipe_of,
)
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, backbone_digest, check_model_name, create_model
from rlrr_kernels.train.models.drop import set_drop
from rlrr_kernels.train.output.board import require_tensorboard
from rlrr_kernels.train.output.environment import add_session, environment
from rlrr_kernels.train.output.folder import ADAPTER, CONFIG, ENVIRONMENT, hold
from rlrr_kernels.train.output.progress import say, track
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.task import Task
from rlrr_kernels.writing import remove_leftovers, write_together

if TYPE_CHECKING:
    from accelerate import Accelerator

_FEW = 4
"""How many of many classes are named at either end."""


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run before its first step.

    Attributes:
        config: the run. splits: its images. model: adapted, at the start of its training. task: what it will classify.
        method: how it is adapted. report: of the adaptation. digests: of images and backbone.
    """

    config: FinetuneConfig
    splits: Mapping[str, Samples]
    model: nn.Module
    task: Task
    method: RLRRConfig | Baseline
    report: AdaptReport | BaselineReport
    digests: Mapping[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run what it is, beside its ``TrainConfig``: see :func:`rlrr_kernels.train.loop.fit.fit`."""
        return {
            "method": self.config.method,
            "task": self.task.to_dict(),
            "adaptation": self.method.to_dict(),
            "epoch_chosen_on": self.config.epoch_chosen_on,
            **self.digests,
            **self.config.image_and_gradient_settings(),
        }

    def sets(self) -> dict[str, ImageDataset]:
        """The images by split as the model takes them; those of ``train`` augmented."""
        preprocessing, config = self.task.preprocessing, self.config
        sets = {split: ImageDataset(samples, preprocessing.transform()) for split, samples in self.splits.items()}
        train = ImageDataset(self.splits["train"], preprocessing.transform(config.augment), config.train.seed)
        return sets | {"train": train}


def check_start(config: FinetuneConfig) -> None:
    """Raises ``ValueError`` or ``ImportError`` where the model is unknown or a package is missing."""
    check_model_name(config.model)
    check_method(config.method)
    if config.train.tensorboard:
        require_tensorboard()


def prepare(config: FinetuneConfig, splits: Mapping[str, Samples] | None = None) -> PreparedRun:
    """Finds the images, makes the model and adapts it, drawing from the generators that ``config.train.seed`` seeds.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as for :func:`finetune`.
    """
    splits = _splits(config, splits)
    torch.manual_seed(config.train.seed)
    model, preprocessing = create_model(
        config.model,
        len(splits["train"].classes),
        image_size=config.preprocessing.image_size if config.preprocessing else config.image_size,
        weights=config.weights,
    )
    digests = {"images_digest": fingerprint(splits), "backbone_digest": backbone_digest(model)}
    preprocessing = config.preprocessing or preprocessing
    if config.drop is not None:
        set_drop(model, config.drop, config.drop_kind)
    weights = str(config.weights) if str(config.weights) in (HUB, NO_WEIGHTS) else Path(config.weights).name
    task = Task(config.model, weights, splits["train"].classes, preprocessing)
    method = _method(config, model)
    report = apply_method(model, method)
    if config.recompute:
        recompute_activations(model)
    return PreparedRun(config, splits, model, task, method, report, digests)


def _splits(config: FinetuneConfig, given: Mapping[str, Samples] | None) -> dict[str, Samples]:
    if (given is None) == (config.data is None):
        raise ValueError("give either config.data, an image folder, or splits=; got " + ("both", "none")[given is None])
    splits = given
    if given is None:
        splits = find_splits(config.data, val_fraction=config.val_fraction, seed=config.train.seed)
    missing = [name for name in ("train", config.deciding) if name not in splits]
    if missing:
        raise ValueError(
            f"the epoch is chosen on {config.epoch_chosen_on} images, which needs the splits train and "
            f"{config.deciding}; got {', '.join(splits) or 'none'}"
        )
    for name, samples in splits.items():
        if samples.classes != splits["train"].classes:
            raise ValueError(f"the split {name} has other classes than the split train")
        if not samples.paths:
            raise ValueError(f"the split {name} holds no image")
    return dict(splits)


def look_for_run(out: Path, resume: bool) -> bool:
    """Whether there is a run in ``out`` to go on with.

    Raises:
        ValueError: there is one and ``resume`` is not set, or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"the run folder {out} is a file")
    if not (out / checkpoint.NAME).exists():
        return False
    if not resume:
        raise ValueError(f"{out} holds a run already; go on with it with --resume, or choose another folder with --out")
    return True


def take_folder(out: Path, held: contextlib.ExitStack) -> None:
    """Makes the run folder, and keeps other runs out of it until ``held`` is closed."""
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(hold(out))
    remove_leftovers(out / ADAPTER)


def check_splits(datasets: Sequence[Mapping[str, Samples]], talk: bool) -> None:
    """Decodes all images once; warns of what is in two splits of one dataset, or in two classes of one split.

    Raises:
        ValueError: as for :func:`rlrr_kernels.train.data.folders.check_images`.
    """
    paths = [path for splits in datasets for samples in splits.values() for path in samples.paths]
    check_images(list(dict.fromkeys(paths)), functools.partial(track, description="checking images", enabled=talk))
    for shared in filter(None, map(shared_images, datasets)):
        first, second = shared[0]
        warnings.warn(
            f"{len(shared)} images are, byte for byte, in two splits, such as {first} and {second}: scores on them are "
            "too good",
            stacklevel=2,
        )
    for twice in filter(None, (contradicting_images(samples) for splits in datasets for samples in splits.values())):
        first, second = twice[0]
        warnings.warn(
            f"{len(twice)} images are, byte for byte, in two classes of one split, such as {first} and {second}: one "
            "of the two labels is wrong",
            stacklevel=2,
        )


def _method(config: FinetuneConfig, model: nn.Module) -> RLRRConfig | Baseline:
    if config.method != "rlrr":
        return Baseline(config.method, config.rank)
    recipe = {"auto": recipe_of(model), "layers": None}.get(config.recipe, config.recipe)
    return dataclasses.replace(config.rlrr(), recipe=recipe)


def introduce(prepared: PreparedRun, found: bool, resume: bool) -> None:
    """Says what is trained on what, and whether a run is gone on with."""
    config, task, splits, report = prepared.config, prepared.task, prepared.splits, prepared.report
    counts = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.items())
    size = task.preprocessing.image_size
    say(f"{task.model}, weights {task.weights}, {size} x {size} px")
    say(f"{'' if config.data is None else f'{config.data}: '}{len(task.classes)} classes, {counts} images")
    say(f"training images by class: {_by_class(splits['train'])}")
    if config.epoch_chosen_on == "test":
        say("the epoch is chosen on the test images: an optimistic score")
    where = f" on {len(report.layers)} layers" if report.layers else ""
    say(
        f"{TITLES[config.method]}{where}: {report.trained:,} of {report.total:,} parameters trained "
        f"({report.share:.2%})"
    )
    if found:
        say(f"going on from {Path(config.out) / checkpoint.NAME}")
    elif resume:
        say(f"{config.out} holds no run to go on with: one is started there")


def _by_class(samples: Samples) -> str:
    """How many images each class has: of all classes, or of the first and last few of many."""
    counts = Counter(samples.labels)
    shown = [f"{name} {counts[label]:,}" for label, name in enumerate(samples.classes)]
    if len(shown) > 2 * _FEW + 1:
        shown[_FEW:-_FEW] = ["..."]
    return ", ".join(shown)


def describe_run(config: FinetuneConfig, accelerator: Accelerator, resume: bool) -> None:
    """Writes the settings and the environment of this session to the run's folder."""
    out = Path(config.out)
    files = {ENVIRONMENT: add_session(out / ENVIRONMENT, environment(accelerator), resumed=resume)}
    if not resume or _epochs_of(out / CONFIG) != config.train.epochs:  # a run may be given more epochs
        files[CONFIG] = write_config(config)
    write_together(out, files)


def _epochs_of(file: Path) -> int | None:
    try:
        return read_config(FinetuneConfig, file).train.epochs
    except (OSError, ValueError):
        return None
