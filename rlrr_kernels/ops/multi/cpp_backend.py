"""``rlrr_linear_multi`` in C++ for the CPU: all adapters in one call.

Adapters with a few rows share one pass over W, others are merged a panel at a time: ``csrc/dispatch.h`` has the
crossover. float16, float64, products that may be rounded and empty ones are left to one call of ``rlrr_linear`` a task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear.cpp_backend import PATH_NAMES, PATHS
from rlrr_kernels.ops.linear.dispatch import flattened
from rlrr_kernels.ops.multi import loop_backend
from rlrr_kernels.ops.multi.loop_backend import Needs
from rlrr_kernels.ops.multi.task_index import BARE, TaskRows

_ops = torch.ops.rlrr_kernels_cpp
_path_of_task = _ops.path_of_task.default
_linear_multi = _ops.linear_multi.default

LEAST_RUN = 32
"""Rows a sample from which on it costs less to multiply samples where they lie than to copy them to their task's."""


def path_of_task(x: Tensor, weight: Tensor, rank: int, count: int, backward: bool) -> str:
    """How ``count`` rows of one adapter are computed: "fused" (one pass over W for the few rows of all such adapters),
    "panels" (products with W' of the adapter, a panel at a time), or "library" (a call of ``rlrr_linear``)."""
    if x.dtype == torch.float32 and matmul_precision("cpu") != "ieee":
        return "library"
    return PATH_NAMES[_path_of_task(x, weight, rank, count, backward)]


def has_kernels(x: Tensor, weight: Tensor, rank: int, rows: TaskRows, backward: bool = False) -> bool:
    """Whether one C++ call serves all adapters of x [M, ...]."""
    key = x.dtype, weight.dtype, weight.shape, rank, backward, matmul_precision("cpu")
    found = rows.cache.get(key)
    if found is None:  # asked once for layers alike: the operator that tells costs a twentieth of a small layer
        # "library" is what more rows would take, or none; of a batch, what most tasks would.
        typical = rows.count // max(1, len(rows.counts))
        found = rows.cache[key] = path_of_task(x, weight, rank, typical, backward) != "library"
    return found


def takes_runs(x: Tensor, weight: Tensor, rank: int, rows: TaskRows, per_sample: int) -> bool:
    """Whether :func:`forward` may be given ``rows`` whose tasks' samples are no neighbours."""
    return per_sample >= LEAST_RUN and has_kernels(x, weight, rank, rows)


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
    path: str = "auto",
) -> Tensor:
    """y [..., N] of x [..., K]: see :func:`loop_backend.forward`, which takes and gives rows alone.

    To flatten x and give y its shape again costs up to a tenth of a small layer.
    """
    if not has_kernels(x, weight, scale_row.shape[2], rows):
        tensors = flattened(x), weight, scale_row, scale_col, bias, shift
        return loop_backend.forward(*tensors, rows, residual, backend="cpp")
    (scale_row, scale_col, shift), runs = _floats(rows, scale_row, scale_col, shift)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    with private.BelowAutograd():
        return _linear_multi(x, weight, scale_row, scale_col, bias, shift, runs, residual, PATHS[path])


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    rows: TaskRows,
    residual: bool,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of grouped rows: see :func:`loop_backend.backward`."""
    tensors = grad_y, x, weight, scale_row, scale_col
    if not has_kernels(grad_y, weight, scale_row.shape[2], rows, backward=True):
        return loop_backend.backward(*tensors, rows, residual, needs, backend="cpp")
    (row, col, _), runs = _floats(rows, scale_row, scale_col, None)
    with private.BelowAutograd():
        grads = _ops.linear_multi_backward(grad_y, x, weight, row, col, runs, residual, *needs)
    grad_x, grad_row, grad_col, grad_bias, grad_shift = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    if row is scale_row:
        return grad_x, grad_row, grad_col, grad_bias, grad_shift
    tasks = scale_row.shape[0]
    return (
        grad_x,
        _spread(rows, grad_row, tasks, scale_row.dtype),
        _spread(rows, grad_col, tasks, scale_col.dtype),
        grad_bias,
        _spread(rows, grad_shift, tasks, torch.float32),
    )


def _floats(rows: TaskRows, *stacks: Tensor | None) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Stacks in contiguous fp32 and the table of runs for them: as they are, or of adapters that have rows alone."""
    if all(stack is None or (stack.dtype == torch.float32 and stack.is_contiguous()) for stack in stacks):
        return stacks, _table(rows, "runs", None)
    used = _used(rows)
    short = tuple(None if stack is None else stack.index_select(0, used).to(torch.float32) for stack in stacks)
    return short, _table(rows, "short runs", {task: i for i, task in enumerate(used.tolist())})


def _used(rows: TaskRows) -> Tensor:
    """The adapters that have rows."""
    found = rows.cache.get("used")
    if found is None:
        tasks = sorted(rows.counts.keys() - {BARE})
        found = rows.cache["used"] = torch.tensor(tasks, dtype=torch.int64)
    return found


def _table(rows: TaskRows, key: str, numbers: dict[int, int] | None) -> Tensor:
    """The segments as a tensor [R, 3]; ``numbers`` are the places of adapters in a short stack."""
    found = rows.cache.get(key)
    if found is None:
        table = [(numbers.get(task, BARE) if numbers else task, *ends) for task, *ends in rows.segments]
        found = rows.cache[key] = torch.tensor(table, dtype=torch.int64).view(-1, 3)
    return found


def _spread(rows: TaskRows, grad: Tensor | None, tasks: int, dtype: torch.dtype) -> Tensor | None:
    """A gradient of a short stack in one of all adapters."""
    if grad is None:
        return None
    return grad.new_zeros(tasks, *grad.shape[1:], dtype=dtype).index_copy_(0, _used(rows), grad.to(dtype))
