"""Results held against their formula in float64, at a few picked places: what a kernel's first-use check is made of.

By the correctness check's bound (:data:`rlrr_kernels.numerics.BOUND`): the distance from the formula may be at most
c · u · ‖the formula on absolute values‖ over the values looked at, with u the unit roundoff of what is computed with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlrr_kernels import numerics

TF32_ROUNDOFFS = 2.0**13
"""Of a TF32 product's operands in fp32's: they keep 10 bits of 23."""


class NotFinite(Exception):
    """The formula's values have a NaN or go over the largest number of the results, so there is nothing to hold to."""


def picks(size: int, count: int, device: torch.device) -> Tensor:
    """At most ``count`` numbers below ``size``, evenly, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64, device=device).round().long()


def wide(tensor: Tensor, absolute: bool) -> Tensor:
    """A tensor, or its absolute values, in float64."""
    return tensor.double().abs() if absolute else tensor.double()


def error(
    name: str, actual: Tensor, of: Callable[[bool], Tensor], dtype: torch.dtype, tf32: bool = False
) -> str | None:
    """What is wrong with ``actual``, for which ``of`` gives the formula, or that on absolute values; None for nothing.

    ``dtype`` is that of the operands; u is the larger unit roundoff of it and of the results.

    Raises:
        NotFinite: see there.
    """
    roundoff = max(torch.finfo(d).eps for d in (dtype, actual.dtype)) / 2 * (TF32_ROUNDOFFS if tf32 else 1.0)
    exact, absolute = of(False), of(True)
    if not (exact.abs() <= torch.finfo(actual.dtype).max).all() or not absolute.isfinite().all():
        raise NotFinite
    bound = absolute.norm().item()
    distance = (actual.double() - exact).norm().item()
    if distance <= numerics.BOUND * roundoff * bound:
        return None
    return f"{name} is {distance / max(roundoff * bound, 1e-300):.3g} unit roundoffs of its bound from the formula"
