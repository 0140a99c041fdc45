"""How a layer's backward computes its input again from tensors that are kept anyway, instead of keeping it.

A function whose result is cheap to compute attaches a :class:`Recompute` to it. ``rlrr_linear`` then saves that one's
tensors, which the function saved too, and not its input. A caller that knows nothing of it, and every tensor that a
view or another operation derives from the result, is unaffected: only memory depends on its being seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.ops.host import private

RECOMPUTED = "_rlrr_recompute"
"""The attribute of a tensor that can be computed again, with its :class:`Recompute`."""


class Recompute(NamedTuple):
    """A way to compute a tensor again: ``compute(dtype, *tensors)`` gives it bit by bit, cast to ``dtype``.

    ``versions`` are those of the tensor and of what it is computed from.
    """

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]


def attach_recompute(result: Tensor, compute: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    """Says how ``result`` can be computed again, where a backward can follow."""
    present = [tensor for tensor in (result, *tensors) if tensor is not None]
    if torch.is_grad_enabled() and not any(tensor.is_inference() for tensor in present):
        setattr(result, RECOMPUTED, Recompute(compute, tensors, tuple(tensor._version for tensor in present)))


def recompute_of(x: Tensor) -> Recompute | None:
    """How ``x`` is computed again; None where it cannot be: changed in place since, or a transform is at work."""
    recompute = None if torch.compiler.is_compiling() else getattr(x, RECOMPUTED, None)
    if recompute is None or private.transforms_active():
        return None
    present = [tensor for tensor in (x, *recompute.tensors) if tensor is not None]
    return recompute if recompute.versions == tuple(tensor._version for tensor in present) else None
