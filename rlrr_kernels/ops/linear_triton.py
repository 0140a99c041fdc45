"""``rlrr_linear`` in Triton: the kernels and their launchers.

Names: M rows of x, N rows and K columns of W, r rank, G groups of N / G rows. Tiles of W never straddle two groups, so
each tile uses one row of s_c. The weight tile is the *first* operand of its product (the kernels compute yᵀ and ∂xᵀ):
on Hopper ``wgmma`` takes that one from registers, so the rescaled tile does not travel through shared memory again.
Scales, 1 + s_r s_c and sums are fp32 (fp64 for float64).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.ops import linear_configs, tuned_tiles
from rlrr_kernels.ops.launch import TL_ACCUMULATE, Launch, Plan, cdiv, check_interpreter
from rlrr_kernels.ops.linear_torch import accumulate_dtype
from rlrr_kernels.ops.row_sample import RowSample

UNROLLED_RANK = tl.constexpr(linear_configs.UNROLLED_RANK)

# ---------------------------------------------------------------- kernels


@triton.jit
def _outer(row, col, TRANSPOSED: tl.constexpr, ACC: tl.constexpr):
    """row [n] times col [k]: [n, k] or, TRANSPOSED, [k, n]."""
    axis_n: tl.constexpr = 0 if TRANSPOSED else 1
    axis_k: tl.constexpr = 1 if TRANSPOSED else 0
    return tl.expand_dims(row.to(ACC), axis_n) * tl.expand_dims(col.to(ACC), axis_k)


@triton.jit
def _factor(
    row, col, row_ptr, col_ptr, offs_n, offs_k, mask_n, mask_k, cols,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, TRANSPOSED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 + s_r s_c of a tile, [n, k] or, TRANSPOSED, [k, n]. row_ptr [N, r]; col_ptr [r, K], already at its group.

    ``row`` and ``col`` are the first of the r pairs of vectors: the caller loads them, once where its loop lets it.
    """
    factor = _outer(row, col, TRANSPOSED, ACC)
    if RANK <= UNROLLED_RANK:
        # A loop inside the product's loop would keep the compiler from pipelining the latter.
        for j in tl.static_range(1, RANK):
            row = tl.load(row_ptr + offs_n * RANK + j, mask=mask_n, other=0.0)
            col = tl.load(col_ptr + j * cols + offs_k, mask=mask_k, other=0.0)
            factor += _outer(row, col, TRANSPOSED, ACC)
    else:
        for j in range(1, RANK):
            row = tl.load(row_ptr + offs_n * RANK + j, mask=mask_n, other=0.0)
            col = tl.load(col_ptr + j * cols + offs_k, mask=mask_k, other=0.0)
            factor += _outer(row, col, TRANSPOSED, ACC)
    return factor + 1.0 if RESIDUAL else factor


@triton.jit
def _rlrr_linear_fwd_kernel(
    x_ptr, w_ptr, row_ptr, col_ptr, bias_ptr, y_ptr,
    M, N, K, group_size, span,
    stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """yᵀ [N, M] = (W ⊙ (1 + s_r s_c)) xᵀ + b, one read of W, accumulated in ACC; y is stored as [M, N].

    x [M, K], w [N, K], row [N, r], col [G, r, K], bias [N] or unused. Grid: (tiles of N · tiles of M, splits): the
    first is the only axis without a limit that a long x would reach. With SPLIT a program sums ``span`` of the K
    columns, and y is [splits, M, N] in ACC, without bias.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_n = (N // group_size) * tiles_per_group
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    group = pid_n // tiles_per_group
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    # Rows past the end repeat the last one: their results are not stored, and the loop needs no mask for them. Only for
    # the strided axis of an operand: on the contiguous one it would hide the contiguity and break up the loads.
    rows_n = group * group_size + tl.minimum(local_n, group_size - 1)
    offs_n = group * group_size + local_n
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows_m = tl.minimum(offs_m, M - 1)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None] * stride_xk
    w_ptrs = w_ptr + rows_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
    col_ptr += group.to(tl.int64) * RANK * K
    step = tl.full((), BLOCK_K, tl.int64)
    row = tl.load(row_ptr + rows_n * RANK)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    if SPLIT:
        first = tl.program_id(1) * span
        last = tl.minimum(first + span, K)
        x_ptrs += first.to(tl.int64) * stride_xk
        w_ptrs += first.to(tl.int64) * stride_wk
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        first = 0
        last = K
    for start in range(first, last, BLOCK_K):
        here = start + offs_k
        mask_k = here < K
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
            col = tl.load(col_ptr + here)
        else:
            x = tl.load(x_ptrs, mask=mask_k[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[None, :], other=0.0)
            col = tl.load(col_ptr + here, mask=mask_k, other=0.0)
        factor = _factor(row, col, row_ptr, col_ptr, rows_n, here, mask_n, mask_k, K, RANK, RESIDUAL, False, ACC)
        w = (w.to(ACC) * factor).to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(ACC)[:, None]
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _rlrr_linear_bwd_dx_kernel(
    g_ptr, w_ptr, row_ptr, col_ptr, dx_ptr,
    M, N, K, group_size, span,
    stride_gm, stride_gn, stride_wn, stride_wk,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN_N: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂xᵀ [K, M] = (W ⊙ (1 + s_r s_c))ᵀ gᵀ, one read of W, accumulated in ACC; ∂x is stored as [M, K].

    g [M, N], w [N, K], row [N, r], col [G, r, K]. Grid: (tiles of K · tiles of M, splits). With SPLIT a program sums
    ``span`` of the tiles of N, and ∂x is [splits, M, K] in ACC.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_m = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows_m = tl.minimum(offs_m, M - 1)
    lanes_n = tl.arange(0, BLOCK_N)
    g_ptrs = g_ptr + rows_m[None, :] * stride_gm + lanes_n[:, None].to(tl.int64) * stride_gn
    w_ptrs = w_ptr + lanes_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    col = tl.load(col_ptr + offs_k, mask=mask_k, other=0.0)
    acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
    tiles = (N // group_size) * tiles_per_group
    if SPLIT:
        first_tile = tl.program_id(1) * span
        last_tile = tl.minimum(first_tile + span, tiles)
        dx_ptr += tl.program_id(1).to(tl.int64) * M * K
    else:
        first_tile = 0
        last_tile = tiles
    for tile in range(first_tile, last_tile):
        if ONE_GROUP:
            group = 0
            local_n = tile * BLOCK_N
        else:
            group = tile // tiles_per_group
            local_n = (tile - group * tiles_per_group) * BLOCK_N
            col = tl.load(col_ptr + group.to(tl.int64) * RANK * K + offs_k, mask=mask_k, other=0.0)
        first = (group * group_size + local_n).to(tl.int64)
        mask_n = local_n + lanes_n < group_size
        offs_n = first + lanes_n
        if EVEN_N:
            g = tl.load(g_ptrs + first * stride_gn)
            w = tl.load(w_ptrs + first * stride_wn, mask=mask_k[:, None], other=0.0)
            row = tl.load(row_ptr + offs_n * RANK)
        else:
            g = tl.load(g_ptrs + first * stride_gn, mask=mask_n[:, None], other=0.0)
            w = tl.load(w_ptrs + first * stride_wn, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            row = tl.load(row_ptr + offs_n * RANK, mask=mask_n, other=0.0)
        group_ptr = col_ptr + group * RANK * K
        factor = _factor(row, col, row_ptr, group_ptr, offs_n, offs_k, mask_n, mask_k, K, RANK, RESIDUAL, True, ACC)
        w = (w.to(ACC) * factor).to(g.dtype)
        acc = tl.dot(w, g, acc, input_precision=PRECISION, out_dtype=ACC)
    dx_ptrs = dx_ptr + offs_m[None, :] * K + offs_k[:, None]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_m[None, :])


@triton.jit
def _sum_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, size, columns, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """out [size] = Σ of parts [SPLITS, size], in a fixed order, + bias [columns] or unused. Grid: (blocks of size,)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + tl.cast(size, tl.int64) * part + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % columns, mask=mask, other=0.0).to(total.dtype)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_scale_parts(
    G, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk, pid_k, pid_n, split,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one tile of G [n, k] from one split of the rows adds to ∂s_r and ∂s_c, into parts.

    parts, all ACC: [splits, tiles of K, N, r] for ∂s_r, at col_offset [splits, tiles of a group, G, r, K] for ∂s_c.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    group = pid_n // tiles_per_group
    tile_in_group = pid_n % tiles_per_group
    local_n = tile_in_group * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = group * group_size + local_n
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
    product = G * w.to(ACC)
    col_ptr += group.to(tl.int64) * RANK * K
    row_part_ptr = parts_ptr + (split * tiles_k + pid_k) * N * RANK
    col_part = (split * tiles_per_group + tile_in_group) * (N // group_size) + group
    col_part_ptr = parts_ptr + col_offset + col_part * RANK * K
    for j in range(RANK):
        if NEED_ROW:
            col = tl.load(col_ptr + j * K + offs_k, mask=mask_k, other=0.0).to(ACC)
            tl.store(row_part_ptr + offs_n * RANK + j, tl.sum(product * col[None, :], 1), mask=mask_n)
        if NEED_COL:
            row = tl.load(row_ptr + offs_n * RANK + j, mask=mask_n, other=0.0).to(ACC)
            tl.store(col_part_ptr + j * K + offs_k, tl.sum(product * row[:, None], 0), mask=mask_k)


@triton.jit
def _rlrr_linear_bwd_scales_kernel(
    g_ptr, x_ptr, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, bias_offset,
    M, N, K, group_size, rows_per_split,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums of ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W) and ∂b = Σ g over one split of M; G = gᵀx stays here.

    g [M, N], x [M, K], w [N, K], row [N, r], col [G, r, K]. Written to parts, all ACC: [splits, tiles of K, N, r] for
    ∂s_r, at col_offset [splits, tiles of a group, G, r, K] for ∂s_c, at bias_offset [splits, N] for ∂b. Grid: (tiles of
    K, and one more that sums g when NEED_BIAS; tiles of N; splits).
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0)
    pid_n = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    group = pid_n // tiles_per_group
    tile_in_group = pid_n % tiles_per_group
    local_n = tile_in_group * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = group * group_size + local_n
    lanes_m = tl.arange(0, BLOCK_M)
    first_m = split * rows_per_split
    rows_here = tl.minimum(M - first_m, rows_per_split).to(tl.int32)
    step = tl.full((), BLOCK_M, tl.int64)
    g_ptrs = g_ptr + (first_m + lanes_m)[None, :] * stride_gm + offs_n[:, None].to(tl.int64) * stride_gn
    if NEED_BIAS and pid_k == tiles_k:
        total = tl.zeros((BLOCK_N,), ACC)
        for start in range(0, rows_here, BLOCK_M):
            g = tl.load(g_ptrs, mask=mask_n[:, None] & (start + lanes_m < rows_here)[None, :], other=0.0)
            total += tl.sum(g.to(ACC), 1)
            g_ptrs += step * stride_gm
        tl.store(parts_ptr + bias_offset + split * N + offs_n, total, mask=mask_n)
    else:
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_ptrs = x_ptr + (first_m + lanes_m)[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for start in range(0, rows_here, BLOCK_M):
            if EVEN_M:
                g = tl.load(g_ptrs, mask=mask_n[:, None], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            else:
                mask_m = start + lanes_m < rows_here
                g = tl.load(g_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=mask_k[None, :] & mask_m[:, None], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
            g_ptrs += step * stride_gm
            x_ptrs += step * stride_xm
        store_scale_parts(
            acc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            pid_k, pid_n, split, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _reduce_block(parts_ptr, out_ptr, count, size, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """One block of out [size] = Σ over the first axis of parts [count, size], in a fixed order."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        tile = tl.load(
            parts_ptr + part[:, None].to(tl.int64) * size + offs[None, :],
            mask=(part < count)[:, None] & (offs < size)[None, :],
            other=0.0,
        )
        total += tl.sum(tile, 0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _rlrr_linear_bwd_reduce_kernel(
    parts_ptr, row_ptr, col_ptr, bias_ptr, row_count, row_size, col_count, col_size, bias_count, bias_size,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂s_r, ∂s_c, ∂b from parts: [row_count, row_size], then [col_count, col_size], then [bias_count, bias_size].

    A gradient that is not needed has size 0. Grid: (blocks of each size, one after another,).
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(row_size, BLOCK)
    col_blocks = tl.cdiv(col_size, BLOCK)
    if pid < row_blocks:
        _reduce_block(parts_ptr, row_ptr, row_count, row_size, pid, BLOCK_P, BLOCK)
    elif pid < row_blocks + col_blocks:
        parts_ptr += tl.cast(row_count, tl.int64) * row_size
        _reduce_block(parts_ptr, col_ptr, col_count, col_size, pid - row_blocks, BLOCK_P, BLOCK)
    else:
        parts_ptr += tl.cast(row_count, tl.int64) * row_size + tl.cast(col_count, tl.int64) * col_size
        _reduce_block(parts_ptr, bias_ptr, bias_count, bias_size, pid - row_blocks - col_blocks, BLOCK_P, BLOCK)


@triton.jit
def _merge_kernel(
    w_ptr, row_ptr, col_ptr, out_ptr, K, group_size, stride_wn, stride_wk,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, K] = W ⊙ (1 + s_r s_c), rounded once. Grid: (tiles of K, tiles of N)."""
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    pid_n = tl.program_id(1)
    group = pid_n // tiles_per_group
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = group * group_size + local_n
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = local_n < group_size
    mask_k = offs_k < K
    mask = mask_n[:, None] & mask_k[None, :]
    wide_n = offs_n[:, None].to(tl.int64)
    w = tl.load(w_ptr + wide_n * stride_wn + offs_k[None, :] * stride_wk, mask=mask, other=0.0).to(ACC)
    col_ptr += group.to(tl.int64) * RANK * K
    row = tl.load(row_ptr + offs_n * RANK, mask=mask_n, other=0.0)
    col = tl.load(col_ptr + offs_k, mask=mask_k, other=0.0)
    factor = _factor(row, col, row_ptr, col_ptr, offs_n, offs_k, mask_n, mask_k, K, RANK, RESIDUAL, False, ACC)
    tl.store(out_ptr + wide_n * K + offs_k[None, :], (w * factor).to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launches: pure functions of their arguments


_PRECISION = {"highest": "ieee", "high": "tf32", "medium": "tf32"}

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


def precision_of(dtype: torch.dtype) -> str:
    """What the kernels' products of ``dtype`` are told of fp32 and TF32."""
    return _PRECISION[torch.get_float32_matmul_precision()] if dtype == torch.float32 else "ieee"


def launch_meta(dtype: torch.dtype, precision: str, tiles: linear_configs.Tiles) -> dict[str, Any]:
    """Constants and options of a launch with ``tiles`` whose products are of ``dtype``."""
    return {
        "ACC": TL_ACCUMULATE[accumulate_dtype(dtype)],
        "PRECISION": precision,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


class _Product(NamedTuple):
    """A product in one pass over W, and where its contraction is split, the sum of the parts [parts]."""

    product: Plan
    sum: Plan | None
    parts: int


def _product(
    kernel: triton.JITFunction, programs: int, steps: int, steps_to_span: int, numbers: tuple[int, ...],
    strides: tuple[int, ...], meta: dict[str, Any], shape: tuple[int, int], arch: str, tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    """``steps`` blocks are contracted for an output of ``shape``; a span is counted in 1 / steps_to_span of them."""
    splits = linear_configs.contraction_splits(steps, programs, tiles, arch)
    steps_per_split = max(1, cdiv(steps, splits))
    splits = max(1, cdiv(steps, steps_per_split))
    numbers = (*numbers, steps_per_split * steps_to_span, *strides)
    if splits == 1:
        return _Product(Plan(kernel, (programs,), numbers, meta | {"SPLIT": False}), None, 0)
    has_bias, size = meta.get("HAS_BIAS", False), shape[0] * shape[1]
    sum_meta = {"SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK": 512, "num_warps": 4}
    return _Product(
        Plan(kernel, (programs, splits), numbers, meta | {"SPLIT": True} | ({"HAS_BIAS": False} if has_bias else {})),
        Plan(_sum_splits_kernel, (cdiv(size, 512),), (size, shape[1]), sum_meta),
        splits * size,
    )


def _product_launches(plans: _Product, inputs: tuple[Tensor, ...], bias: Tensor, out: Tensor) -> tuple[Launch, ...]:
    if plans.sum is None:
        return (Launch(plans.product, (*inputs, out)),)
    parts = out.new_empty(plans.parts, dtype=accumulate_dtype(out.dtype))
    return Launch(plans.product, (*inputs, parts)), Launch(plans.sum, (parts, bias, out))


@_plans
def _forward_plans(
    x_shape: torch.Size, x_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, has_bias: bool, residual: bool, dtype: torch.dtype, precision: str, arch: str,
    tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    (count, cols), rows, (groups, rank, _) = x_shape, weight_shape[0], col_shape
    size = rows // groups
    programs = groups * cdiv(size, tiles.block_n) * cdiv(count, tiles.block_m)
    meta = {
        "RANK": rank, "RESIDUAL": residual, "HAS_BIAS": has_bias,
        "EVEN_K": cols % tiles.block_k == 0, **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return _product(
        _rlrr_linear_fwd_kernel, programs, cdiv(cols, tiles.block_k), tiles.block_k, (count, rows, cols, size),
        (*x_strides, *weight_strides), meta, (count, rows), arch, tiles,
    )  # fmt: skip


def forward_launches(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    y: Tensor,
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, ...]:
    """y [M, N] = x W'ᵀ + b in one pass over W, in parts that are then summed where it has few tiles.

    The scales must be contiguous.
    """
    has_bias, dtype = bias is not None, x.dtype
    plans = _forward_plans(
        x.shape, x.stride(), weight.shape, weight.stride(), scale_col.shape, has_bias, residual, dtype,
        precision_of(dtype), arch, tiles,
    )  # fmt: skip
    bias = bias if has_bias else x
    return _product_launches(plans, (x, weight, scale_row, scale_col, bias), bias, y)


@_plans
def _grad_x_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, residual: bool, dtype: torch.dtype, precision: str, arch: str, tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    (count, rows), cols, (groups, rank, _) = grad_shape, weight_shape[1], col_shape
    size = rows // groups
    meta = {
        "RANK": rank, "RESIDUAL": residual, "ONE_GROUP": groups == 1,
        "EVEN_N": size % tiles.block_n == 0, **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return _product(
        _rlrr_linear_bwd_dx_kernel, cdiv(cols, tiles.block_k) * cdiv(count, tiles.block_m),
        groups * cdiv(size, tiles.block_n), 1, (count, rows, cols, size), (*grad_strides, *weight_strides), meta,
        (count, cols), arch, tiles,
    )  # fmt: skip


def grad_x_launches(
    grad_y: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    grad_x: Tensor,
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, ...]:
    """∂x [M, K] = g W' in one pass over W, in parts that are then summed where it has few tiles.

    The scales must be contiguous.
    """
    dtype = grad_y.dtype
    plans = _grad_x_plans(
        grad_y.shape, grad_y.stride(), weight.shape, weight.stride(), scale_col.shape, residual, dtype,
        precision_of(dtype), arch, tiles,
    )  # fmt: skip
    return _product_launches(plans, (grad_y, weight, scale_row, scale_col), grad_y, grad_x)


_REDUCE_META = {"BLOCK_P": 32, "BLOCK": 128, "num_warps": 8}


def plan_reduction(row: tuple[int, int], col: tuple[int, int], bias: tuple[int, int]) -> tuple[Plan, int, int, int]:
    """The sum over parts of ∂s_r, ∂s_c and ∂b, [count, size] of each kind, which lie one after another.

    Then where those of ∂s_c and of ∂b start, and how many values there are.
    """
    col_offset = row[0] * row[1]
    bias_offset = col_offset + col[0] * col[1]
    blocks = sum(cdiv(size, _REDUCE_META["BLOCK"]) for _, size in (row, col, bias))
    plan = Plan(_rlrr_linear_bwd_reduce_kernel, (blocks,), (*row, *col, *bias), _REDUCE_META)
    return plan, col_offset, bias_offset, bias_offset + bias[0] * bias[1]


@_plans
def _grad_scales_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], x_strides: tuple[int, int], weight_shape: torch.Size,
    weight_strides: tuple[int, int], col_shape: torch.Size, needs: tuple[bool, bool, bool], dtype: torch.dtype,
    precision: str, arch: str, tiles: linear_configs.Tiles,
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """How the scale gradients are cut into partial sums, how these are added up, and how many there are."""
    count, (rows, cols), (groups, rank, _) = grad_shape[0], weight_shape, col_shape
    need_row, need_col, need_bias = needs
    tiles_k, tiles_per_group = cdiv(cols, tiles.block_k), cdiv(rows // groups, tiles.block_n)
    splits = linear_configs.splits_for(count, tiles, tiles_k * tiles_per_group * groups, arch)
    rows_per_split = max(1, cdiv(cdiv(count, splits), tiles.block_m)) * tiles.block_m
    splits = max(1, cdiv(count, rows_per_split))
    row = (splits * tiles_k, rows * rank) if need_row else (0, 0)
    col = (splits * tiles_per_group, groups * rank * cols) if need_col else (0, 0)
    bias = (splits, rows) if need_bias else (0, 0)
    reduction, col_offset, bias_offset, size = plan_reduction(row, col, bias)
    partial = Plan(
        _rlrr_linear_bwd_scales_kernel,
        (tiles_k + need_bias, groups * tiles_per_group, splits),
        (
            col_offset, bias_offset, count, rows, cols, rows // groups, rows_per_split,
            *grad_strides, *x_strides, *weight_strides,
        ),
        {
            "RANK": rank, "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": need_bias,
            "EVEN_M": count % tiles.block_m == 0, **launch_meta(dtype, precision, tiles),
        },
    )  # fmt: skip
    return partial, reduction, size


def grad_scales_launches(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, Launch]:
    """Partial sums over tiles and splits of M, then their reduction into ``grads`` = (∂s_r, ∂s_c, ∂b).

    A gradient that is not needed is None. The scales must be contiguous.
    """
    needs, dtype = tuple(grad is not None for grad in grads), grad_y.dtype
    partial, reduction, size = _grad_scales_plans(
        grad_y.shape, grad_y.stride(), x.stride(), weight.shape, weight.stride(), scale_col.shape, needs, dtype,
        precision_of(dtype), arch, tiles,
    )  # fmt: skip
    parts = grad_y.new_empty(size, dtype=accumulate_dtype(dtype))
    outputs = [parts if grad is None else grad for grad in grads]
    return (
        Launch(partial, (grad_y, x, weight, scale_row, scale_col, parts)),
        Launch(reduction, (parts, *outputs)),
    )


@_plans
def _merge_plan(
    weight_shape: torch.Size, weight_strides: tuple[int, int], col_shape: torch.Size, residual: bool, dtype: torch.dtype
) -> Plan:
    (rows, cols), (groups, rank, _) = weight_shape, col_shape
    meta = {
        "RANK": rank,
        "RESIDUAL": residual,
        "ACC": TL_ACCUMULATE[accumulate_dtype(dtype)],
        "BLOCK_N": 16,
        "BLOCK_K": 128,
        "num_warps": 4,
    }
    grid = (cdiv(cols, meta["BLOCK_K"]), groups * cdiv(rows // groups, meta["BLOCK_N"]))
    return Plan(_merge_kernel, grid, (cols, rows // groups, *weight_strides), meta)


def merge_launch(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, out: Tensor) -> Launch:
    """out [N, K] = W ⊙ (1 + s_r s_c), rounded once; the scales must be contiguous."""
    plan = _merge_plan(weight.shape, weight.stride(), scale_col.shape, residual, weight.dtype)
    return Launch(plan, (weight, scale_row, scale_col, out))


# ---------------------------------------------------------------- the backend


def _capability(device: torch.device) -> tuple[tuple[int, int] | None, str | None]:
    """Compute capability of an NVIDIA GPU and architecture of an AMD one; None for what it is not."""
    if device.type == "cpu":
        return None, None
    properties = torch.cuda.get_device_properties(device)
    return (None, properties.gcnArchName) if torch.version.hip else ((properties.major, properties.minor), None)


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture in ``linear_configs`` that serves a device; "interpreter" for the CPU."""
    return linear_configs.architecture(*_capability(device))


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name in ``linear_configs.SHARED_BYTES``."""
    return linear_configs.device_name(*_capability(device))


def merge(
    weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """W' [N, K] as a new tensor, rounded once to ``dtype`` (default: W's), in one elementwise pass."""
    merged = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    if merged.numel():
        merge_launch(weight, scale_row.contiguous(), scale_col.contiguous(), residual, merged).run()
    return merged


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    path: str | None = None,
) -> Tensor:
    """y [M, N] = x W'ᵀ + b. x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N].

    ``path`` forces ``one_pass`` or ``merge``.
    """
    check_interpreter(x.dtype, weight.dtype)
    count, arch = x.shape[0], architecture(x.device)
    if (path or linear_configs.choose_path(count, scale_row.shape[1], arch)) == "merge":
        merged = merge(weight, scale_row, scale_col, residual, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(count, weight.shape[0])
    if y.numel():
        tiles = tuned_tiles.tiles_for("forward", arch, x, weight, weight, scale_row.shape[1])
        bias = None if bias is None else bias.contiguous()
        scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
        for launch in forward_launches(x, weight, scale_row, scale_col, bias, residual, y, arch, tiles):
            launch.run()
    return y


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    needs: tuple[bool, bool, bool, bool],
    path: str | None = None,
    sample: RowSample | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row [N, r], scale_col [G, r, K] and bias [N]; None where ``needs`` says so.

    Scale gradients come in the dtype of their scale, ∂b in fp32 (fp64 for float64). With a ``sample`` G is its estimate
    and x [S, K] holds its rows.
    """
    check_interpreter(grad_y.dtype, weight.dtype)
    need_x, need_row, need_col, need_bias = needs
    scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
    dtype, arch = accumulate_dtype(grad_y.dtype), architecture(grad_y.device)
    grad_x = _grad_x(grad_y, weight, scale_row, scale_col, residual, path, arch) if need_x else None
    if not (need_row or need_col):
        return grad_x, None, None, grad_y.sum(0, dtype=dtype) if need_bias else None
    grads = (
        torch.empty_like(scale_row) if need_row else None,
        torch.empty_like(scale_col) if need_col else None,
        grad_y.new_empty(weight.shape[0], dtype=dtype) if need_bias else None,
    )
    tiles = tuned_tiles.tiles_for("grad_scales", arch, x, grad_y, weight, 1)
    if sample is None:
        launches = grad_scales_launches(grad_y, x, weight, scale_row, scale_col, grads, arch, tiles)
    else:
        from rlrr_kernels.ops import linear_rows_triton  # it builds on this module

        launches = linear_rows_triton.grad_scales_launches(
            grad_y, x, sample, weight, scale_row, scale_col, grads, arch, tiles
        )
    for launch in launches:
        launch.run()
    return grad_x, *grads


def _grad_x(grad_y, weight, scale_row, scale_col, residual, path, arch) -> Tensor:
    count = grad_y.shape[0]
    if (path or linear_configs.choose_path(count, scale_row.shape[1], arch)) == "merge":
        return grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype)
    if weight.shape[0] == 0:
        return grad_y.new_zeros(count, weight.shape[1])
    grad_x = grad_y.new_empty(count, weight.shape[1])
    if grad_x.numel():
        tiles = tuned_tiles.tiles_for("grad_x", arch, grad_y, weight, weight, scale_row.shape[1])
        for launch in grad_x_launches(grad_y, weight, scale_row, scale_col, residual, grad_x, arch, tiles):
            launch.run()
    return grad_x
