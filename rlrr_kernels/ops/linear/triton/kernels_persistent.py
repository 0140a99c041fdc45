"""The scale gradients with a persistent grid: operands by TMA, one wave of programs, equal shares of the work.

:mod:`rlrr_kernels.ops.linear.triton.launches` says how they are launched; names are those of
:mod:`rlrr_kernels.ops.linear.triton.kernels`. Forward and ∂x have no such kernel: it was predicted to be no faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlrr_kernels.ops.linear.triton.kernels import scale_part_ptrs, store_scale_parts


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
