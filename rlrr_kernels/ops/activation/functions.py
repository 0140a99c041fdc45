"""Activations that ``rlrr_linear`` applies to its input and computes again in its backward, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
"""``gelu``: h Φ(h), exact. ``gelu_tanh``: its approximation by tanh. The values are what ``F.gelu`` calls them."""


def check_name(argument: str, name: object) -> None:
    """Raises ``ValueError`` naming ``argument`` unless ``name`` is one of :data:`ACTIVATIONS`."""
    if name not in tuple(ACTIVATIONS):  # which may be no string, nor hashable
        raise ValueError(f"{argument} must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def forward(h: Tensor, name: str) -> Tensor:
    """act(h), computed in fp32 (fp64 for float64) and rounded once to the dtype of h."""
    return F.gelu(h, approximate=ACTIVATIONS[name])


def backward(grad_a: Tensor, h: Tensor, name: str) -> Tensor:
    """∂h = ∂a ⊙ act'(h), which takes the memory of ``grad_a``."""
    return torch.ops.aten.gelu_backward.grad_input(grad_a, h, approximate=ACTIVATIONS[name], grad_input=grad_a)
