"""The Triton kernels of ``rlrr_linear``; :mod:`rlrr_kernels.ops.linear.triton.launches` says how they are launched.

Names: M rows of x, N rows and K columns of W, r rank, G groups of N / G rows. Tiles of W never straddle two groups, so
each tile uses one row of s_c. The weight tile is the *first* operand of its product (the kernels compute yᵀ and ∂xᵀ):
on Hopper ``wgmma`` takes that one from registers, so the rescaled tile does not travel through shared memory again.
Scales, 1 + s_r s_c and sums are fp32 (fp64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlrr_kernels.ops.choice import tiles as configs

UNROLLED_RANK = tl.constexpr(configs.UNROLLED_RANK)
_IEEE = tl.constexpr("ieee")  # Triton 3.5 takes no plain string for a default


@triton.jit
def _outer(row, col, TRANSPOSED: tl.constexpr, ACC: tl.constexpr):
    """row [n] times col [k]: [n, k] or, TRANSPOSED, [k, n]."""
    axis_n: tl.constexpr = 0 if TRANSPOSED else 1
    axis_k: tl.constexpr = 1 if TRANSPOSED else 0
    return tl.expand_dims(row.to(ACC), axis_n) * tl.expand_dims(col.to(ACC), axis_k)


@triton.jit
def load_row(row_ptr, offs_n, mask_n, MASKED: tl.constexpr, RANK: tl.constexpr, DOT_RANK: tl.constexpr):
    """Of s_r [N, r]: the first of its vectors [n] or, with DOT_RANK, all of them and zeros, [n, DOT_RANK]."""
    if DOT_RANK > 0:
        lanes = tl.arange(0, DOT_RANK)
        mask = (lanes < RANK)[None, :]
        if MASKED:
            mask &= mask_n[:, None]
        row = tl.load(row_ptr + offs_n[:, None] * RANK + lanes[None, :], mask=mask, other=0.0)
    elif MASKED:
        row = tl.load(row_ptr + offs_n * RANK, mask=mask_n, other=0.0)
    else:
        row = tl.load(row_ptr + offs_n * RANK)
    return row


@triton.jit
def load_col(col_ptr, offs_k, mask_k, cols, MASKED: tl.constexpr, RANK: tl.constexpr, DOT_RANK: tl.constexpr):
    """Of s_c [r, K], already at its group: the first vector [k] or, with DOT_RANK, [DOT_RANK, k]."""
    if DOT_RANK > 0:
        lanes = tl.arange(0, DOT_RANK)
        mask = (lanes < RANK)[:, None]
        if MASKED:
            mask &= mask_k[None, :]
        col = tl.load(col_ptr + lanes[:, None] * cols + offs_k[None, :], mask=mask, other=0.0)
    elif MASKED:
        col = tl.load(col_ptr + offs_k, mask=mask_k, other=0.0)
    else:
        col = tl.load(col_ptr + offs_k)
    return col


@triton.jit
def rescale(
    w, row, col, row_ptr, col_ptr, offs_n, offs_k, mask_n, mask_k, cols,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, TRANSPOSED: tl.constexpr, ACC: tl.constexpr,
    DOT_RANK: tl.constexpr = 0, DOT_PRECISION: tl.constexpr = _IEEE,
):  # fmt: skip
    """A tile of W' = W ⊙ (1 + s_r s_c), [n, k] or, TRANSPOSED, [k, n], in ACC: every product's prologue.

    row_ptr [N, r]; col_ptr [r, K], already at its group. ``row`` and ``col`` are what :func:`load_row` and
    :func:`load_col` give, loaded once where the caller's loop lets it: with DOT_RANK, which is at least r, all of the
    scales, and their product of matrices is the factor; else the first of the r pairs of vectors.
    """
    if DOT_RANK > 0:
        if TRANSPOSED:
            left, right = tl.trans(col.to(ACC)), tl.trans(row.to(ACC))
        else:
            left, right = row.to(ACC), col.to(ACC)
        factor = tl.dot(left, right, input_precision=DOT_PRECISION, out_dtype=ACC)
    else:
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
    return w.to(ACC) * (factor + 1.0 if RESIDUAL else factor)


@triton.jit
def multiply(
    acc, x_ptrs, w_ptrs, row, row_ptr, col_ptr, rows_n, mask_n, first, last, K, stride_xk, stride_wk,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [n, m] += W' xᵀ over the columns from ``first`` to ``last``, where the tiles x_ptrs [k, m] and w_ptrs [n, k]
    begin: the loop of every forward. ``row`` is of the tile's rows; col_ptr [r, K] is at its group."""
    offs_k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    for start in range(first, last, BLOCK_K):
        here = start + offs_k
        mask_k = here < K
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=mask_k[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[None, :], other=0.0)
        col = load_col(col_ptr, here, mask_k, K, not EVEN_K, RANK, DOT_RANK)
        w = rescale(
            w, row, col, row_ptr, col_ptr, rows_n, here, mask_n, mask_k, K,
            RANK, RESIDUAL, False, ACC, DOT_RANK, DOT_PRECISION,
        )  # fmt: skip
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    return acc


@triton.jit
def multiply_transposed(
    acc, g_ptrs, w_ptrs, col, row_ptr, col_ptr, offs_k, mask_k, first_tile, last_tile, K, group_size,
    stride_gn, stride_wn,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    ONE_GROUP: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc [k, m] += W'ᵀ gᵀ over these tiles of N: the loop of every ∂x. g_ptrs [n, m] and w_ptrs [k, n] are those of
    tile 0; ``col`` is what :func:`load_col` gives of group 0."""
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    lanes_n = tl.arange(0, BLOCK_N)
    for tile in range(first_tile, last_tile):
        if ONE_GROUP:
            group = 0
            local_n = tile * BLOCK_N
        else:
            group = tile // tiles_per_group
            local_n = (tile - group * tiles_per_group) * BLOCK_N
            col = load_col(col_ptr + group.to(tl.int64) * RANK * K, offs_k, mask_k, K, True, RANK, DOT_RANK)
        first = (group * group_size + local_n).to(tl.int64)
        mask_n = local_n + lanes_n < group_size
        offs_n = first + lanes_n
        if EVEN_N:
            g = tl.load(g_ptrs + first * stride_gn)
            w = tl.load(w_ptrs + first * stride_wn, mask=mask_k[:, None], other=0.0)
        else:
            g = tl.load(g_ptrs + first * stride_gn, mask=mask_n[:, None], other=0.0)
            w = tl.load(w_ptrs + first * stride_wn, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        row = load_row(row_ptr, offs_n, mask_n, not EVEN_N, RANK, DOT_RANK)
        group_ptr = col_ptr + group * RANK * K
        w = rescale(
            w, row, col, row_ptr, group_ptr, offs_n, offs_k, mask_n, mask_k, K,
            RANK, RESIDUAL, True, ACC, DOT_RANK, DOT_PRECISION,
        )  # fmt: skip
        acc = tl.dot(w.to(g.dtype), g, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def store_product(acc, out_ptr, offs_m, offs_c, mask_m, mask_c, columns):
    """acc [c, m] as columns c of rows m of out [M, columns]: every product's epilogue. offs_m is int64."""
    ptrs = out_ptr + offs_m[None, :] * columns + offs_c[:, None]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_m[None, :])


@triton.jit
def rlrr_linear_fwd_kernel(
    x_ptr, w_ptr, row_ptr, col_ptr, bias_ptr, y_ptr,
    M, N, K, group_size, span,
    stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """yᵀ [N, M] = (W ⊙ (1 + s_r s_c)) xᵀ + b, one read of W, accumulated in ACC; y is stored as [M, N].

    x [M, K], w [N, K], row [N, r], col [G, r, K], bias [N] or unused. Grid: (tiles of N · tiles of M, splits): the
    first is the only axis without a limit that a long x would reach. With SPLIT a program sums ``span`` of the K
    elements, and y is [splits, M, N] in ACC, without bias.
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
    x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + rows_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
    col_ptr += group.to(tl.int64) * RANK * K
    row = load_row(row_ptr, rows_n, mask_n, False, RANK, DOT_RANK)
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
    acc = multiply(
        acc, x_ptrs, w_ptrs, row, row_ptr, col_ptr, rows_n, mask_n, first, last, K, stride_xk, stride_wk,
        RANK, DOT_RANK, DOT_PRECISION, RESIDUAL, EVEN_K, ACC, PRECISION, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(ACC)[:, None]
    store_product(acc, y_ptr, offs_m, offs_n, mask_m, mask_n, N)


@triton.jit
def rlrr_linear_bwd_dx_kernel(
    g_ptr, w_ptr, row_ptr, col_ptr, dx_ptr,
    M, N, K, group_size, span,
    stride_gm, stride_gn, stride_wn, stride_wk,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN_N: tl.constexpr, SPLIT: tl.constexpr,
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
    col = load_col(col_ptr, offs_k, mask_k, K, True, RANK, DOT_RANK)
    acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
    tiles = (N // group_size) * tiles_per_group
    if SPLIT:
        first_tile = tl.program_id(1) * span
        last_tile = tl.minimum(first_tile + span, tiles)
        dx_ptr += tl.program_id(1).to(tl.int64) * M * K
    else:
        first_tile = 0
        last_tile = tiles
    acc = multiply_transposed(
        acc, g_ptrs, w_ptrs, col, row_ptr, col_ptr, offs_k, mask_k, first_tile, last_tile, K, group_size,
        stride_gn, stride_wn,
        RANK, DOT_RANK, DOT_PRECISION, RESIDUAL, ONE_GROUP, EVEN_N, ACC, PRECISION, BLOCK_N,
    )  # fmt: skip
    store_product(acc, dx_ptr, offs_m, offs_k, mask_m, mask_k, K)


@triton.jit
def sum_splits_kernel(
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
def scale_part_ptrs(
    parts_ptr, col_offset, N, K, group_size, pid_k, pid_n, split,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where the parts of ∂s_r [N, r] and of ∂s_c [r, K] begin that a tile of G from one split of the rows adds.

    parts: [splits, tiles of K, N, r] for ∂s_r, at col_offset [splits, tiles of a group, G, r, K] for ∂s_c.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    row_part_ptr = parts_ptr + (split * tl.cdiv(K, BLOCK_K) + pid_k) * N * RANK
    col_part = (split * tiles_per_group + pid_n % tiles_per_group) * (N // group_size) + pid_n // tiles_per_group
    return row_part_ptr, parts_ptr + col_offset + col_part * RANK * K


@triton.jit
def store_scale_parts(
    G, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk, pid_k, pid_n, split,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_RANK: tl.constexpr = 0, DOT_PRECISION: tl.constexpr = _IEEE,
):  # fmt: skip
    """What one tile of G [n, k] from one split of the rows adds to ∂s_r and ∂s_c, into parts of dtype ACC."""
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    group = pid_n // tiles_per_group
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = group * group_size + local_n
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
    product = G * w.to(ACC)
    col_ptr += group.to(tl.int64) * RANK * K
    row_part_ptr, col_part_ptr = scale_part_ptrs(
        parts_ptr, col_offset, N, K, group_size, pid_k, pid_n, split, RANK, BLOCK_N, BLOCK_K
    )
    if DOT_RANK > 0:
        # All of 64 vectors at once take more registers than there are.
        most: tl.constexpr = 32 if DOT_RANK > 32 else DOT_RANK
        for first in tl.range(0, RANK, most, num_stages=1):
            lanes = first + tl.arange(0, most)
            if NEED_ROW:
                mask = (lanes < RANK)[None, :]
                ptrs = col_ptr + lanes[None, :] * K + offs_k[:, None]
                col = tl.load(ptrs, mask=mask & mask_k[:, None], other=0.0).to(ACC)
                part = tl.dot(product, col, input_precision=DOT_PRECISION, out_dtype=ACC)
                tl.store(row_part_ptr + offs_n[:, None] * RANK + lanes[None, :], part, mask=mask & mask_n[:, None])
            if NEED_COL:
                mask = (lanes < RANK)[:, None]
                ptrs = row_ptr + offs_n[None, :] * RANK + lanes[:, None]
                row = tl.load(ptrs, mask=mask & mask_n[None, :], other=0.0).to(ACC)
                part = tl.dot(row, product, input_precision=DOT_PRECISION, out_dtype=ACC)
                tl.store(col_part_ptr + lanes[:, None] * K + offs_k[None, :], part, mask=mask & mask_k[None, :])
    else:
        for j in range(RANK):
            if NEED_ROW:
                col = tl.load(col_ptr + j * K + offs_k, mask=mask_k, other=0.0).to(ACC)
                tl.store(row_part_ptr + offs_n * RANK + j, tl.sum(product * col[None, :], 1), mask=mask_n)
            if NEED_COL:
                row = tl.load(row_ptr + offs_n * RANK + j, mask=mask_n, other=0.0).to(ACC)
                tl.store(col_part_ptr + j * K + offs_k, tl.sum(product * row[:, None], 0), mask=mask_k)


@triton.jit
def rlrr_linear_bwd_scales_kernel(
    g_ptr, x_ptr, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, bias_offset,
    M, N, K, group_size, rows_per_split,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr,
    NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
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
            pid_k, pid_n, split, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K, DOT_RANK, DOT_PRECISION,
        )  # fmt: skip


@triton.jit
def reduce_block(parts_ptr, out_ptr, count, size, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
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
def rlrr_linear_bwd_reduce_kernel(
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
        reduce_block(parts_ptr, row_ptr, row_count, row_size, pid, BLOCK_P, BLOCK)
    elif pid < row_blocks + col_blocks:
        parts_ptr += tl.cast(row_count, tl.int64) * row_size
        reduce_block(parts_ptr, col_ptr, col_count, col_size, pid - row_blocks, BLOCK_P, BLOCK)
    else:
        parts_ptr += tl.cast(row_count, tl.int64) * row_size + tl.cast(col_count, tl.int64) * col_size
        reduce_block(parts_ptr, bias_ptr, bias_count, bias_size, pid - row_blocks - col_blocks, BLOCK_P, BLOCK)


@triton.jit
def merge_kernel(
    w_ptr, row_ptr, col_ptr, out_ptr, K, group_size, stride_wn, stride_wk,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, K] = W ⊙ (1 + s_r s_c), rounded once. Grid: (tiles of K · tiles of N,), the axis without a limit."""
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_n = tl.program_id(0) // tiles_k
    group = pid_n // tiles_per_group
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = group * group_size + local_n
    offs_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = local_n < group_size
    mask_k = offs_k < K
    mask = mask_n[:, None] & mask_k[None, :]
    wide_n = offs_n[:, None].to(tl.int64)
    w = tl.load(w_ptr + wide_n * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk, mask=mask, other=0.0)
    col_ptr += group.to(tl.int64) * RANK * K
    row = tl.load(row_ptr + offs_n * RANK, mask=mask_n, other=0.0)
    col = tl.load(col_ptr + offs_k, mask=mask_k, other=0.0)
    w = rescale(w, row, col, row_ptr, col_ptr, offs_n, offs_k, mask_n, mask_k, K, RANK, RESIDUAL, False, ACC)
    tl.store(out_ptr + wide_n * K + offs_k[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)
