"""``rlrr_linear_multi`` as one call of ``rlrr_linear`` for each task, which is right on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.ops.checks import canonical
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.linear import dispatch
from rlrr_kernels.ops.multi.task_index import BARE, TaskRows

Needs = tuple[bool, bool, bool, bool, bool]


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    rows: TaskRows,
    residual: bool,
    *,
    backend: str = "torch",
) -> Tensor:
    """y [M, N] of grouped rows x [M, K].

    weight [N, K], scale_row [T, N, r], scale_col [T, G, r, K], bias [N], shift [T, N]. ``backend`` computes each task.
    """
    parts = []
    for task, first, end in rows.segments:
        row, col, residual_ = _scales(task, weight, scale_row, scale_col, residual)
        total = bias_of(task, bias, shift)
        parts.append(dispatch.forward(x[first:end], weight, row, col, total, residual_, backend, None))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[0])


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    rows: TaskRows,
    residual: bool,
    needs: Needs,
    *,
    backend: str = "torch",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row, scale_col, bias [N] and shift [T, N]; None where ``needs`` says so.

    Those of scales have their scale's dtype, those of bias and shift are fp32 (fp64 for float64); adapters without rows
    get zeros. ``x`` may be None when no scale gradient is needed.
    """
    need_x, need_row, need_col, need_bias, need_shift = needs
    (out_features, in_features), wide = weight.shape, accumulate_dtype(grad_y.dtype)
    grad_x = grad_y.new_empty(grad_y.shape[0], in_features) if need_x else None
    grad_row = torch.zeros(scale_row.shape, dtype=scale_row.dtype, device=weight.device) if need_row else None
    grad_col = torch.zeros(scale_col.shape, dtype=scale_col.dtype, device=weight.device) if need_col else None
    grad_bias = grad_y.new_zeros(out_features, dtype=torch.float64) if need_bias else None
    grad_shift = grad_y.new_zeros(scale_row.shape[0], out_features, dtype=wide) if need_shift else None
    for task, first, end in rows.segments:
        row, col, residual_ = _scales(task, weight, scale_row, scale_col, residual)
        trained = task != BARE
        needs_ = need_x, need_row and trained, need_col and trained, need_bias or (need_shift and trained)
        rows_of_x = None if x is None else x[first:end]
        found = dispatch.backward(grad_y[first:end], rows_of_x, weight, row, col, residual_, backend, needs_)
        if grad_x is not None:
            grad_x[first:end] = found[0]
        if grad_bias is not None:
            grad_bias += found[3]
        for total, part in ((grad_row, found[1]), (grad_col, found[2]), (grad_shift, found[3])):
            if total is not None and trained:
                total[task] = part
    return grad_x, grad_row, grad_col, None if grad_bias is None else grad_bias.to(wide), grad_shift


def _scales(
    task: int, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool
) -> tuple[Tensor, Tensor, bool]:
    """A task's scales and residual; W itself is W ⊙ (1 · 1) without the residual, exactly."""
    return (*canonical(None, None, weight), False) if task == BARE else (scale_row[task], scale_col[task], residual)


def bias_of(task: int, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """b + f of a task, [N]; None for zeros."""
    if shift is None or task == BARE:
        return bias
    return shift[task] if bias is None else bias + shift[task]
