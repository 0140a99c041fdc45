"""What ``rlrr_linear_multi`` computes: groups the samples by task. Stacks of scales come in the one form that backends
see, scale_row [T, N, r] and scale_col [T, G, r, K]."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from rlrr_kernels.ops.checks import in_memory
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear.dispatch import able, flattened
from rlrr_kernels.ops.multi import loop_backend
from rlrr_kernels.ops.multi.task_index import TaskIndex


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    index: TaskIndex,
    residual: bool,
    backend: str,
) -> Tensor:
    """y [S, ..., N] of x [S, ..., K] and stacks of scales in the one form."""
    backend = able(backend, x, weight, scale_row, scale_col, bias, shift)
    module, options = _implementation(backend)
    x, *tensors = in_memory(x, weight, scale_row, scale_col, bias, shift)
    per_sample, permutation = x.shape[1:-1].numel(), index.permutation(x.device)
    rows = index.rows(per_sample)
    if permutation is not None and hasattr(module, "takes_runs"):
        runs = index.rows(per_sample, grouped=False)
        if module.takes_runs(x, weight, scale_row.shape[2], runs, per_sample):
            rows, permutation = runs, None
    grouped = x if permutation is None else x.index_select(0, permutation[0])
    with private.NoAutocast():
        y = module.forward(grouped if backend == "cpp" else flattened(grouped), *tensors, rows, residual, **options)
    shape = (*x.shape[:-1], weight.shape[0])
    if permutation is not None:
        return y.view(shape).index_select(0, permutation[1])
    # As in rlrr_linear: a view would forbid callers to modify y in place.
    return y if y.dim() == x.dim() else private.view_of_new(y, shape)


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    index: TaskIndex,
    residual: bool,
    backend: str,
    needs: loop_backend.Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the stacks in the one form, and of bias and shift (in the accumulation dtype).

    ``x`` may be None when no scale gradient is needed.
    """
    module, options = _implementation(able(backend, grad_y, x, weight, scale_row, scale_col))
    grad_y, x, weight, scale_row, scale_col = in_memory(grad_y, x, weight, scale_row, scale_col)
    permutation = index.permutation(grad_y.device)
    rows = index.rows(grad_y.shape[1:-1].numel())
    grouped = [t if t is None or permutation is None else t.index_select(0, permutation[0]) for t in (grad_y, x)]
    with private.NoAutocast():
        grads = module.backward(
            *map(flattened, grouped), weight, scale_row, scale_col, rows, residual, needs, **options
        )
    grad_x = grads[0]
    if grad_x is not None:
        grad_x = grad_x.view(*grad_y.shape[:-1], weight.shape[1])
        grad_x = grad_x if permutation is None else grad_x.index_select(0, permutation[1])
    return grad_x, *grads[1:]


@functools.cache
def _implementation(backend: str) -> tuple[ModuleType, dict[str, Any]]:
    """The module that serves a resolved backend, and what it is told besides."""
    name, _, path = backend.partition(".")
    if name == "triton":
        return importlib.import_module("rlrr_kernels.ops.multi.triton_backend"), {"path": path} if path else {}
    if backend == "cpp":
        return importlib.import_module("rlrr_kernels.ops.multi.cpp_backend"), {}
    return loop_backend, {"backend": backend}
