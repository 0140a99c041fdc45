"""``merge_adapter``: folds an adapter into the weights and leaves a plain model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.model import Adaptation, adaptation_of, adapter_parameters, check_forwards, forget_adaptation
from rlrr_kernels.adapt.modules import (
    find_module,
    named_modules,
    named_tensors,
    replace_submodules,
    unwrap,
    wrappers,
)
from rlrr_kernels.adapt.recompute import recompute_activations
from rlrr_kernels.adapt.report import describe_keys
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.conv import RLRRConv2d
from rlrr_kernels.ops.norm_rescale.public import fold_norm


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` folded.

    Attributes:
        model: class name of the model.
        layers: names of the linear layers and convolutions that took in their scales and shift.
        norms: names of the norms that took in scale and shift.
        tokens: name of the patch projection or norm that took in the patch tokens' scale and shift, or None.
        gained: state-dict keys that the backbone does not have: a bias where it had none and a shift was trained.
    """

    model: str
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    tokens: str | None
    gained: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.layers)} layers"]
        if self.norms:
            parts.append(f"{len(self.norms)} norms")
        if self.tokens:
            parts.append(self.tokens)
        hint = ""
        if self.gained:
            hint = "\nRLRRConfig(shift='with_bias') trains no shift where a layer has no bias (--shift with_bias)"
        return f"{self.model}: adapter merged into {', '.join(parts)}\n{describe_keys(self.gained)}{hint}"


@torch.no_grad()
def merge_adapter(model: nn.Module) -> MergeReport:
    """Folds the adapter of ``model`` into its weights, in place: W' = W ⊙ (1 + s_r s_c), b' = b + f (Eq. 20 of RLRR).

    Every RLRRLinear becomes an ``nn.Linear``, every RLRRConv2d an ``nn.Conv2d``; SSF goes into the norm before it
    (γ ⊙ w, γ ⊙ b + β) and that of patch tokens into the patch projection. Sums are fp32 and each tensor is rounded once
    to its own dtype, so logits agree with the adapted model's within rounding. Nothing is left to pay at inference. For
    a ViT the state dict then loads strictly into the plain timm model. All merged tensors are frozen; the head keeps
    its ``requires_grad``. Hooks on adapted modules stay on the plain ones, wrapped modules stay wrapped.

    Returns:
        What was folded, and the keys that were gained.

    Raises:
        ValueError: the model is not adapted, or an adapter parameter is not finite (named), or weights are sharded by
            FSDP, or the forward of an adapted module was replaced (accelerate's hooks); nothing is changed.
    """
    adaptation = adaptation_of(model)
    _check_whole(model, adaptation)
    model = unwrap(model)
    broken = [n for n, p in adapter_parameters(model).items() if not p.is_meta and not p.isfinite().all()]
    if broken:
        raise ValueError(f"adapter parameters that are not finite cannot be merged: {', '.join(broken)}")
    recompute_activations(model, False)
    before = {name for name, _ in named_tensors(model)}
    replace_submodules(model, adaptation.layers, lambda _, layer: _merged_layer(layer))
    for name in adaptation.patched:
        attention = find_module(model, name.rpartition(".")[0])
        attention.qkv_bias_separate = attention.qkv.bias is not None
    norms, tokens = list(adaptation.norms), adaptation.tokens
    if tokens is not None and isinstance(find_module(model, tokens), ChannelRescale):
        tokens = _merge_into_projection(model, tokens)
    elif tokens is not None:
        norms.append(tokens)
    replace_submodules(model, norms, _merged_norm)
    forget_adaptation(model)
    gained = tuple(name for name, _ in named_tensors(model) if name not in before)
    return MergeReport(type(model).__name__, adaptation.layers, adaptation.norms, tokens, gained)


def _merged_norm(_: str, norm: Any) -> nn.Module:
    return norm.to_layer_norm().requires_grad_(False)


def _check_whole(model: nn.Module, adaptation: Adaptation) -> None:
    """Raises ``ValueError`` where the values of weights are elsewhere: sharded by FSDP, or offloaded by a hook."""
    modules = dict(named_modules(model))
    adapted = [*adaptation.layers, *adaptation.norms, *([adaptation.tokens] if adaptation.tokens else [])]
    sharded = wrappers(model, ("FullyShardedDataParallel",))
    sharded += [name for name in adapted if any(hasattr(p, "full_tensor") for p in modules[name].parameters())]
    if sharded:
        raise ValueError(
            f"weights sharded by FSDP cannot be merged in place: {some(sharded)}; save_adapter(model, folder), then "
            "load_adapter and merge_adapter on a model that is not sharded"
        )
    check_forwards(modules, adapted)


def _merged_layer(layer: Any) -> nn.Module:
    plain = layer.to_conv() if isinstance(layer, RLRRConv2d) else layer.to_linear()
    plain.requires_grad_(False)
    if layer.bias is None and plain.bias is not None and not plain.bias.is_meta and not plain.bias.any():
        plain.bias = None  # a shift that never left zero needs no bias
    return plain


def folded_projection(projection: Any, rescale: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection [D, ...] that takes in the scale and shift [D] after it, in its dtype."""
    scale, bias = fold_norm(None, projection.bias, rescale.scale, rescale.shift)
    weight, dtype = projection.weight, projection.weight.dtype
    scaled = weight.to(torch.promote_types(scale.dtype, dtype)) * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(dtype), bias.to(dtype)


def _merge_into_projection(model: nn.Module, name: str) -> str:
    """γ ⊙ (C x + c) + β = (γ ⊙ C) x + (γ ⊙ c + β), C [D, ...] being the patch projection; returns its name."""
    parent = name.rpartition(".")[0]
    rescale, proj = find_module(model, name), find_module(model, f"{parent}.proj")
    weight, bias = folded_projection(proj, rescale)
    proj.weight, proj.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    replace_submodules(model, [name], lambda _, rescale: nn.Identity())
    return f"{parent}.proj"
