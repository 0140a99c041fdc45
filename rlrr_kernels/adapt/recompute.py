"""``recompute_activations``: an adapted model that keeps less between forward and backward, with equal results."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from rlrr_kernels.adapt.model import adaptation_of
from rlrr_kernels.adapt.modules import named_modules
from rlrr_kernels.nn.norm_rescale import NormRescale


def recompute_activations(model: nn.Module, enabled: bool = True) -> tuple[str, ...]:
    """Computes in the backward again what is cheap to compute and large to keep; parameters and results stay.

    * The MLPs of timm keep the pre-activation and not GELU's result (:func:`rlrr_kernels.rlrr_mlp`).
    * Adapted layers that take the result of a norm under SSF keep that norm's input, which the norm keeps anyway
      (``keep_output`` of :func:`rlrr_kernels.norm_rescale`).

    Both cost an elementwise pass in the backward, a few percent of a step, and nothing in exactness. Not on by default,
    because modules inside an MLP are then not called. Names, adapter files and merging are unaffected, and an adapter
    saved from one mode loads into the other.

    Args:
        model: adapted by :func:`rlrr_kernels.adapt_model`; changed in place.
        enabled: ``False`` goes back to keeping everything.

    Returns:
        Names of the modules that compute their results again, in the model's order.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation_of(model)
    found = []
    for name, module in {id(module): (name, module) for name, module in named_modules(model)}.values():
        if isinstance(module, NormRescale):
            module.keep_output = not enabled
        elif not _switch_mlp(module, enabled):
            continue
        found.append(name)
    return tuple(found) if enabled else ()


def _switch_mlp(module: Any, enabled: bool) -> bool:
    """Makes a timm ``Mlp`` over two adapted layers an ``RLRRMlp``, or this a timm ``Mlp``; whether it was one."""
    if "timm.layers.mlp" not in sys.modules:
        return False
    from rlrr_kernels.nn.mlp import Mlp, RLRRMlp, fused_activation

    kind = type(module)
    if kind is not RLRRMlp and (kind is not Mlp or fused_activation(module) is None):
        return False
    module.__class__ = RLRRMlp if enabled else Mlp
    return True
