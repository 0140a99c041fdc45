"""``merge_adapter``: folds an adapter into the weights and leaves a plain model."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from rlrr_kernels.adapt.model import adaptation_of, adapter_parameters, forget_adaptation, set_submodule, unwrap
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.ops.norm_rescale import fold_norm


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` folded.

    Attributes:
        model: class name of the model.
        layers: names of the linear layers that took in their scales and shift.
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
        parts = [f"{len(self.layers)} linear layers"]
        if self.norms:
            parts.append(f"{len(self.norms)} norms")
        if self.tokens:
            parts.append(self.tokens)
        lines = [f"{self.model}: adapter merged into {', '.join(parts)}"]
        if self.gained:
            lines.append(
                f"gained (the backbone has no such key, so its class does not load this state dict strictly): "
                f"{', '.join(self.gained)}"
            )
        else:
            lines.append("its state dict has the keys of the plain model")
        return "\n".join(lines)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> MergeReport:
    """Folds the adapter of ``model`` into its weights, in place: W' = W ⊙ (1 + s_r s_c), b' = b + f (Eq. 20 of RLRR).

    Every RLRRLinear becomes an ``nn.Linear``; SSF goes into the norm before it (γ ⊙ w, γ ⊙ b + β) and that of patch
    tokens into the patch projection. Sums are fp32 and each tensor is rounded once to its own dtype, so logits agree
    with the adapted model's within rounding. Nothing is left to pay at inference. For a ViT the state dict then loads
    strictly into the plain timm model. All merged tensors are frozen; the head keeps its ``requires_grad``.

    Returns:
        What was folded, and the keys that were gained.

    Raises:
        ValueError: the model is not adapted, or an adapter parameter is not finite (named); nothing is changed.
    """
    adaptation, model = adaptation_of(model), unwrap(model)
    broken = [n for n, p in adapter_parameters(model).items() if not p.is_meta and not p.isfinite().all()]
    if broken:
        raise ValueError(f"adapter parameters that are not finite cannot be merged: {', '.join(broken)}")
    gained: list[str] = []
    merged: dict[int, nn.Linear] = {}  # a layer that sits in two places is merged once
    for name in adaptation.layers:
        layer = model.get_submodule(name)
        if id(layer) not in merged:
            merged[id(layer)] = _merge_linear(layer)
        linear = merged[id(layer)]
        set_submodule(model, name, linear)
        if layer.bias is None and linear.bias is not None:
            gained.append(f"{name}.bias")
        elif name in adaptation.patched:
            model.get_submodule(name.rpartition(".")[0]).qkv_bias_separate = False
    for name in adaptation.norms:
        gained += _merge_norm(model, name)
    tokens = adaptation.tokens
    if tokens is not None and isinstance(model.get_submodule(tokens), ChannelRescale):
        gained += _merge_tokens(model, tokens)
        tokens = f"{tokens.rpartition('.')[0]}.proj"
    elif tokens is not None:
        gained += _merge_norm(model, tokens)
    forget_adaptation(model)
    return MergeReport(type(model).__name__, adaptation.layers, adaptation.norms, tokens, tuple(gained))


def _merge_linear(layer: RLRRLinear) -> nn.Linear:
    linear = layer.to_linear().requires_grad_(False)
    if layer.bias is None and linear.bias is not None and not linear.bias.is_meta and not linear.bias.any():
        linear.bias = None  # a shift that never left zero needs no bias
    return linear


def _merge_norm(model: nn.Module, name: str) -> list[str]:
    norm: NormRescale = model.get_submodule(name)
    set_submodule(model, name, norm.to_layer_norm().requires_grad_(False))
    return [f"{name}.{key}" for key in ("weight", "bias") if getattr(norm, key) is None]


def _merge_tokens(model: nn.Module, name: str) -> list[str]:
    """γ ⊙ (C x + c) + β = (γ ⊙ C) x + (γ ⊙ c + β), C being the patch projection [D, ...]."""
    embedding = model.get_submodule(name.rpartition(".")[0])
    rescale, proj = model.get_submodule(name), embedding.proj
    without_bias = proj.bias is None
    scale, bias = fold_norm(None, proj.bias, rescale.scale, rescale.shift)
    weight = proj.weight.to(scale.dtype) * scale.view(-1, *[1] * (proj.weight.dim() - 1))
    proj.weight = nn.Parameter(weight.to(proj.weight.dtype), requires_grad=False)
    proj.bias = nn.Parameter(bias.to(proj.weight.dtype), requires_grad=False)
    set_submodule(model, name, nn.Identity())
    return [f"{name.rpartition('.')[0]}.proj.bias"] if without_bias else []
