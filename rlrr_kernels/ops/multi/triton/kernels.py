"""The Triton kernels of ``rlrr_linear_multi``; :mod:`rlrr_kernels.ops.multi.triton.launches` says how they start.

Names as in :mod:`rlrr_kernels.ops.linear.triton.kernels`, with T adapters, those of "tasks". A tile of rows belongs to
one task, and its tile of W' is made in registers by the device functions of that module; the mixed kernel has rows of
many tasks in a tile and rescales x instead. Tables of rows are int32 and come from the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlrr_kernels.ops.linear.triton.kernels import (
    load_col,
    load_row,
    multiply,
    multiply_transposed,
    reduce_block,
    store_product,
    store_scale_parts,
)

# ---------------------------------------------------------------- forward and ∂x: a task a tile


@triton.jit
def _load_tile(tiles_ptr, tile, BLOCK_M: tl.constexpr):
    """A tile's task, its rows, which of them the task has, and the same with the last one repeated past its end."""
    tiles_ptr += tile * 3
    offs_m = tl.load(tiles_ptr + 1).to(tl.int64) + tl.arange(0, BLOCK_M)
    end = tl.load(tiles_ptr + 2)
    return tl.load(tiles_ptr).to(tl.int64), offs_m, offs_m < end, tl.minimum(offs_m, end - 1)


@triton.jit
def rlrr_linear_multi_fwd_kernel(
    x_ptr, w_ptr, row_ptr, col_ptr, bias_ptr, shift_ptr, tiles_ptr, y_ptr,
    N, K, group_size,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_row, stride_col,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, EVEN_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """yᵀ [N, M] = (W ⊙ (1 + s_r[t] s_c[t])) xᵀ + b + f[t] of the rows in tiles, accumulated in ACC; y is [M, N].

    x [M, K], w [N, K], row [T, N, r] and col [T, G, r, K], a task every stride_row and stride_col elements, bias [N]
    and shift [T, N] or unused, tiles [·, 3] of (t, first row, end row), at most BLOCK_M rows. Grid: (tiles of N · tiles
    of rows,).
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_n = (N // group_size) * tiles_per_group
    pid_n = tl.program_id(0) % tiles_n
    task, offs_m, mask_m, rows_m = _load_tile(tiles_ptr, tl.program_id(0) // tiles_n, BLOCK_M)
    group = pid_n // tiles_per_group
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    rows_n = group * group_size + tl.minimum(local_n, group_size - 1)
    offs_n = group * group_size + local_n
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + rows_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
    row_ptr += task * stride_row
    col_ptr += task * stride_col + group.to(tl.int64) * RANK * K
    row = load_row(row_ptr, rows_n, mask_n, False, RANK, DOT_RANK)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    acc = multiply(
        acc, x_ptrs, w_ptrs, row, row_ptr, col_ptr, rows_n, mask_n, 0, K, K, stride_xk, stride_wk,
        RANK, DOT_RANK, DOT_PRECISION, RESIDUAL, EVEN_K, ACC, PRECISION, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(ACC)[:, None]
    if HAS_SHIFT:
        acc += tl.load(shift_ptr + task * N + rows_n).to(ACC)[:, None]
    store_product(acc, y_ptr, offs_m, offs_n, mask_m, mask_n, N)


@triton.jit
def rlrr_linear_multi_bwd_dx_kernel(
    g_ptr, w_ptr, row_ptr, col_ptr, tiles_ptr, dx_ptr,
    N, K, group_size,
    stride_gm, stride_gn, stride_wn, stride_wk, stride_row, stride_col,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    ONE_GROUP: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂xᵀ [K, M] = (W ⊙ (1 + s_r[t] s_c[t]))ᵀ gᵀ of the rows in tiles, accumulated in ACC; ∂x is [M, K].

    g [M, N], w [N, K]; row, col and tiles as in the forward. Grid: (tiles of K · tiles of rows,).
    """
    groups = N // group_size
    tiles_k = tl.cdiv(K, BLOCK_K)
    task, offs_m, mask_m, rows_m = _load_tile(tiles_ptr, tl.program_id(0) // tiles_k, BLOCK_M)
    offs_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    lanes_n = tl.arange(0, BLOCK_N)
    g_ptrs = g_ptr + rows_m[None, :] * stride_gm + lanes_n[:, None].to(tl.int64) * stride_gn
    w_ptrs = w_ptr + lanes_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    row_ptr += task * stride_row
    col_ptr += task * stride_col
    col = load_col(col_ptr, offs_k, mask_k, K, True, RANK, DOT_RANK)
    acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
    acc = multiply_transposed(
        acc, g_ptrs, w_ptrs, col, row_ptr, col_ptr, offs_k, mask_k, 0, groups * tl.cdiv(group_size, BLOCK_N), K,
        group_size, stride_gn, stride_wn,
        RANK, DOT_RANK, DOT_PRECISION, RESIDUAL, ONE_GROUP, EVEN_N, ACC, PRECISION, BLOCK_N,
    )  # fmt: skip
    store_product(acc, dx_ptr, offs_m, offs_k, mask_m, mask_k, K)


# ---------------------------------------------------------------- forward and ∂x: rows of many tasks in a tile


@triton.jit
def rlrr_linear_multi_mixed_kernel(
    a_ptr, w_ptr, before_ptr, after_ptr, bias_ptr, shift_ptr, rows_ptr, out_ptr,
    count, span, contracted, columns, groups_out, splits,
    stride_am, stride_ac, stride_wc, stride_wo,
    before_task, before_group, before_vector, before_column,
    after_task, after_group, after_vector, after_column,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, IN_PARTS: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LINES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Rows of out [M, O] = a Wᵗ + Σ_j s_after[t, j] ⊙ ((a ⊙ s_before[t, j]) Wᵗ) + bias + shift[t], accumulated in ACC.

    The forward (a = x, s_before = s_c, s_after = s_r) or ∂x (a = g, s_before = s_r, s_after = s_c), rank by rank as
    lines of one product: line j of a row is a ⊙ s_before[t, j - 1] and line 0 is a itself (or nothing, where W is not
    added), so that W is read once for all tasks. rows [count, 2] holds numbers of rows of a and their tasks, -1 for the
    bare W. ``contracted`` and ``columns`` are those of one group; one side alone has several: the result of the forward
    (``groups_out``), or the contraction of ∂x, whose groups are parts. A group has ``splits`` parts of ``span`` values.
    IN_PARTS out is [parts, count, O] in ACC, without bias and shift. Strides of W and of the scales as
    :func:`rlrr_kernels.ops.multi.triton.launches.mixed_launches` has them. Grid: (tiles of O · tiles of rows, parts).
    """
    tiles_per_group = tl.cdiv(columns, BLOCK_O)
    tiles_o = groups_out * tiles_per_group
    pid_o = tl.program_id(0) % tiles_o
    part = tl.program_id(1)
    out_group = pid_o // tiles_per_group
    in_group = part // splits
    lines = tl.arange(0, LINES)
    entry = (tl.program_id(0) // tiles_o) * BLOCK_R + lines % BLOCK_R
    vector = lines // BLOCK_R - 1
    there = entry < count
    a_row = tl.load(rows_ptr + 2 * entry, mask=there, other=0).to(tl.int64)
    task = tl.load(rows_ptr + 2 * entry + 1, mask=there, other=-1)
    plain = there & (vector == -1)
    if not RESIDUAL:
        plain &= task < 0
    scaled = there & (vector >= 0) & (vector < RANK) & (task >= 0)
    task = tl.maximum(task, 0).to(tl.int64)
    vector = tl.maximum(vector, 0)
    group = (in_group + out_group).to(tl.int64)
    local_o = (pid_o % tiles_per_group) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = local_o < columns
    offs_o = (out_group * columns).to(tl.int64) + local_o
    offs_c = tl.arange(0, BLOCK_C)
    first = (part % splits) * span
    last = tl.minimum(first + span, contracted)
    base = (in_group * contracted).to(tl.int64)
    a_ptrs = a_ptr + a_row[:, None] * stride_am
    w_ptrs = w_ptr + offs_o[None, :] * stride_wo
    before_ptrs = before_ptr + (task * before_task + group * before_group + vector * before_vector)[:, None]
    acc = tl.zeros((LINES, BLOCK_O), ACC)
    for start in range(first, last, BLOCK_C):
        here = start + offs_c
        mask_c = here < last
        c = base + here
        if EVEN:
            a = tl.load(a_ptrs + c[None, :] * stride_ac)
            w = tl.load(w_ptrs + c[:, None] * stride_wc)
        else:
            a = tl.load(a_ptrs + c[None, :] * stride_ac, mask=mask_c[None, :], other=0.0)
            w = tl.load(w_ptrs + c[:, None] * stride_wc, mask=mask_c[:, None] & mask_o[None, :], other=0.0)
        mask = scaled[:, None] & mask_c[None, :]
        before = tl.load(before_ptrs + c[None, :] * before_column, mask=mask, other=0.0).to(ACC)
        line = tl.where(scaled[:, None], a.to(ACC) * before, tl.where(plain[:, None], a.to(ACC), 0.0)).to(a.dtype)
        acc = tl.dot(line, w.to(a.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    after_ptrs = after_ptr + (task * after_task + group * after_group + vector * after_vector)[:, None]
    mask = scaled[:, None] & mask_o[None, :]
    after = tl.load(after_ptrs + offs_o[None, :] * after_column, mask=mask, other=0.0).to(ACC)
    acc = tl.where(scaled[:, None], acc * after, tl.where(plain[:, None], acc, 0.0))
    total = tl.sum(tl.reshape(acc, (LINES // BLOCK_R, BLOCK_R, BLOCK_O)), 0)
    entry = (tl.program_id(0) // tiles_o) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = entry < count
    if IN_PARTS:
        out_row = part.to(tl.int64) * count + entry
    else:
        out_row = tl.load(rows_ptr + 2 * entry, mask=there, other=0).to(tl.int64)
    out_columns = (groups_out * columns).to(tl.int64)
    mask = there[:, None] & mask_o[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        task = tl.load(rows_ptr + 2 * entry + 1, mask=there, other=-1).to(tl.int64)
        ptrs = shift_ptr + task[:, None] * out_columns + offs_o[None, :]
        total += tl.load(ptrs, mask=mask & (task >= 0)[:, None], other=0.0).to(ACC)
    ptrs = out_ptr + out_row[:, None] * out_columns + offs_o[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rlrr_linear_multi_mixed_sum_kernel(
    parts_ptr, bias_ptr, shift_ptr, rows_ptr, out_ptr, count, columns, parts,
    HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of out [M, columns] = Σ parts [parts, count, columns] + bias [columns] + shift [T, columns] of their task.

    rows [count, 2] as in the mixed kernel; bias and shift may be unused. Grid: (blocks of columns · count,).
    """
    blocks = tl.cdiv(columns, BLOCK)
    entry = tl.program_id(0) // blocks
    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < columns
    row = tl.load(rows_ptr + 2 * entry).to(tl.int64)
    task = tl.load(rows_ptr + 2 * entry + 1).to(tl.int64)
    parts_ptr += entry.to(tl.int64) * columns
    step = tl.cast(count, tl.int64) * columns
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for _ in range(1, parts):
        parts_ptr += step
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(total.dtype)
    if HAS_SHIFT:
        total += tl.load(shift_ptr + task * columns + offs, mask=mask & (task >= 0), other=0.0).to(total.dtype)
    tl.store(out_ptr + row * columns + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- gradients of the scales, shifts and the bias


@triton.jit
def rlrr_linear_multi_bwd_scales_kernel(
    g_ptr, x_ptr, w_ptr, row_ptr, col_ptr, table_ptr, parts_ptr, col_offset, sum_offset,
    N, K, group_size,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk, stride_row, stride_col,
    RANK: tl.constexpr, DOT_RANK: tl.constexpr, DOT_PRECISION: tl.constexpr,
    NEED_ROW: tl.constexpr, NEED_COL: tl.constexpr, NEED_SUM: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, REST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums of ∂s_r[t] = (G ⊙ W) s_c[t]ᵀ, ∂s_c[t] = s_r[t]ᵀ (G ⊙ W) and Σ g over parts of one task's rows.

    g [M, N], x [M, K], w [N, K], row [T, N, r], col [T, G, r, K], table [P, 3] of (t, first row, end row), t = -1 for
    rows of the bare W, of which only g is summed. G = gᵀx over a part stays here. Written to parts, all ACC: [P, tiles
    of K, N, r] for ∂s_r, at col_offset [P, tiles of a group, G, r, K] for ∂s_c, at sum_offset [P, N] of Σ g. Blocks
    that a part does not fill are REST_M rows high. Grid: (tiles of K, and one more that sums g when NEED_SUM; tiles of
    N; P).
    """
    tiles_per_group = tl.cdiv(group_size, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0)
    pid_n = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    task = tl.load(table_ptr + 3 * part).to(tl.int64)
    first_m = tl.load(table_ptr + 3 * part + 1).to(tl.int64)
    rows_here = (tl.load(table_ptr + 3 * part + 2) - first_m).to(tl.int32)
    local_n = (pid_n % tiles_per_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < group_size
    offs_n = (pid_n // tiles_per_group) * group_size + local_n
    lanes_m = tl.arange(0, BLOCK_M)
    columns_g = g_ptr + first_m * stride_gm + offs_n[:, None].to(tl.int64) * stride_gn
    if NEED_SUM and pid_k == tiles_k:
        total = tl.zeros((BLOCK_N,), ACC)
        for start in range(0, rows_here, BLOCK_M):
            here = start + lanes_m
            mask = mask_n[:, None] & (here < rows_here)[None, :]
            g = tl.load(columns_g + here[None, :].to(tl.int64) * stride_gm, mask=mask, other=0.0)
            total += tl.sum(g.to(ACC), 1)
        tl.store(parts_ptr + sum_offset + part * N + offs_n, total, mask=mask_n)
    elif task >= 0:
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        columns_x = x_ptr + first_m * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        g_ptrs = columns_g + lanes_m[None, :].to(tl.int64) * stride_gm
        x_ptrs = columns_x + lanes_m[:, None].to(tl.int64) * stride_xm
        step = tl.full((), BLOCK_M, tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        whole = rows_here // BLOCK_M * BLOCK_M
        for _ in range(0, whole, BLOCK_M):
            g = tl.load(g_ptrs, mask=mask_n[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
            g_ptrs += step * stride_gm
            x_ptrs += step * stride_xm
        rest_m = tl.arange(0, REST_M)
        for start in tl.range(whole, rows_here, REST_M, num_stages=1):
            here = start + rest_m
            mask_m = here < rows_here
            g_rest = columns_g + here[None, :].to(tl.int64) * stride_gm
            x_rest = columns_x + here[:, None].to(tl.int64) * stride_xm
            g = tl.load(g_rest, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
            x = tl.load(x_rest, mask=mask_k[None, :] & mask_m[:, None], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=ACC)
        row_ptr += task * stride_row
        col_ptr += task * stride_col
        store_scale_parts(
            acc, w_ptr, row_ptr, col_ptr, parts_ptr, col_offset, N, K, group_size, stride_wn, stride_wk,
            pid_k, pid_n, part, RANK, NEED_ROW, NEED_COL, ACC, BLOCK_N, BLOCK_K, DOT_RANK, DOT_PRECISION,
        )  # fmt: skip


@triton.jit
def rlrr_linear_multi_bwd_reduce_kernel(
    parts_ptr, table_ptr, row_ptr, col_ptr, shift_ptr, bias_ptr, col_offset, sum_offset,
    row_count, row_size, col_count, col_size, shift_size, bias_size, parts,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂s_r [T, N r], ∂s_c [T, G r K] and ∂f [T, N] of the tasks in table, ∂b [N] of all rows, in a fixed order.

    parts as the kernel above writes them, ``row_count`` and ``col_count`` sums a part; table [·, 3] of (t, first part,
    end part). A gradient that is not needed has size 0. Grid: (blocks of the sizes, one after another; tasks).
    ∂b is summed beside the first task.
    """
    pid = tl.program_id(0)
    table_ptr += 3 * tl.program_id(1)
    task = tl.load(table_ptr).to(tl.int64)
    first = tl.load(table_ptr + 1).to(tl.int64)
    count = tl.load(table_ptr + 2) - first.to(tl.int32)
    row_blocks = tl.cdiv(row_size, BLOCK)
    col_blocks = tl.cdiv(col_size, BLOCK)
    shift_blocks = tl.cdiv(shift_size, BLOCK)
    if pid < row_blocks:
        sums_ptr = parts_ptr + first * row_count * row_size
        reduce_block(sums_ptr, row_ptr + task * row_size, count * row_count, row_size, pid, BLOCK_P, BLOCK)
    elif pid < row_blocks + col_blocks:
        sums_ptr = parts_ptr + col_offset + first * col_count * col_size
        block = pid - row_blocks
        reduce_block(sums_ptr, col_ptr + task * col_size, count * col_count, col_size, block, BLOCK_P, BLOCK)
    elif pid < row_blocks + col_blocks + shift_blocks:
        sums_ptr = parts_ptr + sum_offset + first * shift_size
        block = pid - row_blocks - col_blocks
        reduce_block(sums_ptr, shift_ptr + task * shift_size, count, shift_size, block, BLOCK_P, BLOCK)
    elif tl.program_id(1) == 0:
        block = pid - row_blocks - col_blocks - shift_blocks
        reduce_block(parts_ptr + sum_offset, bias_ptr, parts, bias_size, block, BLOCK_P, BLOCK)
