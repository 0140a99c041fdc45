"""What ``rlrr_linear`` computes: picks the backend's module, and brings leading dimensions, short forms of the scales,
activations and lazily negated tensors into the one form that the backends see."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.activation import functions as activation
from rlrr_kernels.ops.checks import canonical, in_memory
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.replay import PLAIN_TYPES
from rlrr_kernels.ops.sampling.row_sample import RowSample

if backends.CPP_FAILURE is None:  # its operators' fake and autograd kernels, which a compiler may ask for first
    from rlrr_kernels.ops.linear import cpp_backend  # noqa: F401


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    bias: Tensor | None,
    residual: bool,
    backend: str,
    input_activation: str | None,
) -> Tensor:
    """y [..., N] of x [..., K]."""
    module, options = _implementation(able(backend, x, weight, scale_row, scale_col, bias))
    x, weight, scale_row, scale_col, bias = in_memory(x, weight, scale_row, scale_col, bias)
    scale_row, scale_col = canonical(scale_row, scale_col, weight)
    flat = flattened(x)
    with private.NoAutocast():  # x has its dtype; products of blocks must keep theirs
        if input_activation is not None:
            flat = activation.forward(flat, input_activation)
        y = module.forward(flat, weight, scale_row, scale_col, bias, residual, **options)
    if x.dim() == 2:
        return y
    # A view would forbid callers to modify y in place, which ReLU(inplace=True) and `y += b` after a layer do.
    return private.view_of_new(y, (*x.shape[:-1], weight.shape[0]))


def rows_for_backward(x: Tensor, sample: RowSample | None, input_activation: str | None) -> Tensor:
    """What the backward with scale gradients reads of x: all of it, or the sample's rows [S, K].

    A copy of 2 S K elements in a launch of its own: the product could spare the read alone, at most 1.3 % of a layer's
    time at S = M / 4 by bytes and operations, and only where it is not the vendor's.
    """
    if sample is None or input_activation is not None:
        return x
    return flattened(x).index_select(0, sample.index)


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    residual: bool,
    backend: str,
    needs: tuple[bool, bool, bool, bool],
    input_activation: str | None = None,
    sample: RowSample | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale_row, scale_col (in their shapes and dtypes) and bias (in the accumulation dtype).

    x is what :func:`rows_for_backward` returned.
    """
    backend = able(backend, grad_y, x, weight, scale_row, scale_col)
    grad_y, x, weight, scale_row, scale_col = in_memory(grad_y, x, weight, scale_row, scale_col)
    row, col = canonical(scale_row, scale_col, weight)
    flat = flattened(grad_y), flattened(x), weight, row, col, residual, backend, needs, sample
    with private.NoAutocast():
        grads = _flat_backward(*flat) if input_activation is None else _activated_backward(*flat, input_activation)
    grad_x, grad_row, grad_col, grad_bias = grads
    return (
        grad_x if grad_x is None or grad_y.dim() == 2 else grad_x.view(*grad_y.shape[:-1], weight.shape[1]),
        grad_row if grad_row is None or scale_row.dim() == 2 else grad_row.view_as(scale_row),
        grad_col if grad_col is None or scale_col.dim() == 3 else grad_col.view_as(scale_col),
        grad_bias,
    )


def flattened(x: Tensor | None) -> Tensor | None:
    """x [..., K] as [M, K], also where K or a leading dimension is 0."""
    if x is None or x.dim() == 2:
        return x
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def able(backend: str, *tensors: Tensor | None) -> str:
    """``backend``, or plain torch where a tensor is of a type that may have no memory to hand to a kernel."""
    return backend if all([t is None or type(t) in PLAIN_TYPES for t in tensors]) else "torch"  # noqa: C419 (faster)


@functools.cache
def _implementation(backend: str) -> tuple[ModuleType, dict[str, Any]]:
    """The module that serves a resolved backend, and the path it is told to take."""
    name, _, path = backend.partition(".")
    return importlib.import_module(f"rlrr_kernels.ops.linear.{name}_backend"), {"path": path} if path else {}


def _flat_backward(grad_y, x, weight, row, col, residual, backend, needs, sample=None):
    module, options = _implementation(backend)
    if sample is not None and (needs[1] or needs[2]):
        options = options | {"sample": sample}
    return module.backward(grad_y, x, weight, row, col, residual, needs, **options)


def _activated_backward(grad_y, h, weight, row, col, residual, backend, needs, sample, input_activation):
    """The same for y = act(h) W'ᵀ + b: ∂a = g W' first, so that one pass makes ∂h of it and computes act(h) again."""
    arguments = weight, row, col, residual, backend
    need_h, need_row, need_col, need_bias = needs
    need_scales = need_row or need_col
    grad_h = a = None
    if need_h:
        grad_a, *_ = _flat_backward(grad_y, None, *arguments, (True, False, False, False))
        if backend.startswith("triton"):
            triton = importlib.import_module("rlrr_kernels.ops.activation.triton_backward")
            grad_h, a = triton.backward(grad_a, h, input_activation, need_scales and sample is None)
        else:
            grad_h = activation.backward(grad_a, h, input_activation)
    if need_scales and a is None:
        a = activation.forward(h if sample is None else h.index_select(0, sample.index), input_activation)
    _, *grads = _flat_backward(grad_y, a, *arguments, (False, need_row, need_col, need_bias), sample)
    return grad_h, *grads
