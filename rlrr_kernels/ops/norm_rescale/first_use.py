"""The first results of ``norm_rescale``'s kernels, held against the formula.

A few rows of y and ∂x, whole, and a few values of ∂γ and ∂β, whose sums take all rows, in blocks. On absolute values
the formula takes (|x| + |mean|) / √(var + eps) for x̂.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.ops.host.formula import error, picks, wide

ROWS, VALUES = 8, 64
"""Rows of x that are looked at, and values of the sums over rows."""

BLOCK_ROWS = 1024
"""Rows of x and g that are in float64 at once."""


def _normed(x: Tensor, mean: Tensor, rstd: Tensor, absolute: bool) -> Tensor:
    """x̂ [m, d] of x [m, d] with mean and rstd [m, 1]."""
    return (wide(x, absolute) + mean.abs() if absolute else x.double() - mean) * rstd


def forward_error(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float, y: Tensor
) -> str | None:
    """What is wrong with y [M, D]; None for nothing. Arguments as the backends' forward has them."""
    rows = picks(len(x), ROWS, x.device)
    some = x[rows]
    variance, mean = torch.var_mean(some.double(), 1, correction=0, keepdim=True)

    def of(absolute: bool) -> Tensor:
        folded = wide(scale, absolute) * (1.0 if weight is None else wide(weight, absolute))
        plus = wide(shift, absolute) + (0.0 if bias is None else wide(scale, absolute) * wide(bias, absolute))
        return _normed(some, mean, (variance + eps).rsqrt(), absolute) * folded + plus

    return error("y of norm_rescale", y[rows], of, torch.promote_types(x.dtype, torch.float32))


def backward_error(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> str | None:  # fmt: skip
    """What is wrong with ∂x [M, D], ∂γ [D] and ∂β [D], those that are not None; None for nothing.

    mean and rstd are the forward's, [M] or [M, 1].
    """
    rows, places = picks(len(x), ROWS, x.device), picks(x.shape[1], VALUES, x.device)
    mean, rstd = mean.double().view(-1, 1), rstd.double().view(-1, 1)

    def of_x(absolute: bool) -> Tensor:
        folded = wide(scale, absolute) * (1.0 if weight is None else wide(weight, absolute))
        h, normed = wide(grad_y[rows], absolute) * folded, _normed(x[rows], mean[rows], rstd[rows], absolute)
        centre, along = h.mean(1, keepdim=True), normed * (h * normed).mean(1, keepdim=True)
        return rstd[rows] * (h + centre + along if absolute else h - centre - along)

    def sums(absolute: bool, times_normed: bool) -> Tensor:
        total = torch.zeros(len(places), dtype=torch.float64, device=x.device)
        for start in range(0, len(x), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            g = wide(grad_y[here][:, places], absolute)
            total += (g * _normed(x[here][:, places], mean[here], rstd[here], absolute) if times_normed else g).sum(0)
        return total

    def of_scale(absolute: bool) -> Tensor:
        total = sums(absolute, True) * (1.0 if weight is None else wide(weight[places], absolute))
        return total if bias is None else total + sums(absolute, False) * wide(bias[places], absolute)

    def of_shift(absolute: bool) -> Tensor:
        return sums(absolute, False)

    grad_x, grad_scale, grad_shift = grads
    dtype = torch.promote_types(x.dtype, torch.float32)
    checks = (
        ("the gradient of norm_rescale's x", None if grad_x is None else grad_x[rows], of_x),
        ("the gradient of norm_rescale's scale", None if grad_scale is None else grad_scale[places], of_scale),
        ("the gradient of norm_rescale's shift", None if grad_shift is None else grad_shift[places], of_shift),
    )
    found = (error(name, actual, of, dtype) for name, actual, of in checks if actual is not None)
    return next(filter(None, found), None)
