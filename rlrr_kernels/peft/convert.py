"""From a PEFT folder to an adapted model of this package, and back.

A PEFT adapter holds scales and shifts of linear layers, and whole modules (``modules_to_save``). The paper's recipe
also trains SSF's γ and β after norms and on patch tokens: as modules to save they are the norms and the patch
projection with γ and β folded in, and are found again as what those differ by from the backbone's.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save
from torch import Tensor, nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig
from rlrr_kernels.adapt.arithmetic import LAYER_PARTS
from rlrr_kernels.adapt.config import WITH_BIAS, matches
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.folder.files import CARD
from rlrr_kernels.adapt.folder.save_load import check_values, differences, misfit, trained_tensors
from rlrr_kernels.adapt.merge import folded_projection
from rlrr_kernels.adapt.model import (
    adapt_report,
    adaptation_of,
    apply_adaptation,
    head_tensors,
    plan_adaptation,
    planned_shapes,
)
from rlrr_kernels.adapt.modules import named_modules, named_tensors, unwrap
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.peft.config import RLRRPeftConfig
from rlrr_kernels.peft.registry import RLRR
from rlrr_kernels.peft.targets import exact_pattern, exactly
from rlrr_kernels.writing import write_together

_PREFIX = "base_model.model."
_TOLERANCE = 1e-4
"""Relative distance within which a saved norm or projection is a rescaled one of the backbone."""


def to_peft(model: nn.Module, folder: str | os.PathLike[str], *, task_type: str | None = None) -> RLRRPeftConfig:
    """Writes the adapter of an adapted model as PEFT's ``from_pretrained`` loads it over the same backbone.

    Args:
        model: after :func:`rlrr_kernels.adapt_model` or ``load_adapter``, of linear layers.
        folder: made where it is missing.
        task_type: PEFT's, such as ``SEQ_CLS``.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: the model is not adapted, or has adapted layers that PEFT's method has not (convolutions, the
            additive form), or trains more than adapter and head, or has layers named as a module to save is.
    """
    adaptation, model = adaptation_of(model), unwrap(model)
    modules: dict[str, Any] = dict(named_modules(model))
    beside = trained_tensors(model)[1]
    if beside:
        raise ValueError(f"trained beside adapter and head, which modules_to_save do not hold: {some(beside)}")
    other = [name for name in adaptation.layers if type(modules[name]) is not RLRRLinear]
    if other:
        raise ValueError(f"PEFT adapters hold RLRR of linear layers alone; these are others: {some(other)}")
    tensors = {
        f"{name}.rlrr_{part}": getattr(modules[name], part)
        for name in adaptation.layers
        for part in LAYER_PARTS
        if getattr(modules[name], part) is not None
    }
    saved = dict.fromkeys(adaptation.heads)
    tensors |= head_tensors(model, adaptation.heads)
    for name in [*adaptation.norms, *([adaptation.tokens] if adaptation.tokens else [])]:
        frozen, folded = _folded(modules, name)
        saved[frozen] = None
        tensors |= {f"{frozen}.{key}": tensor for key, tensor in folded.items()}
    also = [name for name in modules if name not in saved and name.endswith(tuple(saved))]  # as PEFT matches them
    also = [name for name in also if name != adaptation.tokens]  # folded into the projection
    tensors |= {name: tensor for name, tensor in head_tensors(model, also).items() if name not in tensors}
    config = adaptation.config
    groups = exact_pattern({name: modules[name].groups for name in adaptation.layers if modules[name].groups != 1})
    written = RLRRPeftConfig(
        r=config.rank,
        groups=1,
        groups_pattern=groups,
        shift=config.shift,
        residual=config.residual,
        sides=config.sides,
        init_weights=config.init,
        target_modules=exactly(adaptation.layers),
        modules_to_save=list(saved) or None,
        task_type=task_type,
        inference_mode=True,
    )
    lost = [name for name in adaptation.layers if not check_target_module_exists(written, name)]
    if lost:
        raise ValueError(
            f"modules_to_save {list(saved)} keep PEFT from layers with such a name in theirs: {some(lost)}"
        )
    folder = Path(folder)
    whole = {f"{_PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    contents = {}
    if not (folder / CARD).exists():
        contents[CARD] = b"---\nlibrary_name: peft\n---\n\n# RLRR adapter\n"
    with tempfile.TemporaryDirectory() as scratch:
        written.save_pretrained(scratch)
        contents[CONFIG_NAME] = (Path(scratch) / CONFIG_NAME).read_bytes()
    write_together(folder, contents | {SAFETENSORS_WEIGHTS_NAME: save(whole, {"format": "pt"})})
    return written


def _folded(modules: dict[str, Any], name: str) -> tuple[str, dict[str, Tensor]]:
    """The module of the backbone that takes in the SSF called ``name``, and its weight and bias with it."""
    rescale, target = modules[name], _target(modules, name)
    if target == name:
        norm = rescale.to_layer_norm()
        return name, {"weight": norm.weight, "bias": norm.bias}
    weight, bias = folded_projection(modules[target], rescale)
    return target, {"weight": weight, "bias": bias}


def _target(modules: dict[str, Any], name: str) -> str:
    """The norm called ``name``, or for patch tokens without one the projection before."""
    return f"{name.rpartition('.')[0]}.proj" if isinstance(modules[name], nn.Identity | ChannelRescale) else name


def read_peft(
    folder: str | os.PathLike[str],
) -> tuple[RLRRPeftConfig, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The configuration in a PEFT folder, layer → its tensors by part, and all other tensors by name.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no adapter of PEFT's.
        ValueError: the folder holds no RLRR adapter.
    """
    folder = str(folder)
    for names in ((CONFIG_NAME,), (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):  # else PEFT asks a hub for that name
        if not any(os.path.isfile(os.path.join(folder, name)) for name in names):
            raise FileNotFoundError(f"{folder} is no folder that PEFT saved: it has no {' or '.join(names)}")
    config: Any = PeftConfig.from_pretrained(folder)
    if config.peft_type != RLRR:
        raise ValueError(f"{folder} must hold an RLRR adapter; got {config.peft_type}")
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in load_peft_weights(folder, device="cpu").items():
        layer, _, part = name.removeprefix(_PREFIX).rpartition(".rlrr_")
        (layers.setdefault(layer, {}) if layer else rest)[part] = tensor
    return config, layers, rest


def load_peft(model: nn.Module, folder: str | os.PathLike[str], *, recipe: str | None = None) -> AdaptReport:
    """Adapts ``model``, a fresh backbone, as the PEFT adapter in ``folder`` does; ``save_adapter`` then writes it.

    Args:
        model: changed only when everything fits.
        folder: written by ``save_pretrained`` of a PEFT model, or :func:`to_peft`.
        recipe: ``paper`` for an adapter in the paper's form, as the authors' ``.pth`` needs it: what is saved of norms
            and patch projection becomes γ and β again, and is 1 and 0 where nothing is saved.

    Returns:
        The report of the adapted model.

    Raises:
        ValueError: the folder holds no RLRR adapter, or one that does not fit: a tensor without a place, of another
            shape or not finite, ranks that differ between layers, or a norm that is no rescaled one of the backbone.
    """
    config, layers, rest = read_peft(folder)
    present, named = dict(named_tensors(model)), config.modules_to_save or ()
    for name in [name for name in rest if name in present and name.rpartition(".")[0] not in named]:
        if torch.equal(rest[name], present[name].detach().cpu()):  # saved because its name ends as another's
            del rest[name]
    sizes = [parts["scale_row"].shape[1] for parts in layers.values() if "scale_row" in parts]
    if len(set(sizes)) > 1:
        raise ValueError(f"an adapter folder has one rank for all layers; those in {folder} have {sorted(set(sizes))}")
    state = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    if recipe is not None:
        plan = plan_adaptation(model, RLRRConfig(recipe=recipe))
        modules = dict(named_modules(model))
        for name in [*plan.norms, *([plan.tokens] if plan.tokens else [])]:
            target = _target(modules, name)
            saved = [rest.pop(f"{target}.{key}", None) for key in ("weight", "bias")]
            scale, shift = _unfolded(target, modules[target], *saved)
            state |= {f"{name}.scale": scale, f"{name}.shift": shift}
    rest = {name: tensor for name, tensor in rest.items() if name not in state}  # earlier versions saved both
    # Patterns match ends of names, the first one counts: longer names come first, and what they match too is left out.
    ordered = sorted(layers, key=len, reverse=True)
    groups = {name: len(layers[name]["scale_col"]) for name in ordered if "scale_col" in layers[name]}
    others = (name for name, module in named_modules(model) if isinstance(module, nn.Linear) and name not in layers)
    shifted = sum("shift" in parts for parts in layers.values())
    plan = plan_adaptation(
        model,
        RLRRConfig(
            rank=max(sizes, default=1),
            groups=groups if recipe is None and max(groups.values(), default=1) > 1 else None,
            shift=shifted == len(layers) or (WITH_BIAS if shifted else False),
            residual=config.residual,
            sides=config.sides,
            init=config.init,
            include=None if recipe else tuple(layers),
            exclude=() if recipe else tuple(name for name in others if matches(name, layers)),
            heads=tuple(dict.fromkeys(name.rpartition(".")[0] for name in rest)),
            recipe=recipe,
        ),
    )
    state |= rest
    problems = differences({n: tuple(t.shape) for n, t in state.items()}, planned_shapes(model, plan))
    if problems:
        raise ValueError(misfit(Path(folder), model, problems))
    check_values(Path(folder), state, present)
    apply_adaptation(model, plan)
    present = dict(named_tensors(model))
    with torch.no_grad():
        for name, tensor in state.items():
            present[name].copy_(tensor)
    return adapt_report(model)


def _unfolded(name: str, module: Any, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """γ and β [D] that make weight [D, ...] and bias [D] of ``module`` those that were saved; 1 and 0 for None."""
    frozen = module.weight.detach().cpu().double().reshape(len(module.weight), -1)
    zero = torch.zeros(len(frozen))
    if weight is None or bias is None:
        return zero + 1, zero
    saved = weight.double().reshape(frozen.shape)
    scale = (saved * frozen).sum(1) / frozen.square().sum(1)
    if not (saved - scale[:, None] * frozen).norm() <= _TOLERANCE * saved.norm():
        raise ValueError(f"{name} was trained freely: it is no rescaled one of the backbone, as recipe='paper' has it")
    before = zero if module.bias is None else module.bias.detach().cpu().double()
    return scale.float(), (bias.double() - scale * before).float()
