"""``FinetuneConfig``: the settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.adapt import RLRRConfig
from rlrr_kernels.adapt.config import LAYER_KINDS, WITH_BIAS
from rlrr_kernels.ops.conv import CONV_LAYOUTS
from rlrr_kernels.train.config.files import check_types
from rlrr_kernels.train.config.train_config import CHANGES_NO_NUMBER, TrainConfig
from rlrr_kernels.train.data.preprocessing import AUGMENTATIONS, Preprocessing
from rlrr_kernels.train.methods.baselines import METHODS, Baseline
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS
from rlrr_kernels.train.models.drop import check_drop

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
            self.rlrr()
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

    def rlrr(self) -> RLRRConfig:
        """The adaptation that ``method`` rlrr asks for, but for its recipe."""
        names = ("init", "sides", "residual", "form", "scale_grad_rows", "convs", "conv_layout")
        same = {name: getattr(self, name) for name in names}
        same |= {"include": LAYER_KINDS[self.layers], "shift": SHIFTS[self.shift]}
        return RLRRConfig(rank=1 if self.rank is None else self.rank, **same)

    @property
    def deciding(self) -> str:
        """The split that the epoch is chosen on."""
        return "test" if self.epoch_chosen_on == "test" else "val"

    def image_and_gradient_settings(self) -> dict[str, Any]:
        """What makes this training what it is and is neither in the task, the adaptation nor the ``TrainConfig``."""
        drop = {} if self.drop is None else {"drop": self.drop, "drop_kind": self.drop_kind}
        rows = {} if self.scale_grad_rows == 1 else {"scale_grad_rows": self.scale_grad_rows}
        return {"augment": self.augment, **drop, **rows}
