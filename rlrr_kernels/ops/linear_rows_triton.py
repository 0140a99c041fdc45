"""The scale gradients of ``rlrr_linear`` from a sample of rows, in Triton: the kernel and its launcher.

x arrives gathered, since only its sampled rows were kept; rows of g are gathered on their way into the product. A
program sums rows of one weight alone and multiplies its fp32 sum by it once, so the weights cost no digits. ∂b stays
exact: programs beside those of the product sum all of g, each about as many rows as the others, in the same launch.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.ops import linear_configs
from rlrr_kernels.ops.launch import Launch, Plan, cdiv
from rlrr_kernels.ops.linear_kernels import store_scale_parts
from rlrr_kernels.ops.linear_launches import launch_meta, plan_reduction, precision_of
from rlrr_kernels.ops.linear_torch import accumulate_dtype
from rlrr_kernels.ops.row_sample import RowSample

_MOST_BIAS_COLUMNS = 16
"""Of the grid: a sample of very few rows must not cut the sum over all of g into thousands of parts."""


@triton.jit(do_not_specialize=["weight_bits"])
def _rlrr_linear_bwd_sampled_scales_kernel(
    g_ptr, x_ptr, index_ptr, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, bias_offset,
    M, N, K, group_size, S, kept, weight_bits, rows_per_split, rows_per_sum,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums of ∂s_r = (Ĝ ⊙ W) s_cᵀ and ∂s_c = s_rᵀ (Ĝ ⊙ W) over one split of the sample, and of ∂b = Σ g.

    Ĝ = Σ_{i < kept} g[index[i]]ᵀ x[i] + weight Σ_{i ≥ kept} g[index[i]]ᵀ x[i]. g [M, N], x [S, K], index [S], w [N, K],
    row [N, r], col [G, r, K]. parts as :func:`store_scale_parts` says, and at bias_offset [sums, N] for ∂b. Grid:
    (tiles of K, and more that sum rows_per_sum rows of g each when NEED_BIAS; tiles of N; splits), splits of the kept
    rows before those of the others. weight_bits are a
    float64's: a float argument would arrive as fp32.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0)
    pid_n = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = (pid_n // tiles_per_group) * group_size + local_n
    lanes_m = tl.arange(0, BLOCK_M)
    column_ptrs = g_ptr + offs_n[:, None].to(tl.int64) * stride_gn
    step = tl.full((), BLOCK_M, tl.int64)
    if NEED_BIAS and pid_k >= tiles_k:
        part = (pid_k - tiles_k) * tl.num_programs(2) + split
        first = part * rows_per_sum
        rows_here = tl.minimum(M - first, rows_per_sum).to(tl.int32)
        g_ptrs = column_ptrs + (first + lanes_m)[None, :] * stride_gm
        total = tl.zeros((BLOCK_N,), ACC)
        for start in range(0, rows_here, BLOCK_M):
            g = tl.load(g_ptrs, mask=mask_n[:, None] & (start + lanes_m < rows_here)[None, :], other=0.0)
            total += tl.sum(g.to(ACC), 1)
            g_ptrs += step * stride_gm
        tl.store(parts_ptr + bias_offset + part * N + offs_n, total, mask=mask_n)
    else:
        kept_splits = tl.cdiv(kept, rows_per_split)
        counts_once = split < kept_splits
        first = tl.where(counts_once, split * rows_per_split, kept + (split - kept_splits) * rows_per_split)
        end = tl.where(counts_once, kept, S)
        rows_here = tl.minimum(end - first, rows_per_split).to(tl.int32)
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        index_ptrs = index_ptr + first + lanes_m
        x_ptrs = x_ptr + (first + lanes_m)[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for start in range(0, rows_here, BLOCK_M):
            if EVEN_M:
                index = tl.load(index_ptrs).to(tl.int64)
                g = tl.load(column_ptrs + index[None, :] * stride_gm, mask=mask_n[:, None], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            else:
                mask_m = start + lanes_m < rows_here
                index = tl.load(index_ptrs, mask=mask_m, other=0).to(tl.int64)
                g = tl.load(column_ptrs + index[None, :] * stride_gm, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :] & mask_m[:, None], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
            index_ptrs += BLOCK_M
            x_ptrs += step * stride_xm
        weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
        acc *= tl.where(counts_once, 1.0, weight)
        store_scale_parts(
            acc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            pid_k, pid_n, split, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def _bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes
def _plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], x_shape: torch.Size, x_strides: tuple[int, int],
    weight_strides: tuple[int, int], col_shape: torch.Size, kept: int, row_weight: float,
    needs: tuple[bool, bool, bool], dtype: torch.dtype, precision: str, arch: str, tiles: linear_configs.Tiles,
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """How the sample and g are cut into partial sums, how these are added up, and how many there are."""
    (count, rows), (size, cols), (groups, rank, _) = grad_shape, x_shape, col_shape
    need_row, need_col, need_bias = needs
    tiles_k, tiles_per_group = cdiv(cols, tiles.block_k), cdiv(rows // groups, tiles.block_n)
    wanted = linear_configs.splits_for(size, tiles, tiles_k * tiles_per_group * groups, arch)
    rows_per_split = max(1, cdiv(cdiv(size, wanted), tiles.block_m)) * tiles.block_m
    splits = max(1, cdiv(kept, rows_per_split) + cdiv(size - kept, rows_per_split))
    columns = min(_MOST_BIAS_COLUMNS, max(1, cdiv(cdiv(count, rows_per_split), splits))) if need_bias else 0
    rows_per_sum = max(1, cdiv(cdiv(count, max(1, columns * splits)), tiles.block_m)) * tiles.block_m
    reduction, col_offset, bias_offset, values = plan_reduction(
        row=(splits * tiles_k, rows * rank) if need_row else (0, 0),
        col=(splits * tiles_per_group, groups * rank * cols) if need_col else (0, 0),
        bias=(splits * columns, rows) if need_bias else (0, 0),
    )
    partial = Plan(
        _rlrr_linear_bwd_sampled_scales_kernel,
        (tiles_k + columns, groups * tiles_per_group, splits),
        (
            col_offset, bias_offset, count, rows, cols, rows // groups, size, kept, _bits(row_weight),
            rows_per_split, rows_per_sum, *grad_strides, *x_strides, *weight_strides,
        ),
        {
            "RANK": rank, "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": need_bias,
            "EVEN_M": kept % tiles.block_m == 0 and size % tiles.block_m == 0, **launch_meta(dtype, precision, tiles),
        },
    )  # fmt: skip
    return partial, reduction, values


def grad_scales_launches(
    grad_y: Tensor,
    x: Tensor,
    sample: RowSample,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, Launch]:
    """Partial sums of ∂s_r and ∂s_c from x [S, K] and its rows of grad_y [M, N], of ∂b from all of it; their reduction.

    ``grads`` = (∂s_r, ∂s_c, ∂b); one that is not needed is None. The scales must be contiguous.
    """
    needs, dtype = tuple(grad is not None for grad in grads), grad_y.dtype
    if dtype.itemsize == 2:
        # Rows of g wait for their numbers, which takes the compiler's pipeline a stage for every one of the product's.
        tiles = tiles._replace(stages=2 * tiles.stages - 1)
    kept = x.shape[0] if sample.weight == 1 else sample.kept
    partial, reduction, values = _plans(
        grad_y.shape, grad_y.stride(), x.shape, x.stride(), weight.stride(), scale_col.shape, kept, sample.weight,
        needs, dtype, precision_of(dtype), arch, tiles,
    )  # fmt: skip
    parts = torch.empty(values, dtype=accumulate_dtype(dtype), device=grad_y.device)
    outputs = [parts if grad is None else grad for grad in grads]
    return (
        Launch(partial, (grad_y, x, sample.index.contiguous(), weight, scale_row, scale_col, parts)),
        Launch(reduction, (parts, *outputs)),
    )
