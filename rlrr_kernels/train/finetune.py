"""``finetune``: from a timm model and a folder of images to an adapter folder."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, adapt_model, parameter_groups, save_adapter
from rlrr_kernels.adapt.files import write_together
from rlrr_kernels.adapt.recipe import paper_recipe
from rlrr_kernels.train import checkpoint
from rlrr_kernels.train.config import TrainConfig
from rlrr_kernels.train.config_file import write_config
from rlrr_kernels.train.data import ImageDataset, Samples, check_images, find_splits, make_loader
from rlrr_kernels.train.drop import check_drop, set_drop
from rlrr_kernels.train.environment import add_session, environment
from rlrr_kernels.train.evaluate import Scores, evaluate
from rlrr_kernels.train.loop import FitResult, fit, make_accelerator
from rlrr_kernels.train.model import HUB, NO_WEIGHTS, check_model_name, create_model
from rlrr_kernels.train.plot import learning_curve
from rlrr_kernels.train.preprocessing import AUGMENTATIONS, Preprocessing
from rlrr_kernels.train.progress import console, track
from rlrr_kernels.train.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPES = ("auto", "paper", "layers")
CHOSEN_ON = ("validation", "test")

ADAPTER, CONFIG, ENVIRONMENT = "adapter", "config.json", "environment.json"
RESULT, CURVE = "result.json", "learning_curve.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Args:
        model: timm's name of the backbone, e.g. vit_base_patch16_224.augreg_in21k.
        data: image folder: FOLDER/<class>/<image> or FOLDER/{train,val,test}/<class>/<image>; None: splits are passed.
        out: run folder: gets ``adapter/``, ``config.json``, ``environment.json``, ``checkpoint.pt``, ``result.json``
            and ``learning_curve.png``.
        weights: of the backbone: ``hub`` fetches them, ``none`` is a random start, anything else is a file
            (.safetensors, .pth, .npz).
        image_size: pixels; None: what the weights were made for.
        preprocessing: of the images, in place of what the weights were made for.
        recipe: ``paper`` is all of the paper's recipe, ``layers`` the linear layers alone, ``auto`` the first where it
            is defined for the model.
        rank: of the scales; 1 is the paper's RLRR.
        init: of the scales: ``paper``, ``identity`` or ``normal``.
        drop: rate, in training, at which residual branches of the last block are dropped, rising from 0 over the
            depth; None leaves the model as timm makes it (a Swin with stochastic depth of 0.1, most others with none).
        drop_kind: ``depth`` (stochastic depth) or ``branch`` (single elements, as the authors' ViT does); see
            :func:`rlrr_kernels.train.drop.set_drop`.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW, on s_r, s_c and the head's weight.
        augment: of the training images: ``none``, ``flip``, ``crop`` (at random, and flip) or ``timm`` (random crops,
            flips, colours).
        val_fraction: share of the training images to choose the epoch by, where the folder has no ``val``.
        epoch_chosen_on: images the epoch is chosen by, ``validation`` or ``test``. The second makes the test score an
            optimistic one; the history's ``val_`` entries are then of the test images, and the result says so.
        check: whether every image is decoded once before the training.
        cpu: leave a GPU alone.
        train: the rest.

    Raises:
        ValueError: a value is not allowed.
    """

    model: str
    data: Path | None = None
    out: Path = Path("runs/finetune")
    weights: str | Path = HUB
    image_size: int | None = None
    preprocessing: Preprocessing | None = None
    recipe: str = "auto"
    rank: int = 1
    init: str = "paper"
    drop: float | None = None
    drop_kind: str = "depth"
    lr: float = 3e-3
    weight_decay: float = 5e-5
    augment: str = "flip"
    val_fraction: float = 0.2
    epoch_chosen_on: str = "validation"
    check: bool = True
    cpu: bool = False
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if str(self.weights) not in (HUB, NO_WEIGHTS):
            object.__setattr__(self, "weights", Path(self.weights))
        for name, choices in (("recipe", RECIPES), ("augment", AUGMENTATIONS), ("epoch_chosen_on", CHOSEN_ON)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0; got {value}")
        if self.preprocessing is not None and self.image_size not in (None, self.preprocessing.image_size):
            raise ValueError(
                f"image_size must be that of the preprocessing, {self.preprocessing.image_size}; got {self.image_size}"
            )
        check_drop(self.drop or 0.0, self.drop_kind)


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What came of it.

    Attributes:
        model: adapted, with the best epoch's tensors. adapter: the folder it is saved in. task: what it classifies.
        report: of the adaptation. fit: of the training. test: scores on the test images; None without any; equal to
            ``fit.best`` where the epoch was chosen on them.
    """

    model: nn.Module
    adapter: Path
    task: Task
    report: AdaptReport
    fit: FitResult
    test: Scores | None


def finetune(
    config: FinetuneConfig,
    *,
    splits: Mapping[str, Samples] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes ``config.model`` by RLRR and saves the adapter of the best epoch.

    Args:
        config: the run.
        splits: the images in place of a folder: ``train``, and ``val`` or ``test`` as ``config.epoch_chosen_on`` needs.
        resume: go on from the checkpoint in ``config.out`` where there is one.
        quiet: print nothing.

    Raises:
        ValueError: bad input; or ``config.out`` holds a run and ``resume`` is not set.
        FileNotFoundError, ConnectionError, OSError: as for what this function calls; where the adapter cannot be saved,
            the message says where it was saved instead, or how to get it out of the checkpoint.
    """
    out = Path(config.out)
    check_model_name(config.model)
    resume = _look_for_run(out, resume)
    accelerator = make_accelerator(config.train, cpu=config.cpu)
    talk = accelerator.is_main_process and not quiet
    splits = _splits(config, splits)
    if config.check and accelerator.is_main_process:
        paths = list(dict.fromkeys(path for samples in splits.values() for path in samples.paths))
        check_images(paths, lambda items, total: track(items, total, "checking images", enabled=talk))
    torch.manual_seed(config.train.seed)
    model, preprocessing = create_model(
        config.model,
        len(splits["train"].classes),
        image_size=config.preprocessing.image_size if config.preprocessing else config.image_size,
        weights=config.weights,
    )
    preprocessing = config.preprocessing or preprocessing
    if config.drop is not None:
        set_drop(model, config.drop, config.drop_kind)
    weights = str(config.weights) if str(config.weights) in (HUB, NO_WEIGHTS) else Path(config.weights).name
    task = Task(config.model, weights, splits["train"].classes, preprocessing)
    adaptation = RLRRConfig(recipe=_recipe(config, model), rank=config.rank, init=config.init)
    report = adapt_model(model, adaptation)
    if talk:
        _introduce(config, task, splits, report, resume)
    if accelerator.is_main_process:
        _describe_run(out, config, accelerator, resume)
    sets = {split: ImageDataset(samples, preprocessing.transform()) for split, samples in splits.items()}
    sets["train"] = ImageDataset(splits["train"], preprocessing.transform(config.augment), config.train.seed)
    result = fit(
        model,
        parameter_groups(model, config.lr, config.weight_decay),
        sets["train"],
        sets[_deciding(config)],
        config.train,
        out,
        identity={
            "task": task.to_dict(),
            "adaptation": adaptation.to_dict(),
            "epoch_chosen_on": config.epoch_chosen_on,
            **_settings(config),
        },
        accelerator=accelerator,
        resume=resume,
        quiet=quiet,
    )
    adapter = out / ADAPTER
    if accelerator.is_main_process:  # first of all: whatever fails from here on, the work is kept
        _save(model, adapter, _metadata(config, task, accelerator, result, None), out)
    if config.epoch_chosen_on == "test":
        test = result.best
    else:
        test = _score(model, sets.get("test"), task, config.train.batch_size, accelerator, talk)
    if accelerator.is_main_process:
        if test is not None:
            _save(model, adapter, _metadata(config, task, accelerator, result, test), out)
        _write_result(out, _metadata(config, task, accelerator, result, test), report, result, talk)
    return FinetuneResult(model, adapter, task, report, result, test)


def _deciding(config: FinetuneConfig) -> str:
    """The split that the epoch is chosen on."""
    return "test" if config.epoch_chosen_on == "test" else "val"


def _splits(config: FinetuneConfig, given: Mapping[str, Samples] | None) -> dict[str, Samples]:
    if (given is None) == (config.data is None):
        raise ValueError("give either config.data, an image folder, or splits=; got " + ("both", "none")[given is None])
    splits = given
    if given is None:
        splits = find_splits(config.data, val_fraction=config.val_fraction, seed=config.train.seed)
    missing = [name for name in ("train", _deciding(config)) if name not in splits]
    if missing:
        raise ValueError(
            f"the epoch is chosen on {config.epoch_chosen_on} images, which needs the splits train and "
            f"{_deciding(config)}; got {', '.join(splits) or 'none'}"
        )
    for name, samples in splits.items():
        if samples.classes != splits["train"].classes:
            raise ValueError(f"the split {name} has other classes than the split train")
        if not samples.paths:
            raise ValueError(f"the split {name} holds no image")
    return dict(splits)


def _look_for_run(out: Path, resume: bool) -> bool:
    """Whether there is a run in ``out`` to go on with."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the run folder {out} is a file")
    if not (out / checkpoint.NAME).exists():
        return False
    if not resume:
        raise ValueError(f"{out} holds a run already; go on with it with --resume, or choose another folder with --out")
    return True


def _recipe(config: FinetuneConfig, model: nn.Module) -> str | None:
    if config.recipe != "auto":
        return None if config.recipe == "layers" else config.recipe
    try:
        paper_recipe(model)
    except ValueError:
        return None
    return "paper"


def _introduce(config, task: Task, splits: dict[str, Samples], report: AdaptReport, resume: bool) -> None:
    counts = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.items())
    size = task.preprocessing.image_size
    console.print(f"[bold]{task.model}[/bold], weights {task.weights}, {size} x {size} px", highlight=False)
    place = "" if config.data is None else f"{config.data}: "
    console.print(f"{place}{len(task.classes)} classes, {counts} images", highlight=False)
    if config.epoch_chosen_on == "test":
        console.print("the epoch is chosen on the test images: an optimistic score")
    console.print(
        f"RLRR on {len(report.layers)} linear layers: {report.trained:,} of {report.total:,} parameters trained "
        f"({report.share:.2%})",
        highlight=False,
    )
    if resume:
        console.print(f"going on from {Path(config.out) / checkpoint.NAME}", highlight=False)


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """What makes this training what it is and is neither in the task, the adaptation nor the ``TrainConfig``."""
    drop = {} if config.drop is None else {"drop": config.drop, "drop_kind": config.drop_kind}
    return {"augment": config.augment, **drop}


def _score(model, test_set, task, batch_size, accelerator, talk) -> Scores | None:
    if test_set is None:
        return None
    loader = accelerator.prepare(make_loader(test_set, batch_size))
    return evaluate(
        model, loader, len(task.classes), accelerator, lambda batches: track(batches, len(loader), "test", enabled=talk)
    )


def _metadata(
    config: FinetuneConfig, task: Task, accelerator: Accelerator, result: FitResult, test: Scores | None
) -> dict[str, Any]:
    return {
        "task": task.to_dict(),
        "training": dataclasses.asdict(config.train)
        | {"lr": config.lr, "weight_decay": config.weight_decay, **_settings(config)},
        "precision": accelerator.mixed_precision,
        "epoch": result.best_epoch,
        "epoch_chosen_on": config.epoch_chosen_on,
        "validation": dataclasses.asdict(result.best) if config.epoch_chosen_on == "validation" else None,
        "test": None if test is None else dataclasses.asdict(test),
    }


def _save(model: nn.Module, folder: Path, metadata: dict[str, Any], out: Path) -> None:
    try:
        save_adapter(model, folder, metadata=metadata)
    except OSError as error:
        elsewhere = Path(tempfile.gettempdir()) / f"rlrr-adapter-{out.resolve().name}"
        try:
            save_adapter(model, elsewhere, metadata=metadata)
        except OSError:
            rescue = f"make room and run the same command with --resume: {out / checkpoint.NAME} holds the training"
        else:
            rescue = f"it was saved to {elsewhere} instead"
        raise OSError(error.errno, f"{error.strerror}; {rescue}", str(folder)) from error


def _describe_run(out: Path, config: FinetuneConfig, accelerator: Accelerator, resume: bool) -> None:
    session = add_session(out / ENVIRONMENT, environment(accelerator), resumed=resume)
    write_together(out, {CONFIG: write_config(config), ENVIRONMENT: session})


def _write_result(out: Path, metadata: dict[str, Any], report: AdaptReport, result: FitResult, talk: bool) -> None:
    document = metadata | {
        "trained_parameters": report.trained,
        "adapter_parameters": report.adapter,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory,
        "history": result.history,
    }
    try:
        write_together(out, {RESULT: json.dumps(document, indent=2).encode()})
        title = f"{metadata['task']['model']} fine-tuned by RLRR"
        learning_curve(result, out / CURVE, title, chosen_on=metadata["epoch_chosen_on"])
    except OSError as error:  # the adapter is safe already
        if talk:
            console.print(f"[yellow]warning:[/yellow] {error}", highlight=False)
