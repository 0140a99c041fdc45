"""``finetune``: from a timm model and a folder of images to an adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, recompute_activations
from rlrr_kernels.adapt.config import LAYER_KINDS, WITH_BIAS
from rlrr_kernels.ops.conv import CONV_LAYOUTS
from rlrr_kernels.train.config.files import check_types, read_config, write_config
from rlrr_kernels.train.config.train_config import CHANGES_NO_NUMBER, TrainConfig
from rlrr_kernels.train.data.folders import (
    ImageDataset,
    Samples,
    check_images,
    contradicting_images,
    find_splits,
    fingerprint,
    make_loader,
    shared_images,
)
from rlrr_kernels.train.data.preprocessing import AUGMENTATIONS, Preprocessing
from rlrr_kernels.train.evaluate import Scores, evaluate
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop.distributed import from_main, make_accelerator
from rlrr_kernels.train.loop.fit import fit
from rlrr_kernels.train.loop.record import FitResult
from rlrr_kernels.train.methods.baselines import (
    METHODS,
    TITLES,
    Baseline,
    BaselineReport,
    apply_method,
    check_method,
    optimizer_groups,
    recipe_of,
)
from rlrr_kernels.train.methods.files import save_trained
from rlrr_kernels.train.models.attention import fastest_attention
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, backbone_digest, check_model_name, create_model
from rlrr_kernels.train.models.drop import check_drop, set_drop
from rlrr_kernels.train.output.board import require_tensorboard
from rlrr_kernels.train.output.environment import add_session, environment
from rlrr_kernels.train.output.folder import check_free, hold, write_files
from rlrr_kernels.train.output.progress import say, track
from rlrr_kernels.train.plot import learning_curve
from rlrr_kernels.train.task import Task
from rlrr_kernels.writing import remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPES = ("auto", "paper", "layers")
CHOSEN_ON = ("validation", "test")
SHIFTS: dict[str, bool | str] = {"all": True, "with_bias": WITH_BIAS, "none": False}

_RLRR_ONLY = (
    "recipe",
    "init",
    "layers",
    "convs",
    "conv_layout",
    "sides",
    "residual",
    "shift",
    "form",
    "scale_grad_rows",
    "recompute",
)

_CHANGES_NO_NUMBER = ("out", "check", "cpu", "recompute", *(f"train.{name}" for name in CHANGES_NO_NUMBER))

ADAPTER, CONFIG, ENVIRONMENT = "adapter", "config.json", "environment.json"
RESULT, CURVE = "result.json", "learning_curve.png"

_FEW = 4
"""How many of many classes are named at either end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Args:
        model: the backbone's name in timm, e.g. vit_base_patch16_224.augreg_in21k.
        data: image folder: FOLDER/<class>/<image> or FOLDER/{train,val,test}/<class>/<image>; None: splits are passed.
        out: run folder: gets ``adapter/``, ``config.json``, ``environment.json``, ``checkpoint.pt``, ``result.json``
            and ``learning_curve.png``.
        weights: of the backbone: ``hub`` fetches them, ``none`` is a random start, anything else is a file
            (.safetensors, .pth, .npz).
        image_size: pixels; None: what the weights were made for.
        preprocessing: of the images, in place of what the weights were made for.
        method: ``rlrr``, or one to compare it with: ``probe``, ``full``, ``bias``, ``ssf``, ``lora``, ``dora`` or
            ``hira`` (:mod:`rlrr_kernels.train.methods.baselines`). Every method starts with a head of zeros.
        recipe: of RLRR: ``paper`` is all of the paper's recipe, ``layers`` the linear layers alone, ``auto`` the first
            where it is defined for the model.
        rank: of the adapter; None: 1 (the paper's) for rlrr, 8 for lora and dora (alpha = rank), 32 for hira.
        init: of RLRR's scales: ``paper``, ``identity`` or ``normal``.
        layers: linear layers that RLRR adapts: ``all``, ``attention``, ``mlp`` or ``qkv``.
        convs: name pattern of the convolutions that RLRR adapts beside these, * for all of a ResNet's; None: none.
        conv_layout: how their kernels are seen as matrices: ``out,in*kh*kw`` or ``out*kh,in*kw`` (the authors').
        sides: of RLRR's scales: ``both``, ``left`` (s_r alone) or ``right`` (s_c alone).
        residual: whether W' = W ⊙ (1 + s_r s_c) has the 1.
        shift: linear layers that train a shift: ``all``, ``none``, or ``with_bias``, those that have a bias: then plain
            timm loads what is merged.
        form: of RLRR's ΔW: ``rescaled`` (W ⊙ s_r s_c) or ``additive`` (s_r s_c).
        scale_grad_rows: share of the tokens that the gradients of RLRR's scales are estimated from: less time and
            memory, more noise; 1 is the exact gradient.
        recompute: of RLRR: compute GELU and normalised inputs again in the backward, which saves memory; equal results.
        drop: rate, in training, at which residual branches of the last block are dropped, rising from 0 over the
            depth; None: as timm makes the model (a Swin with stochastic depth of 0.1, most others with none).
        drop_kind: ``depth`` (stochastic depth) or ``branch`` (single elements, as the authors' ViT does); see
            :func:`rlrr_kernels.train.models.drop.set_drop`.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW, on s_r, s_c and the head's weight; for other methods on all but vectors.
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
    method: str = "rlrr"
    recipe: str = "auto"
    rank: int | None = None
    init: str = "paper"
    layers: str = "all"
    convs: str | None = None
    conv_layout: str = CONV_LAYOUTS[0]
    sides: str = "both"
    residual: bool = True
    shift: str = "all"
    form: str = "rescaled"
    scale_grad_rows: float = 1.0
    recompute: bool = False
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
        check_types(self)
        if str(self.weights) not in (HUB, NO_WEIGHTS):
            object.__setattr__(self, "weights", Path(self.weights))
        allowed = {"method": METHODS, "recipe": RECIPES, "augment": AUGMENTATIONS, "epoch_chosen_on": CHOSEN_ON}
        allowed |= {"layers": tuple(LAYER_KINDS), "shift": tuple(SHIFTS)}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be a finite number of at least 0; got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1; got {self.val_fraction}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1; got {self.image_size}")
        if self.preprocessing is not None and self.image_size not in (None, self.preprocessing.image_size):
            raise ValueError(
                f"image_size must be that of the preprocessing, {self.preprocessing.image_size}; got {self.image_size}"
            )
        check_drop(self.drop or 0.0, self.drop_kind)
        if self.method == "rlrr":
            _rlrr(self)
        else:
            Baseline(self.method, self.rank)
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _RLRR_ONLY:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} is a setting of rlrr; got {getattr(self, name)!r} for {self.method}")

    def settings(self) -> dict[str, Any]:
        """All settings that change a number, as JSON types, those of training as ``train.epochs``.

        Files and folders by their name alone, so that a result can be moved and shared.
        """
        values = dataclasses.asdict(self)
        values |= {f"train.{name}": value for name, value in values.pop("train").items()}
        for name in _CHANGES_NO_NUMBER:
            del values[name]
        for name in ("data", "weights"):
            values[name] = None if values[name] is None else Path(values[name]).name
        return json.loads(json.dumps(values))

    def differing_settings(self, written: Mapping[str, Any]) -> list[str]:
        """``name was X, is Y`` for every one of :meth:`settings` that is another in ``written``.

        A setting that did not exist when ``written`` was made had what is now its default.
        """
        defaults = FinetuneConfig(model="").settings()
        return [
            f"{name} was {theirs}, is {value}"
            for name, value in self.settings().items()
            if (theirs := written.get(name, defaults[name])) != value
        ]


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
    report: AdaptReport | BaselineReport
    fit: FitResult
    test: Scores | None


def finetune(
    config: FinetuneConfig,
    *,
    splits: Mapping[str, Samples] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes ``config.model`` and saves what was trained, as of the best epoch.

    Args:
        config: the run.
        splits: the images in place of a folder: ``train``, and ``val`` or ``test`` as ``config.epoch_chosen_on`` needs.
        resume: go on from the checkpoint in ``config.out`` where there is one. A run that has ended may get more
            epochs that way; else every setting that changes a number, the images (names, sizes, labels) and the
            backbone's weights have to be the same.
        quiet: print nothing.

    Raises:
        ValueError: bad input; or ``config.out`` holds a run and ``resume`` is not set, or another process is at it.
        FileNotFoundError, ConnectionError, OSError: as for what this function calls; where the adapter cannot be saved,
            the message says where it was saved instead, or how to get it out of the checkpoint.
    """
    out = Path(config.out)
    check_start(config)
    accelerator = make_accelerator(config.train, cpu=config.cpu)
    from_main(accelerator, lambda: check_free(out))
    found = from_main(accelerator, lambda: look_for_run(out, resume))
    talk = accelerator.is_main_process and not quiet
    prepared = prepare(config, splits)
    if config.check:  # last: it may take minutes, what comes before takes seconds
        from_main(accelerator, lambda: check_splits([prepared.splits], talk))
    if talk:
        _introduce(prepared, found, resume)
    with contextlib.ExitStack() as held:
        held.enter_context(fastest_attention(prepared.model, accelerator, prepared.task.preprocessing.image_size))
        from_main(accelerator, lambda: take_folder(out, held))
        found = from_main(accelerator, lambda: look_for_run(out, resume))  # another run may just have ended there
        sets = prepared.sets()
        result = fit(
            prepared.model,
            optimizer_groups(prepared.model, config.lr, config.weight_decay),
            sets["train"],
            sets[_deciding(config)],
            config.train,
            out,
            identity=prepared.identity,
            accelerator=accelerator,
            chosen_on=config.epoch_chosen_on,
            resume=found,
            started=lambda: from_main(accelerator, lambda: describe_run(config, accelerator, found)),
            quiet=quiet,
        )
        return conclude(prepared, sets, result, accelerator, talk)


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
            **_settings(self.config),
        }

    @property
    def deciding(self) -> str:
        """The split that the epoch is chosen on."""
        return _deciding(self.config)

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


def conclude(
    prepared: PreparedRun, sets: Mapping[str, ImageDataset], result: FitResult, accelerator: Accelerator, talk: bool
) -> FinetuneResult:
    """Saves what was trained, scores it on the test images and writes the results to the run's folder.

    Raises:
        OSError: as for :func:`finetune`.
    """
    config, model, task = prepared.config, prepared.model, prepared.task
    out = Path(config.out)
    adapter = out / ADAPTER
    if accelerator.is_main_process:  # first of all: whatever fails from here on, the work is kept
        _save(model, adapter, task, _metadata(config, task, accelerator, result, None), out)
    if config.epoch_chosen_on == "test":
        test = result.best
    else:
        test = _score(model, sets.get("test"), task, config.train.batch_size, accelerator, talk)
    if accelerator.is_main_process:
        if test is not None:
            _save(model, adapter, task, _metadata(config, task, accelerator, result, test), out)
        _write_result(config, _metadata(config, task, accelerator, result, test), prepared.report, result, talk)
    return FinetuneResult(model, adapter, task, prepared.report, result, test)


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
    return dataclasses.replace(_rlrr(config), recipe=recipe)


def _rlrr(config: FinetuneConfig) -> RLRRConfig:
    names = ("init", "sides", "residual", "form", "scale_grad_rows", "convs", "conv_layout")
    same = {name: getattr(config, name) for name in names}
    same |= {"include": LAYER_KINDS[config.layers], "shift": SHIFTS[config.shift]}
    return RLRRConfig(rank=1 if config.rank is None else config.rank, **same)


def _introduce(prepared: PreparedRun, found: bool, resume: bool) -> None:
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


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """What makes this training what it is and is neither in the task, the adaptation nor the ``TrainConfig``."""
    drop = {} if config.drop is None else {"drop": config.drop, "drop_kind": config.drop_kind}
    rows = {} if config.scale_grad_rows == 1 else {"scale_grad_rows": config.scale_grad_rows}
    return {"augment": config.augment, **drop, **rows}


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
        "method": config.method,
        "task": task.to_dict(),
        "training": dataclasses.asdict(config.train)
        | {"lr": config.lr, "weight_decay": config.weight_decay, **_settings(config)},
        "precision": accelerator.mixed_precision,
        "epoch": result.best_epoch,
        "epoch_chosen_on": config.epoch_chosen_on,
        "validation": dataclasses.asdict(result.best) if config.epoch_chosen_on == "validation" else None,
        "test": None if test is None else dataclasses.asdict(test),
    }


def _save(model: nn.Module, folder: Path, task: Task, metadata: dict[str, Any], out: Path) -> None:
    try:
        save_trained(model, folder, metadata=metadata, usage=task.usage())
    except OSError as error:
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"rlrr-adapter-{out.resolve().name}-"))  # nobody else's
            save_trained(model, elsewhere, metadata=metadata, usage=task.usage())
        except OSError:
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
            rescue = f"make room and run the same command with --resume: {out / checkpoint.NAME} holds the training"
        else:
            rescue = f"it was saved to {elsewhere} instead"
        raise OSError(error.errno, f"{error.strerror}; {rescue}", str(folder)) from error


def describe_run(config: FinetuneConfig, accelerator: Accelerator, resume: bool) -> None:
    """Writes the settings and the environment of this session to the run's folder."""
    out = Path(config.out)
    files = {ENVIRONMENT: add_session(out / ENVIRONMENT, environment(accelerator), resumed=resume)}
    if not resume or _epochs_of(out / CONFIG) != config.train.epochs:  # a run may be given more epochs
        files[CONFIG] = write_config(config)
    write_files(out, files)


def _epochs_of(file: Path) -> int | None:
    try:
        return read_config(FinetuneConfig, file).train.epochs
    except (OSError, ValueError):
        return None


def _write_result(
    config: FinetuneConfig,
    metadata: dict[str, Any],
    report: AdaptReport | BaselineReport,
    result: FitResult,
    talk: bool,
) -> None:
    out, title = Path(config.out), f"{metadata['task']['model']}, {TITLES[config.method]}"
    document = metadata | {
        "settings": config.settings(),
        "trained_parameters": report.trained,
        "adapter_parameters": report.adapter,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory,
        "exchanged_bytes_per_step": result.exchanged,
        "extended_from_epochs": list(result.extended),
        "history": result.history,
    }
    try:
        write_files(out, {RESULT: json.dumps(document, indent=2).encode()})
        learning_curve(result, out / CURVE, title, chosen_on=metadata["epoch_chosen_on"])
    except OSError as error:  # the adapter is safe already
        if talk:
            warnings.warn(f"not all of the results could be written: {error}", stacklevel=2)
