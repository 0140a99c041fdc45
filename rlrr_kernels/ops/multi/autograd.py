"""The autograd of ``rlrr_linear_multi``: eager, or through the operator ``rlrr_kernels::linear_multi`` (library.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear.autograd import is_watched
from rlrr_kernels.ops.multi import dispatch
from rlrr_kernels.ops.multi.task_index import TaskIndex
from rlrr_kernels.ops.second_order import ReverseOnly, differentiable_gradients
from rlrr_kernels.reference import rlrr_linear_multi_reference

NO_DOUBLE_BACKWARD = (
    "rlrr_linear_multi can be differentiated only once, and by one gradient at a time, in compiled code; for second "
    "derivatives there use rlrr_kernels.reference.rlrr_linear_multi_reference"
)


class Options(NamedTuple):
    """What a call is told beside its tensors; ``backend`` is resolved unless the call goes through the operator."""

    residual: bool
    backend: str


class _LinearMulti(ReverseOnly):
    """Keeps x where a scale gradient is asked for. Stacks are in the one form; ``index`` is a TaskIndex, or a tensor
    where the call goes through the operator."""

    @staticmethod
    def forward(ctx, x, weight, scale_row, scale_col, bias, shift, index, options):
        need_x, _, need_row, need_col, need_bias, need_shift, *_ = ctx.needs_input_grad
        through_op = not isinstance(index, TaskIndex)
        kept = x if need_row or need_col else None
        ctx.save_for_backward(kept, weight, scale_row, scale_col, index if through_op else None)
        ctx.needs = need_x, need_row, need_col, need_bias, need_shift
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, shift)]
        ctx.index, ctx.options = None if through_op else index, options
        tensors = x, weight, scale_row, scale_col, bias, shift
        if not through_op:
            return dispatch.forward(*tensors, index, *options)
        with private.BelowAutograd():
            return torch.ops.rlrr_kernels.linear_multi(*tensors, index, *options)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, scale_row, scale_col, index = ctx.saved_tensors
        through_op = index is not None
        if torch.is_grad_enabled() or private.is_batch(grad_y):  # the former: create_graph=True
            if through_op:
                raise NotImplementedError(NO_DOUBLE_BACKWARD)
            grads = _by_formula(ctx, grad_y, x, weight, scale_row, scale_col)
        elif through_op or is_watched():
            index = index if through_op else ctx.index.index
            run = torch.ops.rlrr_kernels.linear_multi_backward
            grads = run(grad_y, x, weight, scale_row, scale_col, index, *ctx.options, ctx.needs)
        else:
            grads = dispatch.backward(grad_y, x, weight, scale_row, scale_col, ctx.index, *ctx.options, ctx.needs)
        grads = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
        for i, dtype in zip((3, 4), ctx.dtypes, strict=True):
            grads[i] = None if grads[i] is None else grads[i].to(dtype)
        return grads[0], None, *grads[1:], None, None


linear_multi_function = _LinearMulti.apply
eager_linear_multi = super(torch.autograd.Function, _LinearMulti).apply
"""The same but for what ``torch.func`` transforms need, as in ``rlrr_linear``."""


def _by_formula(ctx, grad_y: Tensor, x: Tensor | None, weight: Tensor, scale_row: Tensor, scale_col: Tensor) -> list:
    """The same gradients by the formula, which autograd can differentiate again and for a batch of ``grad_y``."""
    if x is None:  # no scale gradient is asked for, and y is linear in x: any x gives the others
        x = weight.new_zeros(*grad_y.shape[:-1], weight.shape[1], dtype=grad_y.dtype).requires_grad_()
    wide = accumulate_dtype(x.dtype)
    # y is linear in bias and shift too.
    bias, shift = weight.new_zeros(weight.shape[0], dtype=wide), weight.new_zeros(scale_row.shape[:2], dtype=wide)
    inputs = x, scale_row, scale_col, bias.requires_grad_(), shift.requires_grad_()

    def formula(x: Tensor, row: Tensor, col: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return rlrr_linear_multi_reference(
            x, weight.to(wide), row.to(wide), col.to(wide), bias, shift,
            index=ctx.index.index, residual=ctx.options.residual,
        )  # fmt: skip

    return differentiable_gradients(formula, inputs, ctx.needs, grad_y)
