"""``rlrr_linear_multi`` in Triton: which way the rows of each task go, the launches, and the tensors they write.

One task's batch is ``rlrr_linear``'s. Where a kernel gives way (:mod:`rlrr_kernels.ops.host.guard`) each task is merged
for the vendor library's products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlrr_kernels.devices import Gpu, gpu_of
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice.tiles import Operand, Product
from rlrr_kernels.ops.dtypes import accumulate_dtype, matmul_precision
from rlrr_kernels.ops.host import guard
from rlrr_kernels.ops.linear import first_use
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.multi import loop_backend
from rlrr_kernels.ops.multi.loop_backend import Needs
from rlrr_kernels.ops.multi.task_index import BARE, Segments, TaskRows
from rlrr_kernels.ops.multi.triton.launches import grad_scales_launches, product_launches
from rlrr_kernels.ops.multi.triton.path import LEAST_RUN, MOST_MIXED_ROWS, Cut, cut_rows, may_mix


def takes_runs(x: Tensor, weight: Tensor, rank: int, rows: TaskRows, per_sample: int) -> bool:
    """Whether :func:`forward` may be given ``rows`` whose tasks' samples are no neighbours, rather than sort x and y.

    Long runs fill tiles of their own and few rows are mixed; but a task that has so many in all that it is merged, and
    the bare W, take one product for all their rows.
    """
    few = rows.count <= MOST_MIXED_ROWS and may_mix(rank, x.dtype, weight.dtype)
    long = per_sample >= LEAST_RUN and sum(task == BARE for task, _, _ in rows.segments) < 2
    of = gpu_of(x.device), matmul_precision(), x.device, x.dtype, weight.dtype
    return (few or long) and store.path_choice(*of, rows.most, weight.shape, rank).path != "merge"


def cut_of(
    kernel: str, a: Tensor, weight: Tensor, scale_col: Tensor, rows: TaskRows, gpu: Gpu, path: str | None = None
) -> Cut:
    """Which way the rows of each task go in the forward (a = x) or ∂x (kernel "grad_x", a = g).

    ``path`` forces ``fused``, so that no task is merged, or ``merge``.
    """
    rank = scale_col.shape[2]
    product = Product.of(kernel, gpu, a, weight, weight.dtype, rank)
    precision, kinds = matmul_precision(), (a.device, a.dtype, weight.dtype)
    key = product._replace(first=Operand((0, 0), a.stride(), 0, True)), precision, path
    if key not in rows.cache:

        def merges(first: int, end: int) -> bool:
            choice = store.path_choice(gpu, precision, *kinds, end - first, weight.shape, rank)
            return (path or choice.path) == "merge"

        rows.cache[key] = cut_rows(rows.segments, product, merges)
    return rows.cache[key]


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
    path: str | None = None,
) -> Tensor:
    """y [M, N] of rows x [M, K], a task's next to each other or as :func:`takes_runs` allows.

    weight [N, K], scale_row [T, N, r], scale_col [T, G, r, K], bias [N], shift [T, N]. ``path`` as in :func:`cut_of`.
    """
    given = x, weight, scale_row, scale_col, bias, shift
    y = x.new_empty(x.shape[0], weight.shape[0])
    if len(rows.segments) < 2 or not y.numel():
        return loop_backend.forward(*given, rows, residual, backend=_linear_backend(path))
    bias, shift = (None if t is None else t.contiguous() for t in (bias, shift))
    stacks, gpu = (_within_tasks(scale_row), _within_tasks(scale_col)), gpu_of(x.device)
    cut = cut_of("forward", x, weight, scale_col, rows, gpu, path)
    launches = product_launches("forward", x, weight, *stacks, bias, shift, residual, rows, cut, y, gpu)

    def find_error() -> str | None:
        def of(task: int, own: slice) -> str | None:
            scales, tf32 = (scale_row[task], scale_col[task]), first_use.in_tf32(launches)
            added = loop_backend.bias_of(task, bias, shift)
            return first_use.forward_error(x[own], weight, *scales, added, residual, y[own], tf32)

        return _error_of((cut.tiled, cut.mixed), of)

    library = cut.library if not launches or guard.ran(launches, path is not None, find_error) else rows.segments
    for task, first, end in library:
        merged = _merged(task, weight, scale_row, scale_col, residual, x.dtype, path)
        own, plus = (x[first:end], merged.t()), loop_backend.bias_of(task, bias, shift)
        if plus is None:
            torch.mm(*own, out=y[first:end])
        else:
            torch.addmm(plus.to(x.dtype), *own, out=y[first:end])
    return y


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
    path: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row, scale_col, bias [N] and shift [T, N]; None where ``needs`` says so.

    Those of scales have their scale's dtype, those of bias and shift are fp32 (fp64 for float64); adapters without rows
    get zeros. ``x`` may be None when no scale gradient is needed.
    """
    need_x, need_row, need_col, *need_sums = needs
    given = grad_y, x, weight, scale_row, scale_col, rows, residual
    segments = rows.segments
    if len(segments) < 2 or not weight.numel():
        return loop_backend.backward(*given, needs, backend=_linear_backend(path))
    gpu = gpu_of(grad_y.device)
    stacks = _within_tasks(scale_row), _within_tasks(scale_col)
    grad_x = _grad_x(grad_y, *given[2:], stacks, gpu, path) if need_x else None
    if not (need_row or need_col):
        return grad_x, None, None, *_sums(grad_y, scale_row.shape[0], segments, *need_sums)
    wide, tasks = accumulate_dtype(grad_y.dtype), scale_row.shape[0]
    new = torch.empty if sum(task != BARE for task, _, _ in segments) == tasks else torch.zeros
    shapes = (
        (scale_row.shape, scale_row.dtype), (scale_col.shape, scale_col.dtype), (weight.shape[:1], wide),
        ((tasks, weight.shape[0]), wide),
    )  # fmt: skip
    grads = tuple(
        new(shape, dtype=dtype, device=grad_y.device) if need else None
        for need, (shape, dtype) in zip(needs[1:], shapes, strict=True)
    )
    tiles = store.choose_tiles(
        "grad_scales", gpu, matmul_precision(), x, grad_y, weight.dtype, scale_col.shape[2], sampled=True
    )
    launches = grad_scales_launches(grad_y, x, weight, *stacks, grads, rows, gpu, tiles)

    def find_error() -> str | None:
        def of(task: int, own: slice) -> str | None:
            found = tuple(None if grad is None else grad[task] for grad in (grads[0], grads[1], grads[3]))
            scales, tf32 = (scale_row[task], scale_col[task]), first_use.in_tf32(launches)
            return first_use.grad_scales_error(grad_y[own], x[own], weight, *scales, found, tf32)

        return _error_of((segments,), of)

    if not guard.ran(launches, path is not None, find_error):
        grads = loop_backend.backward(*given, (False, *needs[1:]), backend=_linear_backend(path))[1:]
    return grad_x, *grads


def _grad_x(grad_y, weight, scale_row, scale_col, rows, residual, stacks, gpu, path) -> Tensor:
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    cut = cut_of("grad_x", grad_y, weight, scale_col, rows, gpu, path)
    launches = product_launches("grad_x", grad_y, weight, *stacks, None, None, residual, rows, cut, grad_x, gpu)

    def find_error() -> str | None:
        def of(task: int, own: slice) -> str | None:
            scales, tf32 = (scale_row[task], scale_col[task]), first_use.in_tf32(launches)
            return first_use.grad_x_error(grad_y[own], weight, *scales, residual, grad_x[own], tf32)

        return _error_of((cut.tiled, cut.mixed), of)

    library = cut.library if not launches or guard.ran(launches, path is not None, find_error) else rows.segments
    for task, first, end in library:
        merged = _merged(task, weight, scale_row, scale_col, residual, grad_y.dtype, path)
        torch.mm(grad_y[first:end], merged, out=grad_x[first:end])
    return grad_x


def _linear_backend(path: str | None) -> str:
    return f"triton.{path}" if path else "triton"


def _within_tasks(scale: Tensor) -> Tensor:
    """A stack whose tasks' scales are contiguous, and which is copied only where it is not that: nor is one of ones
    that share an element, whose tasks share a copy."""
    if scale[0].is_contiguous():
        return scale
    return scale.contiguous() if scale.stride(0) else scale[0].contiguous().expand(scale.shape)


def _merged(task, weight, scale_row, scale_col, residual, dtype, path) -> Tensor:
    """W' of a task, or W for the bare backbone."""
    if task == BARE:
        return weight.to(dtype)
    return linear_triton.merge(weight, scale_row[task], scale_col[task], residual, dtype, path)


def _sums(
    grad_y: Tensor, tasks: int, segments: Segments, need_bias: bool, need_shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """∂b [N] and ∂f [T, N]."""
    wide = accumulate_dtype(grad_y.dtype)
    grad_shift = grad_y.new_zeros(tasks, grad_y.shape[1], dtype=wide) if need_shift else None
    for task, first, end in segments:
        if grad_shift is not None and task != BARE:
            torch.sum(grad_y[first:end], 0, dtype=wide, out=grad_shift[task])
    return grad_y.sum(0, dtype=wide) if need_bias else None, grad_shift


def _error_of(kinds: tuple[Segments, ...], of: Callable[[int, slice], str | None]) -> str | None:
    """What is wrong with the rows of the first and the last task of each kind; None for nothing."""
    for segments in kinds:
        tasks = [segment for segment in segments if segment[0] != BARE]
        for task, first, end in dict.fromkeys(tasks[:1] + tasks[-1:]):
            if error := of(task, slice(first, end)):
                return error
    return None
