"""A kernel's first results, held against the formula: a few rows of y and ∂x, a few values of the scale gradients.

Of N and K a few are picked, evenly and in every group, of M a few rows for y and ∂x and all for the sums over M, which
are taken in blocks: there is no second W, x or g in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlrr_kernels.ops.host.formula import error, picks, wide
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.sampling.row_sample import RowSample

ROWS, VALUES = 8, 48
"""Rows of x that are looked at, and of N and of K about how many values."""

BLOCK_ROWS = 1024
"""Rows of x and g that are in float64 at once."""

Scales = tuple[Tensor, Tensor]


def in_tf32(launches: Sequence[Launch]) -> bool:
    """Whether a computation's products are TF32's."""
    return any(launch.plan.meta.get("PRECISION") == "tf32" for launch in launches)


def _picked_rows(weight: Tensor, groups: int) -> Tensor:
    """Rows of W, as many of each group."""
    size = weight.shape[0] // groups
    starts = torch.arange(groups, device=weight.device) * size
    return (starts[:, None] + picks(size, max(2, VALUES // groups), weight.device)).flatten()


def _factor(scales: Scales, residual: bool, absolute: bool) -> Tensor:
    """1 + s_r s_c [n, k], of s_r [n, r] and s_c [G, r, k], rows in equal shares of each group."""
    row, col = (wide(scale, absolute) for scale in scales)
    groups, rank, width = col.shape
    return float(residual) + (row.view(groups, -1, rank) @ col).view(-1, width)


def merge_error(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, merged: Tensor) -> str | None:
    """What is wrong with W' [N, K]; None for nothing."""
    picked = _picked_rows(weight, len(scale_col))

    def formula(absolute: bool) -> Tensor:
        return wide(weight[picked], absolute) * _factor((scale_row[picked], scale_col), residual, absolute)

    return error("the merged weight", merged[picked], formula, merged.dtype)


def forward_error(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool, y: Tensor,
    tf32: bool,
) -> str | None:  # fmt: skip
    """What is wrong with y [M, N]; None for nothing. Arguments as the backends' forward has them."""
    rows, picked = picks(len(x), ROWS, x.device), _picked_rows(weight, len(scale_col))

    def formula(absolute: bool) -> Tensor:
        merged = wide(weight[picked], absolute) * _factor((scale_row[picked], scale_col), residual, absolute)
        result = wide(x[rows], absolute) @ merged.t()
        return result if bias is None else result + wide(bias[picked], absolute)

    return error("y", y[rows][:, picked], formula, x.dtype, tf32)


def grad_x_error(
    grad_y: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, grad_x: Tensor, tf32: bool
) -> str | None:
    """What is wrong with ∂x [M, K]; None for nothing."""
    rows, picked = picks(len(grad_y), ROWS, grad_y.device), picks(weight.shape[1], VALUES, weight.device)

    def formula(absolute: bool) -> Tensor:
        factor = _factor((scale_row, scale_col[..., picked]), residual, absolute)
        return wide(grad_y[rows], absolute) @ (wide(weight[:, picked], absolute) * factor)

    return error("the gradient of x", grad_x[rows][:, picked], formula, grad_y.dtype, tf32)


def _terms(grad_y: Tensor, x: Tensor, sample: RowSample | None, absolute: bool) -> list[tuple[Tensor, Tensor, float]]:
    """G = gᵀx as terms (g [s, N], x [s, K], weight)."""
    if sample is None:
        return [(grad_y, x, 1.0)]
    if not absolute:
        return sample.parts(grad_y, x)
    # The other sign, that what the means subtract is added to the bound.
    parts = sample._replace(weight=-sample.weight).parts(grad_y.abs(), x.abs())
    return [(g, some, abs(times)) for g, some, times in parts]


def grad_scales_error(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], tf32: bool, sample: RowSample | None = None,
) -> str | None:  # fmt: skip
    """What is wrong with ∂s_r [N, r], ∂s_c [G, r, K] and ∂b [N], those that are not None; None for nothing.

    With a ``sample`` x [S, K] holds its rows.
    """
    groups, rank, K = scale_col.shape
    picked, columns = _picked_rows(weight, groups), picks(K, VALUES, weight.device)

    def of_product(rows: Tensor | slice, cols: Tensor | slice, absolute: bool) -> Tensor:
        """G ⊙ W of these rows and columns."""
        total = 0.0
        for g, some, times in _terms(grad_y, x, sample, absolute):
            for start in range(0, len(some), BLOCK_ROWS):
                here = slice(start, start + BLOCK_ROWS)
                total = total + times * (wide(g[here, rows], absolute).t() @ wide(some[here, cols], absolute))
        return total * wide(weight[rows][:, cols], absolute)

    def of_row(absolute: bool) -> Tensor:
        product = of_product(picked, slice(None), absolute).view(groups, -1, K)
        return (product @ wide(scale_col, absolute).mT).view(-1, rank)

    def of_col(absolute: bool) -> Tensor:
        product = of_product(slice(None), columns, absolute).view(groups, -1, len(columns))
        return wide(scale_row, absolute).view(groups, -1, rank).mT @ product

    def of_bias(absolute: bool) -> Tensor:
        return wide(grad_y[:, picked], absolute).sum(0)

    grad_row, grad_col, grad_bias = grads
    checks = (
        ("the gradient of scale_row", grad_row, of_row, lambda grad: grad[picked]),
        ("the gradient of scale_col", grad_col, of_col, lambda grad: grad[..., columns]),
        ("the gradient of bias", grad_bias, of_bias, lambda grad: grad[picked]),
    )
    found = (error(name, pick(g), of, x.dtype, tf32) for name, g, of, pick in checks if g is not None)
    return next(filter(None, found), None)
