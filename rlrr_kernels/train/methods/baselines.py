"""The methods that RLRR is compared with, as one function from a timm model to a trainable one.

All train the head, zero-initialised as in RLRR's recipe, and beside it

* ``probe``: nothing;
* ``full``: everything timm trains;
* ``bias``: every bias (BitFit, Zaken et al., ACL 2022);
* ``ssf``: a scale and shift after every linear layer, convolution and LayerNorm (``ssf.py``);
* ``lora``, ``dora``, ``hira``: PEFT's layers on the linear layers that RLRR adapts. LoRA and DoRA take α = r, a factor
  of one before B A; HiRA has no such factor. PEFT's ranks are the default: 8, 8 and 32.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, adapt_model, adapt_report, is_adapted, parameter_groups
from rlrr_kernels.adapt.find import find_heads, under
from rlrr_kernels.adapt.model import plan_adaptation, unwrap, zero_linears
from rlrr_kernels.adapt.recipe import paper_recipe
from rlrr_kernels.adapt.report import ParameterCounts, describe_keys
from rlrr_kernels.train.methods.ssf import SSFPlaces, find_places, fold_ssf, put_ssf

METHODS = ("rlrr", "probe", "full", "bias", "ssf", "lora", "dora", "hira")

TITLES = {
    "rlrr": "RLRR",
    "probe": "linear probe",
    "full": "full fine-tuning",
    "bias": "bias only",
    "ssf": "SSF",
    "lora": "LoRA",
    "dora": "DoRA",
    "hira": "HiRA",
}

RANKS = {"lora": 8, "dora": 8, "hira": 32}

_ATTRIBUTE = "rlrr_baseline"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method other than RLRR.

    Args:
        method: one of :data:`METHODS` but ``rlrr``.
        rank: of ``lora``, ``dora`` and ``hira``; None: the default of :data:`RANKS`.

    Raises:
        ValueError: the method is unknown, or a rank is given that it does not have or is less than 1.
    """

    method: str
    rank: int | None = None

    def __post_init__(self) -> None:
        choices = METHODS[1:]
        if self.method not in choices:
            raise ValueError(f"method must be one of {', '.join(choices)}; got {self.method!r}")
        if self.method in RANKS:
            rank = RANKS[self.method] if self.rank is None else self.rank
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank must be an integer of at least 1; got {rank!r}")
            object.__setattr__(self, "rank", rank)
        elif self.rank is not None:
            raise ValueError(f"rank must be left out for method {self.method}, which has none; got {self.rank}")

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Baseline:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: an entry is missing, unknown or not allowed.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"a baseline must have the entries {', '.join(sorted(names))}; got {', '.join(values)}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class BaselineReport(ParameterCounts):
    """What :func:`apply_method` made of a model.

    Attributes:
        method: its name. layers: the linear layers with an adapter on them; none for probe, full and bias.
        heads: modules trained as they are. adapter, head, total: see
            :class:`rlrr_kernels.adapt.report.ParameterCounts`.
    """

    method: str
    layers: tuple[str, ...]
    heads: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AppliedBaseline:
    """What was done to a model, by name; see :func:`baseline_of`.

    Attributes:
        baseline: as given. layers: linear layers with an adapter. linears: all linear layers beside the head, as they
            were called before. heads: modules trained as they are. patched: layers whose parent's
            ``qkv_bias_separate`` was switched on. places: of SSF, None for the other methods.
    """

    baseline: Baseline
    layers: tuple[str, ...]
    linears: tuple[str, ...]
    heads: tuple[str, ...]
    patched: tuple[str, ...]
    places: SSFPlaces | None


@dataclasses.dataclass(frozen=True)
class BaselineMergeReport:
    """What :func:`merge_baseline` folded: names of modules, and state-dict keys that the backbone does not have."""

    method: str
    folded: tuple[str, ...]
    gained: tuple[str, ...]

    def __str__(self) -> str:
        what = f"merged into {len(self.folded)} modules" if self.folded else "a plain model already, nothing to merge"
        return f"{TITLES[self.method]}: {what}\n{describe_keys(self.gained)}"


def check_method(name: str) -> None:
    """Raises ``ValueError`` for an unknown method, ``ImportError`` when the package it needs is missing."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    if name in RANKS and importlib.util.find_spec("peft") is None:
        raise ImportError(f"method {name} needs the package peft: pip install 'rlrr-kernels[baselines]'")


def apply_method(model: nn.Module, method: RLRRConfig | Baseline) -> AdaptReport | BaselineReport:
    """Makes ``model`` trainable by ``method``, in place: adapter, frozen and trained parameters, a head of zeros.

    Raises:
        ValueError: as for :func:`rlrr_kernels.adapt_model`; or the model has no head, or no bias for method bias.
        ImportError: peft is missing.
    """
    if isinstance(method, RLRRConfig):
        _require_layers(model, method)
        adapt_model(model, method)
        for name in find_heads(model, method):
            zero_linears(model.get_submodule(name))
        return adapt_report(model)
    check_method(method.method)
    applied = _plan(model, method)
    _apply(model, applied)
    return baseline_report(model)


def _require_layers(model: nn.Module, config: RLRRConfig) -> None:
    """Raises ``ValueError`` where all that could be adapted are convolutions, and these were not asked for."""
    heads = find_heads(model, config)
    kinds = [type(module) for name, module in model.named_modules() if not under(name, heads)]
    if nn.Conv2d in kinds and not any(issubclass(kind, nn.Linear) for kind in kinds) and not config.convs:
        raise ValueError(
            f"{type(model).__name__} has no linear layer beside its head; adapt its convolutions with convs='*' "
            "(--convs '*')"
        )


def recipe_of(model: nn.Module) -> str | None:
    """``paper`` where the paper's recipe is defined for ``model``, else None."""
    try:
        paper_recipe(model)
    except ValueError:
        return None
    return "paper"


def _plan(model: nn.Module, baseline: Baseline) -> AppliedBaseline:
    config = RLRRConfig(recipe=recipe_of(model))
    heads = tuple(find_heads(model, config))
    if not heads:
        raise ValueError(f"method {baseline.method} needs a head to train; {type(model).__name__} has none")
    linears = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    )
    layers = patched = ()
    places = None
    if baseline.method in (*RANKS, "ssf") and not linears:
        raise ValueError(
            f"method {baseline.method} adapts linear layers; {type(model).__name__} has none beside its head. Its "
            "convolutions can be trained by rlrr with convs='*' (--convs '*'), or by full or bias"
        )
    if baseline.method in (*RANKS, "ssf"):
        plan = plan_adaptation(model, config)
        layers, patched = plan.layers, plan.patched
    if baseline.method == "ssf":
        places = find_places(model, layers, heads)
    if baseline.method == "bias" and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise ValueError(f"method bias needs a model with biases; {type(model).__name__} has none")
    return AppliedBaseline(baseline, layers, linears, heads, patched, places)


def _apply(model: nn.Module, applied: AppliedBaseline) -> None:
    method = applied.baseline.method
    if method != "full":
        model.requires_grad_(False)
    if method == "bias":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method == "ssf":
        put_ssf(model, applied.places)
    elif method in RANKS:
        _inject(model, applied)
    for name in applied.patched:
        model.get_submodule(name.rpartition(".")[0]).qkv_bias_separate = True
    for name in applied.heads:
        head = model.get_submodule(name).requires_grad_(True)
        zero_linears(head)
    setattr(model, _ATTRIBUTE, applied)


def _inject(model: nn.Module, applied: AppliedBaseline) -> None:
    import peft

    method, rank = applied.baseline.method, applied.baseline.rank
    targets = list(applied.layers)
    if method == "hira":
        config = peft.HiraConfig(r=rank, target_modules=targets)
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=method == "dora", target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    reached = [name for name in targets if hasattr(model.get_submodule(name), "get_base_layer")]
    if reached != targets:
        raise ValueError(f"peft put {method} on {len(reached)} of {len(targets)} layers")


def is_baseline(model: nn.Module) -> bool:
    """Whether :func:`apply_method` made ``model`` a baseline, and it was not merged since."""
    return getattr(unwrap(model), _ATTRIBUTE, None) is not None


def baseline_of(model: nn.Module) -> AppliedBaseline:
    """What :func:`apply_method` did to ``model``.

    Raises:
        ValueError: the model is no baseline.
    """
    if not is_baseline(model):
        raise ValueError(f"model ({type(model).__name__}) was not prepared by a baseline method")
    return getattr(unwrap(model), _ATTRIBUTE)


def baseline_report(model: nn.Module) -> BaselineReport:
    """Names and counts of a baseline's model.

    Raises:
        ValueError: the model is no baseline.
    """
    applied, model = baseline_of(model), unwrap(model)
    head = {id(p) for name in applied.heads for p in model.get_submodule(name).parameters()}
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    of_head = sum(p.numel() for p in parameters if id(p) in head)
    return BaselineReport(
        method=applied.baseline.method,
        layers=applied.layers,
        heads=applied.heads,
        adapter=trained - of_head,
        head=of_head,
        total=sum(p.numel() for p in parameters),
    )


def optimizer_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as groups for AdamW: RLRR's by their role, see :func:`rlrr_kernels.parameter_groups`.

    For all other methods timm's rule: what has one dimension or is called bias does not decay, nor what the model's
    ``no_weight_decay`` names; everything else decays.
    """
    if is_adapted(model):
        return parameter_groups(model, lr, weight_decay)
    from timm.optim import param_groups_weight_decay

    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    return [group | {"lr": lr} for group in groups]


@torch.no_grad()
def merge_baseline(model: nn.Module) -> BaselineMergeReport:
    """Folds a baseline's adapter into the weights, in place, and leaves a plain model.

    LoRA, DoRA and HiRA merge by PEFT's layers, SSF folds into the operation before it; probe, full and bias are plain
    models already.

    Returns:
        What was folded, and the keys that were gained.

    Raises:
        ValueError: the model is no baseline, or a trained parameter is not finite (named); nothing is changed.
    """
    applied, model = baseline_of(model), unwrap(model)
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise ValueError(f"trained parameters that are not finite cannot be merged: {', '.join(broken)}")
    folded: tuple[str, ...] = ()
    gained: tuple[str, ...] = ()
    if applied.places is not None:
        folded = (*applied.places.outputs, *applied.places.norms)
        gained = tuple(f"{name}.bias" for name in folded if model.get_submodule(name).bias is None)
        fold_ssf(model, applied.places)
    elif applied.layers:
        folded = applied.layers
        for name in folded:
            layer = model.get_submodule(name)
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        del model.peft_config
    for name in applied.patched:
        attention = model.get_submodule(name.rpartition(".")[0])
        attention.qkv_bias_separate = attention.qkv.bias is not None
    delattr(model, _ATTRIBUTE)
    return BaselineMergeReport(applied.baseline.method, folded, gained)
