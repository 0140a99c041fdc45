"""Kernels of ``rlrr_linear`` with a persistent grid: operands by TMA, one wave of programs, equal shares of the work.

:mod:`rlrr_kernels.ops.linear.triton.launches` says how they are launched; names are those of
:mod:`rlrr_kernels.ops.linear.triton.kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlrr_kernels.ops.linear.triton.kernels import rescale, scale_part_ptrs, store_product, store_scale_parts


@triton.jit
def rlrr_linear_fwd_persistent_kernel(
    x_desc, w_desc, row_ptr, col_ptr, bias_ptr, y_ptr, M, N, K, group_size,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """yᵀ [N, M] = (W ⊙ (1 + s_r s_c)) xᵀ + b, accumulated in ACC.

    x [M, K], w [N, K], row [N, r], col [G, r, K], bias [N] or unused. Grid: (programs,); a program takes every so
    manyth tile of yᵀ, tiles of N fastest, in one loop over the blocks of K of all of them: the next tile's blocks are
    on their way while one is written. What the running programs read is then all of W and a few blocks of rows of x,
    which the L2 cache holds for every layer of a ViT, so both come from memory once.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    groups = N // group_size
    tiles_n = groups * tiles_per_group
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_here = tl.cdiv(tiles_n * tl.cdiv(M, BLOCK_M) - tile, programs)
    # The tile is counted on from step to step: divisions would be a sixth of a step's instructions.
    pid_m = tile // tiles_n
    group = tile % tiles_n // tiles_per_group
    in_group = tile % tiles_per_group
    block = 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for _ in range(tiles_here * blocks):
        first_n = in_group * BLOCK_N
        local_n = first_n + tl.arange(0, BLOCK_N)
        # Rows past the end of a group are the next one's: their results are not stored.
        rows_n = group * group_size + tl.minimum(local_n, group_size - 1)
        mask_n = local_n < group_size
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = x_desc.load([pid_m * BLOCK_M, block * BLOCK_K])
        w = w_desc.load([group * group_size + first_n, block * BLOCK_K])
        group_ptr = col_ptr + group.to(tl.int64) * RANK * K
        row = tl.load(row_ptr + rows_n * RANK)
        col = tl.load(group_ptr + offs_k) if EVEN_K else tl.load(group_ptr + offs_k, mask=mask_k, other=0.0)
        w = rescale(w, row, col, row_ptr, group_ptr, rows_n, offs_k, mask_n, mask_k, K, RANK, RESIDUAL, False, ACC)
        acc = tl.dot(w.to(x.dtype), x.T, acc, input_precision=PRECISION, out_dtype=ACC)
        block += 1
        if block == blocks:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + rows_n).to(ACC)[:, None]
            offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            store_product(acc, y_ptr, offs_m, group * group_size + local_n, offs_m < M, mask_n, N)
            acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            block = 0
            in_group += programs % tiles_per_group
            group += programs % tiles_n // tiles_per_group
            pid_m += programs // tiles_n
            if in_group >= tiles_per_group:
                in_group -= tiles_per_group
                group += 1
            if group >= groups:
                group -= groups
                pid_m += 1


@triton.jit
def rlrr_linear_bwd_dx_persistent_kernel(
    g_desc, w_desc, row_ptr, col_ptr, dx_ptr, M, N, K, group_size,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂xᵀ [K, M] = (W ⊙ (1 + s_r s_c))ᵀ gᵀ, accumulated in ACC.

    g [M, N], w [N, K], row [N, r], col [G, r, K]. Grid and order as :func:`rlrr_linear_fwd_persistent_kernel` has them,
    tiles of K fastest.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    groups = N // group_size
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_here = tl.cdiv(tiles_k * tl.cdiv(M, BLOCK_M) - tile, programs)
    pid_k = tile % tiles_k
    pid_m = tile // tiles_k
    group = 0
    local_n = 0
    acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
    for _ in range(tiles_here * groups * tiles_per_group):
        first_n = group * group_size + local_n
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = local_n + tl.arange(0, BLOCK_N) < group_size
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        g = g_desc.load([pid_m * BLOCK_M, first_n])
        w = w_desc.load([first_n, pid_k * BLOCK_K]).T
        group_ptr = col_ptr + group.to(tl.int64) * RANK * K
        col = tl.load(group_ptr + offs_k, mask=mask_k, other=0.0)
        row_ptrs = row_ptr + offs_n * RANK
        row = tl.load(row_ptrs) if EVEN_N else tl.load(row_ptrs, mask=mask_n, other=0.0)
        w = rescale(w, row, col, row_ptr, group_ptr, offs_n, offs_k, mask_n, mask_k, K, RANK, RESIDUAL, True, ACC)
        if not EVEN_N:  # rows past the end of a group are the next one's, which has a turn of its own
            w = tl.where(mask_n[None, :], w, 0.0)
        acc = tl.dot(w.to(g.dtype), g.T, acc, input_precision=PRECISION, out_dtype=ACC)
        local_n += BLOCK_N
        if local_n >= group_size:
            local_n = 0
            group += 1
        if group == groups:
            offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            store_product(acc, dx_ptr, offs_m, offs_k, offs_m < M, mask_k, K)
            acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
            group = 0
            pid_k += programs % tiles_k
            pid_m += programs // tiles_k
            if pid_k >= tiles_k:
                pid_k -= tiles_k
                pid_m += 1


@triton.jit
def _store_in_strips(
    G, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk, pid_k, pid_n, part,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """:func:`store_scale_parts` in strips of STRIP columns: W beside a whole wide tile of G takes registers."""
    if BLOCK_K > STRIP:
        half: tl.constexpr = BLOCK_K // 2
        left, right = G.reshape(BLOCK_N, 2, half).permute(0, 2, 1).split()
        _store_in_strips(
            left, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            2 * pid_k, pid_n, part, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, half, STRIP,
        )  # fmt: skip
        _store_in_strips(
            right, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            2 * pid_k + 1, pid_n, part, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, half, STRIP,
        )  # fmt: skip
    elif pid_k * BLOCK_K < K:
        store_scale_parts(
            G, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            pid_k, pid_n, part, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _clear_parts(
    parts_ptr, col_offset, bias_offset, N, K, group_size, pid_k, pid_n, part,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Zeros for one part of everything that a tile of G [BLOCK_N, BLOCK_K] adds to."""
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = (pid_n // tiles_per_group) * group_size + local_n
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    for strip in range(pid_k * (BLOCK_K // STRIP), tl.minimum((pid_k + 1) * (BLOCK_K // STRIP), tl.cdiv(K, STRIP))):
        row_part_ptr, col_part_ptr = scale_part_ptrs(
            parts_ptr, col_offset, N, K, group_size, strip, pid_n, part, RANK, BLOCK_N, STRIP
        )
        for j in range(RANK):
            if NEED_ROW:
                tl.store(row_part_ptr + offs_n * RANK + j, tl.zeros((BLOCK_N,), ACC), mask=mask_n)
            if NEED_COL:
                tl.store(col_part_ptr + j * K + offs_k, tl.zeros((BLOCK_K,), ACC), mask=offs_k < K)
    if NEED_BIAS:
        bias_part_ptr = parts_ptr + bias_offset + (part * tl.cdiv(K, BLOCK_K) + pid_k) * N
        tl.store(bias_part_ptr + offs_n, tl.zeros((BLOCK_N,), ACC), mask=mask_n)


@triton.jit
def rlrr_linear_bwd_scales_persistent_kernel(
    g_desc, x_desc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, bias_offset,
    M, N, K, group_size, span, pieces,
    stride_wn, stride_wk,
    RANK: tl.constexpr, NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Partial sums of ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W) and ∂b = Σ g; G = gᵀx stays here.

    g [M, N], x [M, K], w [N, K], row [N, r], col [G, r, K]. Work is tiles of G times blocks of M, blocks fastest, then
    tiles of K; a program does ``span`` steps of it wherever tiles begin and end, so that all finish together. Only sums
    leave a tile: what a program adds to one is a part of its own, no other program need be waited for, and loads of the
    next tile are on their way while this one's part is made. A tile has at most ``pieces`` parts; its last program
    clears those it does not have.

    parts, all ACC: [pieces, strips of K, N, r] for ∂s_r, at col_offset [pieces, tiles of a group, G, r,
    K] for ∂s_c, at bias_offset [pieces, tiles of K, N] for ∂b: each of the tiles that have a row of N sums g over its
    share of the blocks, from shared memory, while the tensor cores work. Grid: (programs,).

    TMA brings zeros for what lies outside a tensor, the last block's rows among it. Rows past the end of a group are
    the next one's: they are not stored and add nothing to ∂s_c, not even where they are not finite.
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = (N // group_size) * tiles_per_group * tiles_k
    blocks = tl.cdiv(M, BLOCK_M)
    lanes_n = tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, tiles * blocks)
    for ending in range(first // blocks, last // blocks):
        for empty in range(tl.program_id(0) - (ending * blocks) // span + 1, pieces):
            _clear_parts(
                parts_ptr, col_offset, bias_offset, N, K, group_size, ending % tiles_k, ending // tiles_k,
                tl.cast(empty, tl.int64), RANK, NEED_ROW, NEED_COL, NEED_BIAS, ACC, BLOCK_N, BLOCK_K, STRIP,
            )  # fmt: skip
    # Counted on from step to step: divisions would be a third of a step's instructions.
    tile = first // blocks
    block = first % blocks
    turn = block % tiles_k
    pid_k = tile % tiles_k
    group = tile // tiles_k // tiles_per_group
    local_n = (tile // tiles_k % tiles_per_group) * BLOCK_N
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    for step in range(first, last):
        g = g_desc.load([block * BLOCK_M, group * group_size + local_n])
        x = x_desc.load([block * BLOCK_M, pid_k * BLOCK_K])
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION, out_dtype=ACC)
        if NEED_BIAS and turn == pid_k:
            total += tl.sum(g.to(ACC), 0)
        if block == blocks - 1 or step == last - 1:
            mask_n = local_n + lanes_n < group_size
            if not EVEN_N:
                acc = tl.where(mask_n[:, None], acc, 0.0)
            pid_n = group * tiles_per_group + local_n // BLOCK_N
            part = (tl.program_id(0) - (step - block) // span).to(tl.int64)
            _store_in_strips(
                acc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
                pid_k, pid_n, part, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K, STRIP,
            )  # fmt: skip
            if NEED_BIAS:
                bias_ptrs = parts_ptr + bias_offset + (part * tiles_k + pid_k) * N + group * group_size + local_n
                tl.store(bias_ptrs + lanes_n, total, mask=mask_n)
            acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
            total = tl.zeros((BLOCK_N,), ACC)
        block += 1
        turn += 1
        if turn == tiles_k:
            turn = 0
        if block == blocks:
            block = 0
            turn = 0
            pid_k += 1
            if pid_k == tiles_k:
                pid_k = 0
                local_n += BLOCK_N
                if local_n >= group_size:
                    local_n = 0
                    group += 1
