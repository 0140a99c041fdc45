"""Launches of the ``rlrr_linear_multi`` kernels as values, built from a cut of the rows and tables made of it.

Numbers and constants of a launch do not depend on the batch, so that one compiled kernel serves every batch of a layer.
Stacks of scales must be contiguous within a task. Tensors may be on any device, meta included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.dtypes import accumulate_dtype, matmul_precision
from rlrr_kernels.ops.host.launch import TL_ACCUMULATE, Launch, Plan
from rlrr_kernels.ops.linear.triton.launches import REDUCE_META, launch_meta, precision_of, rank_meta
from rlrr_kernels.ops.multi.task_index import BARE, Segments, TaskRows
from rlrr_kernels.ops.multi.triton import kernels
from rlrr_kernels.ops.multi.triton.path import Cut, lines_a_row

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


def table(rows: TaskRows, key: tuple, device: torch.device, entries: Callable[[], Sequence[tuple[int, ...]]]) -> Tensor:
    """A table of rows as an int32 tensor on a device, made and copied there once for all layers.

    The copy waits for the device, so a CUDA graph can be captured only after one call with the same TaskIndex.
    """
    found = rows.cache.get((key, device))
    if found is None:
        found = torch.tensor(entries(), dtype=torch.int32).to(device)
        rows.cache[key, device] = found
    return found


# ---------------------------------------------------------------- forward and ∂x


@_plans
def _forward_plan(
    count: int, strides: tuple[int, ...], weight_shape: torch.Size, col_shape: torch.Size, has_bias: bool,
    has_shift: bool, residual: bool, dtype: torch.dtype, precision: str, gpu: Gpu, tiles: Tiles,
) -> Plan:  # fmt: skip
    (N, K), (_, groups, rank, _) = weight_shape, col_shape
    meta = {
        **rank_meta("forward", rank, tiles, dtype, gpu), "RESIDUAL": residual, "HAS_BIAS": has_bias,
        "HAS_SHIFT": has_shift, "EVEN_K": K % tiles.block_k == 0, **launch_meta(dtype, gpu, precision, tiles),
    }  # fmt: skip
    grid = (groups * triton.cdiv(N // groups, tiles.block_n) * count,)
    return Plan(kernels.rlrr_linear_multi_fwd_kernel, grid, (N, K, N // groups, *strides), meta)


def forward_launch(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, shift: Tensor | None,
    residual: bool, tiled: Tensor, y: Tensor, gpu: Gpu, tiles: Tiles,
) -> Launch:  # fmt: skip
    """Rows of y [M, N] that are in tiles, a table [·, 3] of (task, first row, end row)."""
    strides = *x.stride(), *weight.stride(), scale_row.stride(0), scale_col.stride(0)
    plan = _forward_plan(
        len(tiled), strides, weight.shape, scale_col.shape, bias is not None, shift is not None, residual, x.dtype,
        matmul_precision(), gpu, tiles,
    )  # fmt: skip
    added = (x if bias is None else bias, x if shift is None else shift)
    return Launch(plan, (x, weight, scale_row, scale_col, *added, tiled, y))


@_plans
def _grad_x_plan(
    count: int, strides: tuple[int, ...], weight_shape: torch.Size, col_shape: torch.Size, residual: bool,
    dtype: torch.dtype, precision: str, gpu: Gpu, tiles: Tiles,
) -> Plan:  # fmt: skip
    (N, K), (_, groups, rank, _) = weight_shape, col_shape
    meta = {
        **rank_meta("grad_x", rank, tiles, dtype, gpu), "RESIDUAL": residual, "ONE_GROUP": groups == 1,
        "EVEN_N": N // groups % tiles.block_n == 0, **launch_meta(dtype, gpu, precision, tiles),
    }  # fmt: skip
    grid = (triton.cdiv(K, tiles.block_k) * count,)
    return Plan(kernels.rlrr_linear_multi_bwd_dx_kernel, grid, (N, K, N // groups, *strides), meta)


def grad_x_launch(
    grad_y: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, tiled: Tensor,
    grad_x: Tensor, gpu: Gpu, tiles: Tiles,
) -> Launch:  # fmt: skip
    """Rows of ∂x [M, K] that are in tiles, a table [·, 3] of (task, first row, end row)."""
    strides = *grad_y.stride(), *weight.stride(), scale_row.stride(0), scale_col.stride(0)
    plan = _grad_x_plan(
        len(tiled), strides, weight.shape, scale_col.shape, residual, grad_y.dtype,
        matmul_precision(), gpu, tiles,
    )  # fmt: skip
    return Launch(plan, (grad_y, weight, scale_row, scale_col, tiled, grad_x))


# ---------------------------------------------------------------- rows of many tasks in a tile

_SUM_BLOCK = 512


@_plans
def _mixed_plans(
    count: int, contracted: int, columns: int, groups_in: int, groups_out: int, strides: tuple[int, ...], rank: int,
    has_bias: bool, has_shift: bool, residual: bool, dtype: torch.dtype, precision: str, gpu: Gpu, tiles: Tiles,
) -> tuple[Plan, Plan | None, int]:  # fmt: skip
    """The products and, where they are in parts, the sum of these and how many values they have."""
    rows = tiles.block_m // lines_a_row(rank)
    programs = groups_out * triton.cdiv(columns, tiles.block_n) * triton.cdiv(count, rows)
    blocks = triton.cdiv(contracted, tiles.block_k)
    splits = configs.contraction_splits(blocks, programs * groups_in, tiles, gpu)
    span = triton.cdiv(blocks, splits) * tiles.block_k
    splits = triton.cdiv(contracted, span)
    parts = groups_in * splits
    added = {"HAS_BIAS": has_bias, "HAS_SHIFT": has_shift}
    product = Plan(
        kernels.rlrr_linear_multi_mixed_kernel,
        (programs, parts),
        (count, span, contracted, columns, groups_out, splits, *strides),
        {
            "RANK": rank, "RESIDUAL": residual, **(added if parts == 1 else dict.fromkeys(added, False)),
            "IN_PARTS": parts > 1, "EVEN": not (contracted % tiles.block_k or columns % tiles.block_n),
            "ACC": TL_ACCUMULATE[dtype], "PRECISION": precision_of(dtype, gpu, precision), "LINES": tiles.block_m,
            "BLOCK_R": rows, "BLOCK_C": tiles.block_k, "BLOCK_O": tiles.block_n, "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        },
    )  # fmt: skip
    if parts == 1:
        return product, None, 0
    width = groups_out * columns
    total = Plan(
        kernels.rlrr_linear_multi_mixed_sum_kernel,
        (triton.cdiv(width, _SUM_BLOCK) * count,),
        (count, width, parts),
        {**added, "BLOCK": _SUM_BLOCK, "num_warps": 4},
    )
    return product, total, parts * count * width


def mixed_launches(
    kernel: str, a: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: bool, rows: Tensor, out: Tensor, gpu: Gpu, tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """Rows of y [M, N] (kernel "forward", a = x) or ∂x [M, K] ("grad_x", a = g): a table [·, 2] of (row, task)."""
    (N, K), (_, groups, rank, _) = weight.shape, scale_col.shape
    of_row = scale_row, scale_row.stride(0), 0, 1, rank  # with strides by task, group, vector and column
    of_col = scale_col, scale_col.stride(0), rank * K, K, 1
    if kernel == "forward":
        sizes, before, after = (K, N // groups, 1, groups), of_col, of_row
        weight_strides = weight.stride(1), weight.stride(0)
    else:
        sizes, before, after = (N // groups, K, groups, 1), of_row, of_col
        weight_strides = weight.stride()
    product, total, size = _mixed_plans(
        len(rows), *sizes, (*a.stride(), *weight_strides, *before[1:], *after[1:]), rank, bias is not None,
        shift is not None, residual, a.dtype, matmul_precision(), gpu, tiles,
    )  # fmt: skip
    added = (a if bias is None else bias, a if shift is None else shift)
    given = a, weight, before[0], after[0], *added, rows
    if total is None:
        return (Launch(product, (*given, out)),)
    parts = a.new_empty(size, dtype=accumulate_dtype(a.dtype))
    return Launch(product, (*given, parts)), Launch(total, (parts, *added, rows, out))


# ---------------------------------------------------------------- forward or ∂x of a cut


def product_launches(
    kernel: str, a: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: bool, rows: TaskRows, cut: Cut, out: Tensor, gpu: Gpu,
) -> tuple[Launch, ...]:  # fmt: skip
    """The rows of y (kernel "forward", a = x) or ∂x ("grad_x", a = g) that a cut does not leave to the library."""
    launches: tuple[Launch, ...] = ()
    scales = weight, scale_row, scale_col
    if cut.tiled:
        tiled = table(rows, cut.tiled, a.device, lambda: cut.tiled)
        if kernel == "forward":
            launches += (forward_launch(a, *scales, bias, shift, residual, tiled, out, gpu, cut.tiles),)
        else:
            launches += (grad_x_launch(a, *scales, residual, tiled, out, gpu, cut.tiles),)
    if cut.mixed:
        mixed = table(
            rows, ("mixed", cut.mixed), a.device,
            lambda: [(row, task) for task, first, end in cut.mixed for row in range(first, end)],
        )  # fmt: skip
        launches += mixed_launches(kernel, a, *scales, bias, shift, residual, mixed, out, gpu, cut.mixed_tiles)
    return launches


# ---------------------------------------------------------------- gradients of the scales

_REST_M = 16


def parts_of(segments: Segments, rows_a_part: int, block: int) -> tuple[Segments, Segments]:
    """Segments in nearly equal parts of whole blocks, and of each task (task, first part, end part)."""
    parts: list[tuple[int, int, int]] = []
    tasks: list[tuple[int, int, int]] = []
    for task, first, end in segments:
        begun = len(parts)
        size = -(-(end - first) // -(-(end - first) // rows_a_part))
        size = -(-size // block) * block
        parts += [(task, start, min(start + size, end)) for start in range(first, end, size)]
        if task != BARE:
            tasks.append((task, begun, len(parts)))
    return tuple(parts), tuple(tasks)


@_plans
def _grad_scales_plans(
    parts: int, tasks: int, strides: tuple[int, ...], weight_shape: torch.Size, weight_itemsize: int,
    col_shape: torch.Size, needs: tuple[bool, bool, bool, bool], dtype: torch.dtype, precision: str, gpu: Gpu,
    tiles: Tiles,
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """The launch of the partial sums, that of their reduction, and how many values the former writes."""
    (N, K), (_, groups, rank, _) = weight_shape, col_shape
    need_row, need_col, need_bias, need_shift = needs
    tiles_k, tiles_per_group = triton.cdiv(K, tiles.block_k), triton.cdiv(N // groups, tiles.block_n)
    sizes = [size if need else 0 for size, need in zip((N * rank, groups * rank * K, N, N), needs, strict=True)]
    row_size, col_size, bias_size, shift_size = sizes
    col_offset = parts * tiles_k * row_size
    sum_offset = col_offset + parts * tiles_per_group * col_size
    need_sum = need_bias or need_shift
    partial = Plan(
        kernels.rlrr_linear_multi_bwd_scales_kernel,
        (tiles_k + need_sum, groups * tiles_per_group, parts),
        (col_offset, sum_offset, N, K, N // groups, *strides),
        {
            **rank_meta("grad_scales", rank, tiles, dtype, gpu, weight_itemsize), "NEED_ROW": need_row,
            "NEED_COL": need_col, "NEED_SUM": need_sum, "REST_M": _REST_M, **launch_meta(dtype, gpu, precision, tiles),
        },
    )  # fmt: skip
    reduction = Plan(
        kernels.rlrr_linear_multi_bwd_reduce_kernel,
        (sum(triton.cdiv(size, REDUCE_META["BLOCK"]) for size in sizes), tasks),
        (col_offset, sum_offset, tiles_k, row_size, tiles_per_group, col_size, shift_size, bias_size, parts),
        REDUCE_META,
    )
    return partial, reduction, sum_offset + parts * N * need_sum


def grad_scales_launches(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], rows: TaskRows, gpu: Gpu,
    tiles: Tiles,
) -> tuple[Launch, Launch]:  # fmt: skip
    """Partial sums over parts of the tasks' rows, then their reduction into ``grads`` = (∂s_r, ∂s_c, ∂b, ∂f).

    A gradient that is not needed is None. Gradients of tasks without rows are left as they are; some task must have
    rows.
    """
    N, (_, groups, _, K) = weight.shape[0], scale_col.shape
    programs = triton.cdiv(K, tiles.block_k) * groups * triton.cdiv(N // groups, tiles.block_n)
    splits = configs.splits_for(rows.count, tiles, programs, gpu)
    rows_a_part = max(1, triton.cdiv(triton.cdiv(rows.count, splits), tiles.block_m)) * tiles.block_m
    key = "parts", rows_a_part, tiles.block_m, grads[2] is not None
    if key not in rows.cache:
        segments = tuple(s for s in rows.segments if s[0] != BARE or grads[2] is not None)
        rows.cache[key] = parts_of(segments, rows_a_part, tiles.block_m)
    parts, tasks = rows.cache[key]
    strides = *grad_y.stride(), *x.stride(), *weight.stride(), scale_row.stride(0), scale_col.stride(0)
    needs = tuple(grad is not None for grad in grads)
    partial, reduction, size = _grad_scales_plans(
        len(parts), len(tasks), strides, weight.shape, weight.itemsize, scale_col.shape, needs, grad_y.dtype,
        matmul_precision(), gpu, tiles,
    )  # fmt: skip
    part_table = table(rows, (key, "rows"), x.device, lambda: parts)
    task_table = table(rows, (key, "tasks"), x.device, lambda: tasks)
    sums = grad_y.new_empty(size, dtype=accumulate_dtype(grad_y.dtype))
    row, col, bias, shift = (sums if grad is None else grad for grad in grads)
    return (
        Launch(partial, (grad_y, x, weight, scale_row, scale_col, part_table, sums)),
        Launch(reduction, (sums, task_table, row, col, shift, bias)),
    )
