"""The scale gradients of ``rlrr_linear`` from a sample of rows, in Triton: the kernels and their launcher.

x arrives gathered, since only its sampled rows were kept; rows of g are gathered on their way into the product. A
program sums rows of one weight alone and multiplies its fp32 sum by it once, so the weights cost no digits.

∂b stays exact. A sample with images wants the sum of g over each: a launch before the product makes these sums, of
which ∂b is the sum, and of them and the drawn rows the one row an image that the product takes beside the sample's.
Without images, programs beside those of the product sum all of g, each about as many rows as the others.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.host.launch import TL_ACCUMULATE, Launch, Plan
from rlrr_kernels.ops.linear.triton.kernels import store_scale_parts
from rlrr_kernels.ops.linear.triton.launches import PartialSums, launch_meta, rank_meta
from rlrr_kernels.ops.sampling.row_sample import RowSample

_MOST_BIAS_COLUMNS = 16
"""Of the grid: a sample of very few rows must not cut the sum over all of g into thousands of parts."""

_MEANS_BLOCK = 64
"""Columns of g or x that a program of the means takes."""


@triton.jit
def _sum_rows(
    ptr, index_ptr, rows, stride_row, mask,
    GATHERED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Σ of ``rows`` rows [BLOCK] in ACC: the first ones from ptr on or, GATHERED, those that index_ptr names."""
    total = tl.zeros((BLOCK_ROWS, BLOCK), ACC)
    for start in range(0, rows, BLOCK_ROWS):
        lanes = start + tl.arange(0, BLOCK_ROWS)
        here = lanes < rows
        row = tl.load(index_ptr + lanes, mask=here, other=0).to(tl.int64) if GATHERED else lanes.to(tl.int64)
        total += tl.load(ptr + row[:, None] * stride_row, mask=here[:, None] & mask[None, :], other=0.0).to(ACC)
    # Sums of eight first: in sequence they have 1.5 times eager's error.
    return tl.sum(tl.sum(tl.reshape(total, (BLOCK_ROWS // 8, 8, BLOCK)), 1), 0)


@triton.jit(do_not_specialize=["weight_bits"])
def _rlrr_linear_bwd_image_means_kernel(
    g_ptr, x_ptr, index_ptr, missed_ptr, mean_ptr, parts_ptr, bias_offset, weight_bits,
    N, K, tokens, kept, drawn, stride_gm, stride_gn, stride_xm, stride_xk,
    NEED_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """u / n of each image in missed [B, N], x̄ of its drawn rows in mean [B, K], and Σ g [B, N] in parts for ∂b.

    u = Σ_P g - weight Σ_drawn g, where the P rows are those of the image's ``tokens`` that are not kept, and n =
    ``drawn`` of them are. kept and drawn count an image's entries of index [B kept + B drawn]. g [B tokens, N],
    x [B kept + B drawn, K]. Grid: (B, tiles of N, then of K).
    """
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK)
    index_ptr += image * kept
    first_drawn = (tl.num_programs(0) - image) * kept + image * drawn
    if tile < tiles_n:
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        mask = offs < N
        ptrs = g_ptr + offs[None, :].to(tl.int64) * stride_gn
        own = ptrs + image * tokens * stride_gm
        total = _sum_rows(own, index_ptr, tokens, stride_gm, mask, False, ACC, BLOCK, BLOCK_ROWS)
        once = _sum_rows(ptrs, index_ptr, kept, stride_gm, mask, True, ACC, BLOCK, BLOCK_ROWS)
        some = _sum_rows(ptrs, index_ptr + first_drawn, drawn, stride_gm, mask, True, ACC, BLOCK, BLOCK_ROWS)
        weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
        missed = (total - once - weight * some) / drawn
        tl.store(missed_ptr + image * N + offs, missed.to(missed_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            tl.store(parts_ptr + bias_offset + image * N + offs, total, mask=mask)
    else:
        offs = (tile - tiles_n) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < K
        ptrs = x_ptr + (image * kept + first_drawn) * stride_xm + offs[None, :].to(tl.int64) * stride_xk
        mean = _sum_rows(ptrs, index_ptr, drawn, stride_xm, mask, False, ACC, BLOCK, BLOCK_ROWS) / drawn
        tl.store(mean_ptr + image * K + offs, mean.to(mean_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["weight_bits"])
def _rlrr_linear_bwd_sampled_scales_kernel(
    g_ptr, x_ptr, index_ptr, w_ptr, row_ptr, col_ptr, missed_ptr, mean_ptr, parts_ptr, col_offset, bias_offset,
    M, N, K, group_size, S, kept, images, weight_bits, rows_per_split, rows_per_sum,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr,
    NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, EVEN_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums of ∂s_r = (Ĝ ⊙ W) s_cᵀ and ∂s_c = s_rᵀ (Ĝ ⊙ W) over one split of the sample, and of ∂b = Σ g.

    Ĝ = Σ_{i < kept} g[index[i]]ᵀ x[i] + weight Σ_{i ≥ kept} g[index[i]]ᵀ x[i] and, CENTRED, n Σ_b missed[b]ᵀ mean[b],
    n of the other rows being an image's. g [M, N], x [S, K], index [S], w [N, K], row [N, r], col [G, r, K], missed
    [images, N], mean [images, K]. parts as :func:`store_scale_parts` says, and at bias_offset [sums, N] for ∂b. Grid:
    (tiles of K, and more that sum rows_per_sum rows of g each when NEED_BIAS; tiles of N; splits), splits of the kept
    rows before those of the means, and these before those of the others. weight_bits are a float64's: a float argument
    would arrive as fp32.
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
        mean_splits = tl.cdiv(images, rows_per_split) if CENTRED else 0
        counts_once = split < kept_splits
        is_mean = CENTRED and (split >= kept_splits) & (split < kept_splits + mean_splits)
        before = kept_splits + mean_splits
        first = tl.where(counts_once, split * rows_per_split, kept + (split - before) * rows_per_split)
        end = tl.where(counts_once, kept, S)
        if CENTRED:
            first = tl.where(is_mean, (split - kept_splits) * rows_per_split, first)
            end = tl.where(is_mean, images, end)
            column_ptrs = tl.where(is_mean, missed_ptr, g_ptr) + offs_n[:, None].to(tl.int64) * stride_gn
            stride_gm = tl.where(is_mean, N, stride_gm)
            x_ptr = tl.where(is_mean, mean_ptr, x_ptr)
            stride_xm = tl.where(is_mean, K, stride_xm)
        rows_here = tl.minimum(end - first, rows_per_split).to(tl.int32)
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        index_ptrs = index_ptr + first + lanes_m
        row_numbers = first + lanes_m
        x_ptrs = x_ptr + row_numbers[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for start in range(0, rows_here, BLOCK_M):
            if EVEN_M:
                index = tl.load(index_ptrs).to(tl.int64)
                if CENTRED:
                    index = tl.where(is_mean, start + row_numbers, index)
                g = tl.load(column_ptrs + index[None, :] * stride_gm, mask=mask_n[:, None], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            else:
                mask_m = start + lanes_m < rows_here
                index = tl.load(index_ptrs, mask=mask_m, other=0).to(tl.int64)
                if CENTRED:
                    index = tl.where(is_mean, start + row_numbers, index)
                g = tl.load(column_ptrs + index[None, :] * stride_gm, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :] & mask_m[:, None], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
            index_ptrs += BLOCK_M
            x_ptrs += step * stride_xm
        weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
        if CENTRED:
            weight = tl.where(is_mean, ((S - kept) // images).to(ACC), weight)
        acc *= tl.where(counts_once, 1.0, weight)
        store_scale_parts(
            acc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            pid_k, pid_n, split, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K, DOT_RANK, DOT_PRECISION,
        )  # fmt: skip


def _bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes
def _plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], x_shape: torch.Size, x_strides: tuple[int, int],
    weight_strides: tuple[int, int], weight_itemsize: int, col_shape: torch.Size, kept: int, row_weight: float,
    images: int, needs: tuple[bool, bool, bool], dtype: torch.dtype, gpu: Gpu, precision: str,
    tiles: configs.Tiles,
) -> tuple[Plan | None, Plan, PartialSums]:  # fmt: skip
    """The launch of the images' means, that of the partial sums, and how these are added up."""
    (M, N), (S, K), (groups, rank, _) = grad_shape, x_shape, col_shape
    need_row, need_col, need_bias = needs
    tiles_k, tiles_per_group = triton.cdiv(K, tiles.block_k), triton.cdiv(N // groups, tiles.block_n)
    wanted = configs.splits_for(S, tiles, tiles_k * tiles_per_group * groups, gpu)
    rows_per_split = max(1, triton.cdiv(triton.cdiv(S, wanted), tiles.block_m)) * tiles.block_m
    splits = max(1, sum(triton.cdiv(part, rows_per_split) for part in (kept, images, S - kept)))
    sums_bias = need_bias and not images
    columns = min(_MOST_BIAS_COLUMNS, max(1, triton.cdiv(triton.cdiv(M, rows_per_split), splits))) if sums_bias else 0
    rows_per_sum = max(1, triton.cdiv(triton.cdiv(M, max(1, columns * splits)), tiles.block_m)) * tiles.block_m
    counts = splits * tiles_k, splits * tiles_per_group, images or splits * columns
    sums = PartialSums.of(counts, needs, N, col_shape)
    partial = Plan(
        _rlrr_linear_bwd_sampled_scales_kernel,
        (tiles_k + columns, groups * tiles_per_group, splits),
        (
            sums.col_offset, sums.bias_offset, M, N, K, N // groups, S, kept, images, _bits(row_weight),
            rows_per_split, rows_per_sum, *grad_strides, *x_strides, *weight_strides,
        ),
        {
            **rank_meta("grad_scales", rank, tiles, dtype, gpu, weight_itemsize),
            "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": sums_bias, "CENTRED": images > 0,
            "EVEN_M": not any(part % tiles.block_m for part in (kept, images, S)),
            **launch_meta(dtype, gpu, precision, tiles),
        },
    )  # fmt: skip
    if not images:
        return None, partial, sums
    means = Plan(
        _rlrr_linear_bwd_image_means_kernel,
        (images, triton.cdiv(N, _MEANS_BLOCK) + triton.cdiv(K, _MEANS_BLOCK)),
        (
            sums.bias_offset, _bits(row_weight), N, K, M // images, kept // images, (S - kept) // images,
            *grad_strides, *x_strides,
        ),
        {
            "NEED_BIAS": need_bias, "ACC": TL_ACCUMULATE[dtype],
            "BLOCK": _MEANS_BLOCK, "BLOCK_ROWS": 64, "num_warps": 8,
        },
    )  # fmt: skip
    return means, partial, sums


def grad_scales_launches(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    sample: RowSample,
    gpu: Gpu,
    precision: str,
    tiles: configs.Tiles,
) -> tuple[Launch, ...]:
    """Partial sums of ∂s_r and ∂s_c from x [S, K] and its rows of grad_y [M, N], of ∂b from all of it; their reduction.

    For a sample with images, its means come first. ``grads`` = (∂s_r, ∂s_c, ∂b); one that is not needed is None. The
    scales must be contiguous.
    """
    needs, dtype = tuple(grad is not None for grad in grads), grad_y.dtype
    if dtype.itemsize == 2:
        # Rows of g wait for their numbers, which takes the compiler's pipeline a stage for every one of the product's.
        tiles = tiles._replace(stages=2 * tiles.stages - 1)
    index, kept, row_weight, images = sample
    index = index.contiguous()
    if images:
        # Rows of g and x, and those of the means beside them, must have one stride within a row.
        grad_y, x = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (grad_y, x))
    elif row_weight == 1:
        kept = x.shape[0]
    means, partial, sums = _plans(
        grad_y.shape, grad_y.stride(), x.shape, x.stride(), weight.stride(), weight.itemsize, scale_col.shape, kept,
        row_weight, images, needs, dtype, gpu, precision, tiles,
    )  # fmt: skip
    missed, mean = grad_y, x
    if means is not None:
        missed, mean = (tensor.new_empty(images, tensor.shape[1]) for tensor in (grad_y, x))
    tensors = grad_y, x, index, weight, scale_row, scale_col, missed, mean
    launches = sums.launches(partial, tensors, grads)
    if means is None:
        return launches
    return (Launch(means, (grad_y, x, index, missed, mean, launches[0].tensors[-1])), *launches)
