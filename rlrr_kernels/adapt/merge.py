"""``merge_adapter``: folds an adapter into the weights and leaves a plain model."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from rlrr_kernels.adapt.model import adaptation_of, adapter_parameters, forget_adaptation, replace_submodules, unwrap
from rlrr_kernels.adapt.recompute import recompute_activations
from rlrr_kernels.adapt.report import describe_keys
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.conv import RLRRConv2d
from rlrr_kernels.nn.rescaled import Rescaled
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
        return f"{self.model}: adapter merged into {', '.join(parts)}\n{describe_keys(self.gained)}"


@torch.no_grad()
def merge_adapter(model: nn.Module) -> MergeReport:
    """Folds the adapter of ``model`` into its weights, in place: W' = W ⊙ (1 + s_r s_c), b' = b + f (Eq. 20 of RLRR).

    Every RLRRLinear becomes an ``nn.Linear``, every RLRRConv2d an ``nn.Conv2d``; SSF goes into the norm before it
    (γ ⊙ w, γ ⊙ b + β) and that of patch tokens into the patch projection. Sums are fp32 and each tensor is rounded once
    to its own dtype, so logits agree with the adapted model's within rounding. Nothing is left to pay at inference. For
    a ViT the state dict then loads strictly into the plain timm model. All merged tensors are frozen; the head keeps
    its ``requires_grad``.

    Returns:
        What was folded, and the keys that were gained.

    Raises:
        ValueError: the model is not adapted, or an adapter parameter is not finite (named); nothing is changed.
    """
    adaptation, model = adaptation_of(model), unwrap(model)
    broken = [n for n, p in adapter_parameters(model).items() if not p.is_meta and not p.isfinite().all()]
    if broken:
        raise ValueError(f"adapter parameters that are not finite cannot be merged: {', '.join(broken)}")
    recompute_activations(model, False)
    before = set(model.state_dict())
    replace_submodules(model, adaptation.layers, lambda _, layer: _merged_layer(layer))
    for name in adaptation.patched:
        attention = model.get_submodule(name.rpartition(".")[0])
        attention.qkv_bias_separate = attention.qkv.bias is not None
    norms, tokens = list(adaptation.norms), adaptation.tokens
    if tokens is not None and isinstance(model.get_submodule(tokens), ChannelRescale):
        tokens = _merge_into_projection(model, tokens)
    elif tokens is not None:
        norms.append(tokens)
    replace_submodules(model, norms, lambda _, norm: norm.to_layer_norm().requires_grad_(False))
    forget_adaptation(model)
    gained = tuple(name for name in model.state_dict() if name not in before)
    return MergeReport(type(model).__name__, adaptation.layers, adaptation.norms, tokens, gained)


def _merged_layer(layer: Rescaled) -> nn.Module:
    plain = layer.to_conv() if isinstance(layer, RLRRConv2d) else layer.to_linear()
    plain.requires_grad_(False)
    if layer.bias is None and plain.bias is not None and not plain.bias.is_meta and not plain.bias.any():
        plain.bias = None  # a shift that never left zero needs no bias
    return plain


def _merge_into_projection(model: nn.Module, name: str) -> str:
    """γ ⊙ (C x + c) + β = (γ ⊙ C) x + (γ ⊙ c + β), C [D, ...] being the patch projection; returns its name."""
    parent, _, child = name.rpartition(".")
    embedding = model.get_submodule(parent)
    rescale, proj = getattr(embedding, child), embedding.proj
    scale, bias = fold_norm(None, proj.bias, rescale.scale, rescale.shift)
    weight = proj.weight.to(torch.promote_types(scale.dtype, proj.weight.dtype)) * scale.view(
        -1, *[1] * (proj.weight.dim() - 1)
    )
    proj.weight = nn.Parameter(weight.to(proj.weight.dtype), requires_grad=False)
    proj.bias = nn.Parameter(bias.to(proj.weight.dtype), requires_grad=False)
    setattr(embedding, child, nn.Identity())
    return f"{parent}.proj"
