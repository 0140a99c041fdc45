"""yᵀ = W' xᵀ and ∂xᵀ = W'ᵀ gᵀ for Hopper, scheduled by hand: one tile of W is rescaled while another multiplies.

Triton's own schedule rescales a tile of W, multiplies, and only then rescales the next, so tensor cores and the other
units take turns. Here a program has three parts, each in warps of its own, that pass tiles through a ring of stages in
shared memory, kept in step by two barriers a stage (``full``: the tiles are there; ``empty``: nobody reads them):

- one warp starts the copies of the tiles of W, x and one scale by the tensor memory accelerator (TMA);
- two groups of four warps each own half of the output tile. A group starts the asynchronous product of its rescaled
  tile of W, which lies in registers, rescales the next one from shared memory meanwhile, and only then waits.

Programs stay and take several output tiles, so the copies for the next tile run while the last one is written.

No GPU has run this. For every commit what the compiler makes of it is executed with copies and products late and in any
order (``tests/support/ptx``); whether that overlaps as it should is in ``python -m benchmarks.compile_report``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 renamed them.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

SIDE = gl.constexpr(64)
"""Rows of W' of one group of warps, and the depth of a step: a tile of W is [64, 64]."""


@gluon.jit
def _load_tiles(
    x_desc, w_desc, col_desc, ring, numbers,
    TRANSPOSED: gl.constexpr, ONE_GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: for every step both halves' tiles of W, their common col, and x."""
    x_tiles, w_tiles, col_tiles, full, empty = ring
    tiles, row_tiles, steps, _, group_size = numbers
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile % row_tiles * (2 * SIDE)
        m = tile // row_tiles * BLOCK_M
        for k in range(0, steps * SIDE, SIDE):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
            mbarrier.expect(ready, x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes + col_desc.block_type.nbytes)
            for half in gl.static_range(2):
                here = row + half * SIDE
                if TRANSPOSED:
                    copy_in(w_desc, [k, here], ready, w_tiles.index(2 * stage + half))
                else:
                    copy_in(w_desc, [here, k], ready, w_tiles.index(2 * stage + half))
            copy_in(col_desc, [0 if TRANSPOSED or ONE_GROUP else row // group_size, k], ready, col_tiles.index(stage))
            copy_in(x_desc, [m, k], ready, x_tiles.index(stage))
            step += 1


@gluon.jit
def _rescale(
    ring, step, half, row_ptr, offs, mask,
    TRANSPOSED: gl.constexpr, RESIDUAL: gl.constexpr, STAGES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """(1 + row col) times the tile of W of a step, once it is there: the first operand of a product, rounded once."""
    _, w_tiles, col_tiles, full, _ = ring
    stage = step % STAGES
    row = gl.load(row_ptr + offs, mask=mask, other=0.0)
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    tile = w_tiles.index(2 * stage + half)
    if TRANSPOSED:
        tile = tile.permute((1, 0))
    w = tile.load(OPERAND)
    col = col_tiles.index(stage).reshape([SIDE]).load(gl.SliceLayout(0, OPERAND))
    factor = gl.expand_dims(row, 1) * gl.expand_dims(col, 0)
    if RESIDUAL:
        factor += 1.0
    w = (w.to(gl.float32) * factor).to(w.dtype)
    # Passes at once; the compiler moves no arithmetic over its branch, behind the wait for the product that runs now.
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    return w


@gluon.jit
def _multiply(a, acc, ring, step, STAGES: gl.constexpr):
    """Starts acc + a b for the tile b of x of a step."""
    return warpgroup_mma(a, ring[0].index(step % STAGES).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _finish(a, acc, ring, step, STAGES: gl.constexpr):
    """Waits for the product of a step, which reads ``a`` until it ends, and gives the stage back."""
    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])
    mbarrier.arrive(ring[4].index(step % STAGES))
    return acc


@gluon.jit
def _multiply_tiles(
    half: gl.constexpr, outputs, ring, numbers,
    TRANSPOSED: gl.constexpr, ONE_GROUP: gl.constexpr, RESIDUAL: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps of half the rows of W' of every output tile."""
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    y_desc, y_tiles, row_ptr, bias_ptr = outputs
    tiles, row_tiles, steps, rows, group_size = numbers
    y_tile = y_tiles.index(half)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = tile % row_tiles * (2 * SIDE) + half * SIDE
        offs = first + gl.arange(0, SIDE, gl.SliceLayout(1, OPERAND))
        mask = offs < rows
        acc = gl.zeros([SIDE, BLOCK_M], gl.float32, RESULT)
        # Two tiles of W' in turn, each in registers of its own: one is read by a product while the other is made.
        even = _rescale(ring, step, half, row_ptr, offs, mask, TRANSPOSED, RESIDUAL, STAGES, OPERAND)
        for k in range(SIDE, steps * SIDE, 2 * SIDE):
            acc = _multiply(even, acc, ring, step, STAGES)
            offs_here = offs + k // group_size * rows if TRANSPOSED and not ONE_GROUP else offs
            odd = _rescale(ring, step + 1, half, row_ptr, offs_here, mask, TRANSPOSED, RESIDUAL, STAGES, OPERAND)
            acc = _finish(even, acc, ring, step, STAGES)
            acc = _multiply(odd, acc, ring, step + 1, STAGES)
            step += 2
            if k + SIDE < steps * SIDE:
                if TRANSPOSED and not ONE_GROUP:
                    offs_here = offs + (k + SIDE) // group_size * rows
                even = _rescale(ring, step, half, row_ptr, offs_here, mask, TRANSPOSED, RESIDUAL, STAGES, OPERAND)
            acc = _finish(odd, acc, ring, step - 1, STAGES)
        if HAS_BIAS:
            offs = first + gl.arange(0, SIDE, gl.SliceLayout(1, RESULT))
            acc += gl.expand_dims(gl.load(bias_ptr + offs, mask=offs < rows, other=0.0).to(gl.float32), 1)
        tma.store_wait(0)  # what is in y_tile has left
        y_tile.permute((1, 0)).store(acc.to(y_tile.dtype))
        fence_async_shared()
        copy_out(y_desc, [tile // row_tiles * BLOCK_M, first], y_tile)
    tma.store_wait(0)


@gluon.jit
def rescaled_product_kernel(
    x_desc, w_desc, col_desc, y_desc, row_ptr, bias_ptr, tiles, row_tiles, steps, rows, group_size,
    TRANSPOSED: gl.constexpr, ONE_GROUP: gl.constexpr, RESIDUAL: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """yᵀ [N, M] = (W ⊙ (1 + s_r s_c)) xᵀ + b; TRANSPOSED, ∂xᵀ [K, M] = (W ⊙ (1 + s_r s_c))ᵀ gᵀ; stored as y and ∂x.

    Descriptors, with their blocks: x [M, K] or g [M, N] of [BLOCK_M, 64]; w [N, K] of [64, 64], 16-bit as x; col, fp32,
    s_c [G, K] or s_r [1, N] of [1, 64]; y [M, N] or ∂x [M, K] of [BLOCK_M, 64]. row, fp32: s_r [N] or s_c [G, K]. bias
    [N] or unused. ``rows`` of the result, N or K, in ``row_tiles`` of 128; ``steps`` of 64 that are contracted, an even
    number: what lies outside a matrix arrives as zeros. ``group_size``: a multiple of 128, any of
    ONE_GROUP. At least two stages; 4 warps; grid: any number of programs up to ``tiles``.
    """
    ring = (
        gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, SIDE], x_desc.layout),
        gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, SIDE, SIDE], w_desc.layout),
        gl.allocate_shared_memory(col_desc.dtype, [STAGES, 1, SIDE], col_desc.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, SIDE], y_desc.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring[3].index(stage), count=1)
        mbarrier.init(ring[4].index(stage), count=2)
    fence_async_shared()
    numbers = (tiles, row_tiles, steps, rows, group_size)
    outputs = (y_desc, y_tiles, row_ptr, bias_ptr)
    gl.warp_specialize(
        [
            (_multiply_tiles, (0, outputs, ring, numbers, TRANSPOSED, ONE_GROUP, RESIDUAL, HAS_BIAS, BLOCK_M, STAGES)),
            (_multiply_tiles, (1, outputs, ring, numbers, TRANSPOSED, ONE_GROUP, RESIDUAL, HAS_BIAS, BLOCK_M, STAGES)),
            (_load_tiles, (x_desc, w_desc, col_desc, ring, numbers, TRANSPOSED, ONE_GROUP, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
