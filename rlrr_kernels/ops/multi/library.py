"""``torch.ops.rlrr_kernels.linear_multi`` and its backward: what compilers, exporters and tensor subclasses see.

Stacks come in the one form, [T, N, r] and [T, G, r, K]; the index is a tensor, whose values the operator reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.backends import resolve
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.flops import tell_counters
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear.library import as_outputs, cast_by_autocast
from rlrr_kernels.ops.multi import dispatch
from rlrr_kernels.ops.multi.autograd import NO_DOUBLE_BACKWARD, Options, linear_multi_function
from rlrr_kernels.ops.multi.checks import check_index_of, check_samples, check_stacks, check_values
from rlrr_kernels.ops.multi.task_index import TaskIndex

_library = torch.library.Library("rlrr_kernels", "FRAGMENT")
_library.define(
    "linear_multi(Tensor x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor? bias, Tensor? shift, "
    'Tensor index, bool residual=True, str backend="auto") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_multi_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor index, "
    "bool residual, str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_canonical(x, weight, scale_row, scale_col, bias, shift, index) -> None:
    if scale_row.dim() != 3 or scale_col.dim() != 4:
        raise ValueError(
            "torch.ops.rlrr_kernels.linear_multi takes scale_row [T, N, r] and scale_col [T, G, r, K]; got "
            f"shapes {tuple(scale_row.shape)} and {tuple(scale_col.shape)}. rlrr_linear_multi takes the short forms"
        )
    check_samples(x, weight)
    check_stacks(weight, scale_row, scale_col, bias, shift)
    check_index_of(index, x)


def _linear_multi_op(x, weight, scale_row, scale_col, bias, shift, index, residual=True, backend="auto"):
    _check_canonical(x, weight, scale_row, scale_col, bias, shift, index)
    tasks = TaskIndex(index, x.device)
    check_values(tasks, scale_row.shape[0])
    backend = resolve(backend, x.device, x.dtype)
    return dispatch.forward(x, weight, scale_row, scale_col, bias, shift, tasks, residual, backend)


def _linear_multi_fake(x, weight, scale_row, scale_col, bias, shift, index, residual=True, backend="auto"):
    _check_canonical(x, weight, scale_row, scale_col, bias, shift, index)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_multi_autograd(x, weight, scale_row, scale_col, bias, shift, index, residual=True, backend="auto"):
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen: rlrr_kernels::linear_multi computes no gradient for it")
    if private.transforms_active():
        raise NotImplementedError(
            "torch.ops.rlrr_kernels.linear_multi does not work inside torch.func transforms, forward mode included"
        )
    tell_counters()
    tensors = x, weight, scale_row, scale_col, bias, shift
    return linear_multi_function(*tensors, index, Options(residual, backend))


def _linear_multi_backward_op(grad_y, x, weight, scale_row, scale_col, index, residual, backend, needs):
    backend = resolve(backend, grad_y.device, grad_y.dtype)
    tasks = TaskIndex(index, grad_y.device)
    grads = dispatch.backward(grad_y, x, weight, scale_row, scale_col, tasks, residual, backend, tuple(needs))
    return as_outputs(grad_y, grads)


def _linear_multi_backward_fake(grad_y, x, weight, scale_row, scale_col, index, residual, backend, needs):
    (rows, cols), wide, empty = weight.shape, accumulate_dtype(grad_y.dtype), grad_y.new_empty
    outputs: tuple[tuple[tuple, torch.dtype], ...] = (
        ((*grad_y.shape[:-1], cols), grad_y.dtype),
        (scale_row.shape, scale_row.dtype),
        (scale_col.shape, scale_col.dtype),
        ((rows,), wide),
        ((scale_row.shape[0], rows), wide),
    )
    return tuple(empty(shape, dtype=dtype) if n else empty(0) for n, (shape, dtype) in zip(needs, outputs, strict=True))


def _linear_multi_backward_autograd(grad_y, x, weight, scale_row, scale_col, *options):
    tensors: tuple[Tensor | None, ...] = (grad_y, x, weight, scale_row, scale_col)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(NO_DOUBLE_BACKWARD)
    tell_counters()
    with private.BelowAutograd():
        return torch.ops.rlrr_kernels.linear_multi_backward(*tensors, *options)


_library.impl("linear_multi", _linear_multi_op, "CompositeExplicitAutograd")
_library.impl("linear_multi", _linear_multi_autograd, "Autograd")
cast_by_autocast(_library, "linear_multi")
_library.impl("linear_multi_backward", _linear_multi_backward_op, "CompositeExplicitAutograd")
_library.impl("linear_multi_backward", _linear_multi_backward_autograd, "Autograd")
torch.library.register_fake("rlrr_kernels::linear_multi", _linear_multi_fake, lib=_library)
torch.library.register_fake("rlrr_kernels::linear_multi_backward", _linear_multi_backward_fake, lib=_library)
