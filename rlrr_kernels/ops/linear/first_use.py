"""A kernel's first results, held against the formula: a few rows of y and ∂x, a few values of the scale gradients.

By the correctness check's bound (:data:`rlrr_kernels.numerics.BOUND`): the distance from the formula in float64 may be
at most c · u · ‖the formula on absolute values‖ over the values looked at, with u the unit roundoff of what is
multiplied. Of N and K a few are picked, evenly and in every group, of M a few rows for y and ∂x and all for the sums
over M, which are taken in blocks: there is no second W, x or g in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlrr_kernels import numerics

ROWS, VALUES = 8, 48
"""Rows of x that are looked at, and of N and of K about how many values."""

BLOCK_ROWS = 1024
"""Rows of x and g that are in float64 at once."""

TF32_ROUNDOFFS = 2.0**13
"""Of a TF32 product's operands in fp32's: they keep 10 bits of 23."""

Scales = tuple[Tensor, Tensor]


def _picks(size: int, count: int, device: torch.device) -> Tensor:
    """At most ``count`` numbers below ``size``, evenly, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64, device=device).round().long()


def _picked_rows(weight: Tensor, groups: int) -> Tensor:
    """Rows of W, as many of each group."""
    size = weight.shape[0] // groups
    picks = _picks(size, max(2, VALUES // groups), weight.device)
    starts = torch.arange(groups, device=weight.device) * size
    return (starts[:, None] + picks).flatten()


def _factor(scales: Scales, residual: bool, absolute: bool) -> Tensor:
    """1 + s_r s_c [n, k], of s_r [n, r] and s_c [G, r, k], rows in equal shares of each group."""
    row, col = (scale.double().abs() if absolute else scale.double() for scale in scales)
    groups, rank, width = col.shape
    return float(residual) + (row.view(groups, -1, rank) @ col).view(-1, width)


def _error(name: str, actual: Tensor, of: Callable[[bool], Tensor], dtype: torch.dtype, tf32: bool) -> str | None:
    """What is wrong with ``actual``, for which ``of`` gives the formula, or that on absolute values."""
    roundoff = max(torch.finfo(d).eps for d in (dtype, actual.dtype)) / 2 * (TF32_ROUNDOFFS if tf32 else 1.0)
    exact, bound = of(False), of(True).norm().item()
    error = (actual.double() - exact).norm().item()
    if error <= numerics.BOUND * roundoff * bound:
        return None
    return f"{name} is {error / max(roundoff * bound, 1e-300):.3g} unit roundoffs of its bound from the formula"


def _wide(tensor: Tensor, absolute: bool) -> Tensor:
    return tensor.double().abs() if absolute else tensor.double()


def merge_error(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, merged: Tensor) -> str | None:
    """What is wrong with W' [N, K]; None for nothing."""
    picked = _picked_rows(weight, len(scale_col))

    def formula(absolute: bool) -> Tensor:
        return _wide(weight[picked], absolute) * _factor((scale_row[picked], scale_col), residual, absolute)

    return _error("the merged weight", merged[picked], formula, merged.dtype, False)


def forward_error(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool, y: Tensor,
    tf32: bool,
) -> str | None:  # fmt: skip
    """What is wrong with y [M, N]; None for nothing. Arguments as the backends' forward has them."""
    rows, picked = _picks(len(x), ROWS, x.device), _picked_rows(weight, len(scale_col))

    def formula(absolute: bool) -> Tensor:
        merged = _wide(weight[picked], absolute) * _factor((scale_row[picked], scale_col), residual, absolute)
        result = _wide(x[rows], absolute) @ merged.t()
        return result if bias is None else result + _wide(bias[picked], absolute)

    return _error("y", y[rows][:, picked], formula, x.dtype, tf32)


def grad_x_error(
    grad_y: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, grad_x: Tensor, tf32: bool
) -> str | None:
    """What is wrong with ∂x [M, K]; None for nothing."""
    rows, picked = _picks(len(grad_y), ROWS, grad_y.device), _picks(weight.shape[1], VALUES, weight.device)

    def formula(absolute: bool) -> Tensor:
        factor = _factor((scale_row, scale_col[..., picked]), residual, absolute)
        return _wide(grad_y[rows], absolute) @ (_wide(weight[:, picked], absolute) * factor)

    return _error("the gradient of x", grad_x[rows][:, picked], formula, grad_y.dtype, tf32)


def grad_scales_error(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], tf32: bool,
) -> str | None:  # fmt: skip
    """What is wrong with ∂s_r [N, r], ∂s_c [G, r, K] and ∂b [N], those that are not None; None for nothing."""
    groups, rank, K = scale_col.shape
    picked, columns = _picked_rows(weight, groups), _picks(K, VALUES, weight.device)

    def of_product(rows: Tensor | slice, cols: Tensor | slice, absolute: bool) -> Tensor:
        """G ⊙ W of these rows and columns."""
        total = 0.0
        for start in range(0, len(x), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            total = total + _wide(grad_y[here, rows], absolute).t() @ _wide(x[here, cols], absolute)
        return total * _wide(weight[rows][:, cols], absolute)

    def of_row(absolute: bool) -> Tensor:
        product = of_product(picked, slice(None), absolute).view(groups, -1, K)
        return (product @ _wide(scale_col, absolute).mT).view(-1, rank)

    def of_col(absolute: bool) -> Tensor:
        product = of_product(slice(None), columns, absolute).view(groups, -1, len(columns))
        return _wide(scale_row, absolute).view(groups, -1, rank).mT @ product

    def of_bias(absolute: bool) -> Tensor:
        return _wide(grad_y[:, picked], absolute).sum(0)

    grad_row, grad_col, grad_bias = grads
    checks = (
        ("the gradient of scale_row", grad_row, of_row, lambda grad: grad[picked]),
        ("the gradient of scale_col", grad_col, of_col, lambda grad: grad[..., columns]),
        ("the gradient of bias", grad_bias, of_bias, lambda grad: grad[picked]),
    )
    found = (_error(name, pick(g), of, x.dtype, tf32) for name, g, of, pick in checks if g is not None)
    return next((error for error in found if error), None)
