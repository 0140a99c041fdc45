"""Tile shapes of the Triton kernels: plain data and pure functions, no GPU needed to read or test them.

No entry has been timed on a GPU yet. They are chosen by compile-only figures (no spills, tensor-core instructions; see
``python -m benchmarks.compile_report``) and, on Hopper, by times predicted from the machine code of each
(``python -m benchmarks.model --tiles``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from rlrr_kernels import devices
from rlrr_kernels.devices import Gpu

UNROLLED_RANK = 4
"""Largest rank whose factor is built without a loop in the kernels."""

LEAST_DOT_RANK, MOST_PIPELINED_RANK = 16, 32
"""What ``tl.dot`` sums over at least: above UNROLLED_RANK the scales are multiplied as matrices of so many vectors. To
the second, sm_90's tiles have registers and shared memory for it beside their pipeline: compiled, no spills."""


class Tiles(NamedTuple):
    """Block sizes over M, N and K, with warps and pipeline stages per program.

    ``max_splits`` is the most splits of a product that :func:`contraction_splits` may choose, ``schedule`` one of
    :data:`SCHEDULES`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_splits: int = 16
    schedule: str = "tiled"


KERNELS = ("forward", "grad_x", "grad_scales")

SCHEDULES = {"tiled": KERNELS, "persistent": ("grad_scales",)}
"""How the programs of a launch share its work, and which kernels know that way.

``tiled``: one program a tile, operands through pointers; any layout, any GPU. ``persistent``: one wave of programs,
each an equal share of all iterations, operands by TMA. What it serves is in :func:`schedules_for`.
"""

EXECUTED = (("grad_scales", "persistent", "sm_90"),)
"""Kernels, schedules and GPUs whose compiled code is executed, without a GPU, before it is released."""

PROVEN: tuple[tuple[str, str, str], ...] = ()
"""The same of those that were measured on a GPU; ``make gpu`` prints the lines to write here."""

TMA_FAMILIES = ("sm_90", "sm_100", devices.INTERPRETER)

TMA_MIN_ROWS = 256
"""Fewer rows of x are never loaded by TMA: a descriptor costs the host more than it saves a short launch."""

STRIP_BYTES = 128
"""Of a row of W: a persistent tile of G is multiplied by W in strips this wide; the rest of it waits in registers."""

# (kernel, bytes per element of x) -> [(largest M, tiles)]; the last entry serves every larger M.
_SM_80 = {
    ("forward", 2): [(16, Tiles(16, 64, 128, 4, 3)), (64, Tiles(64, 64, 64, 4, 3)), (0, Tiles(128, 128, 32, 8, 3))],
    ("grad_x", 2): [(16, Tiles(16, 128, 64, 4, 3)), (64, Tiles(64, 64, 64, 4, 3)), (0, Tiles(128, 32, 128, 8, 3))],
    ("grad_scales", 2): [(16, Tiles(16, 64, 64, 4, 3)), (0, Tiles(32, 128, 128, 8, 3))],
    ("forward", 4): [(16, Tiles(16, 64, 32, 4, 2)), (0, Tiles(32, 64, 32, 8, 2))],
    ("grad_x", 4): [(16, Tiles(16, 32, 64, 4, 2)), (0, Tiles(32, 32, 32, 4, 2))],
    ("grad_scales", 4): [(0, Tiles(32, 64, 32, 8, 2))],
    ("forward", 8): [(0, Tiles(32, 32, 16, 4, 1))],
    ("grad_x", 8): [(0, Tiles(32, 16, 32, 4, 1))],
    ("grad_scales", 8): [(0, Tiles(16, 32, 32, 8, 1))],
}
# By predicted times on an H200: at many rows 128 x 128 x 32 with 8 warps takes 119 registers a thread, so that two
# programs share a multiprocessor and fill one another's gaps: 0.61 of the tensor cores' peak, where x 64 with one
# program is at 0.49. Both are bound by the L2 cache; 256 x 128 would be at 0.65, but has too few programs while rows
# are not yet so many that a merge is faster. Up to 256 rows half the tile is up to a third faster, for the same reason.
# fmt: off
_SM_90 = _SM_80 | {
    ("forward", 2): [
        (16, Tiles(16, 64, 128, 4, 4)), (64, Tiles(64, 64, 128, 4, 4)), (256, Tiles(128, 64, 64, 4, 3)),
        (0, Tiles(128, 128, 32, 8, 4)),
    ],
    ("grad_x", 2): [
        (16, Tiles(16, 128, 64, 4, 4)), (64, Tiles(64, 128, 64, 8, 4)), (256, Tiles(128, 64, 64, 4, 3)),
        (0, Tiles(128, 32, 128, 8, 4)),
    ],
    ("grad_scales", 2): [(64, Tiles(32, 64, 128, 4, 3)), (0, Tiles(64, 128, 128, 8, 4))],
}
# fmt: on
TABLE: dict[str, dict[tuple[str, int], list[tuple[int, Tiles]]]] = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    # Few rows: Hopper's wider tiles spill here from rank 2 on, by hundreds of bytes at rank 4.
    "sm_100": _SM_90
    | {
        ("forward", 2): [
            (16, Tiles(16, 64, 64, 4, 4)),
            (64, Tiles(64, 64, 64, 4, 4)),
            *_SM_90["forward", 2][2:],
        ],
        ("grad_x", 2): [(16, Tiles(16, 64, 64, 4, 4)), (64, Tiles(64, 64, 64, 4, 4)), *_SM_90["grad_x", 2][2:]],
    },
    "gfx942": {key: [(limit, tiles._replace(stages=2)) for limit, tiles in rows] for key, rows in _SM_80.items()}
    | {
        ("forward", 2): [(16, Tiles(16, 64, 128, 4, 2)), (64, Tiles(64, 64, 64, 4, 2)), (0, Tiles(128, 64, 32, 4, 2))],
        ("grad_x", 2): [(16, Tiles(16, 128, 64, 4, 2)), (64, Tiles(64, 64, 64, 4, 2)), (0, Tiles(64, 32, 128, 4, 2))],
    },
    # Small tiles, so that small test shapes have many of them; block sizes differ so that a mixed-up pair shows.
    devices.INTERPRETER: {(kernel, size): [(0, Tiles(16, 32, 64, 4, 1))] for kernel in KERNELS for size in (2, 4, 8)},
}

# gfx942's 8 warps stop a pass of Triton's compiler (3.8) where rows of g are gathered.
TABLE["gfx950"] = TABLE["gfx942"] | {
    ("grad_scales", 2): [TABLE["gfx942"]["grad_scales", 2][0], (0, Tiles(32, 128, 128, 4, 2))],
}

PERSISTENT: dict[str, dict[tuple[str, int], Tiles]] = {
    "sm_90": {("grad_scales", 2): Tiles(64, 128, 256, 8, 4, schedule="persistent")},
    "sm_100": {("grad_scales", 2): Tiles(64, 128, 256, 8, 4, schedule="persistent")},
}
"""What serves in :data:`TABLE`'s place from PERSISTENT_MIN_ROWS on, where TMA can load the operands.

The scale gradients alone. Next to the tiled kernel, by what the compiler made of both for sm_90: a step multiplies 64
rows of 128 x 256 where that one multiplies 128 x 128, so a product needs a quarter less from the L2 cache, which rules
both; other instructions fill a quarter of a step's tensor time; the wait in a step is for the product before; g is read
no second time for the bias; and no wave is partly idle. ``benchmarks.model --tiles`` predicts 94 µs for a 768 to
3072 layer at M = 12,608, where it gives the tiled kernel 139 and the library's gᵀx 100.

Forward and ∂x of many rows are merged and left to the library; persistent forms of them were predicted to be level with
wide tiled ones, so there are none. Triton's own warp specialisation is not used: on Hopper its compiler
fails on a rescaled first operand and on sums over both sides of a tile, leaves the loop as it is, or waits for every
product, depending on the tile (3.6 and 3.9).
"""

PERSISTENT_MIN_ROWS = 1024
"""Rows from which it is: below, the end of a tile, 2,400 instructions a warp, is too much of its work (predicted)."""

IRREGULAR = {
    ("forward", 2): Tiles(32, 64, 32, 8, 1),
    ("grad_x", 2): Tiles(32, 32, 64, 4, 1),
    ("grad_scales", 2): Tiles(32, 64, 64, 8, 1),
    ("forward", 4): Tiles(32, 32, 32, 8, 1),
    ("grad_x", 4): Tiles(32, 32, 32, 4, 1),
    ("grad_scales", 4): Tiles(32, 32, 32, 4, 1),
    **{(kernel, 8): Tiles(16, 32, 32, 8, 1) for kernel in KERNELS},
}
"""Any architecture: odd strides load element by element, a loop over the rank is not pipelined; both take registers."""

KERNEL_US = 2.5
"""What one more kernel costs beside its bytes, in a CUDA graph too: the gap before it, its ramp and its drain."""

ARRIVAL_US = 0.7
"""From the request of a tile to its arrival from memory, under load. Modelled, not measured, as is KERNEL_US."""

EDGE_BLOCKS, MOST_SPLITS = 2, 16
"""EDGE_BLOCKS: prologue and epilogue of a program of the scale gradients, in iterations of its loop (1,300 instructions
a warp and 840 clocks an iteration, both read off the sm_90 code). MOST_SPLITS: the most splits of M where each of them
has enough tiles for the GPU."""


def dot_rank(kernel: str, rank: int, tiles: Tiles, dtype: torch.dtype, weight_itemsize: int, gpu: Gpu) -> int:
    """The rank, padded with zeros, at which a tiled kernel multiplies the scales as matrices; 0: vector by vector.

    fp64 has no such products. The kernel of the scale gradients has registers for them where a thread holds at most 32
    values of a tile of G, or where the tiles of a pipeline leave room.
    """
    if rank <= UNROLLED_RANK or dtype == torch.float64:
        return 0
    wide = kernel == "grad_scales" and tiles.block_n * tiles.block_k > 32 * 32 * tiles.warps
    in_pipeline = multiplied_in_pipeline(rank, dtype, weight_itemsize, gpu)
    return 0 if wide and not in_pipeline else padded_rank(rank)


def padded_rank(rank: int) -> int:
    """The rank to which scales that are multiplied as matrices are padded with zeros: a power of two."""
    return max(LEAST_DOT_RANK, 1 << (rank - 1).bit_length())


def multiplied_in_pipeline(rank: int, dtype: torch.dtype, weight_itemsize: int, gpu: Gpu) -> bool:
    """Whether tiles of :data:`TABLE` multiply the scales as matrices inside their pipeline.

    Beside an fp32 W these have no room for it: up to 256 KiB of shared memory, and spills.
    """
    narrow = dtype.itemsize == weight_itemsize == 2
    return narrow and gpu.family == "sm_90" and UNROLLED_RANK < rank <= MOST_PIPELINED_RANK


def shared_bytes(
    kernel: str, tiles: Tiles, dtype: torch.dtype, weight_dtype: torch.dtype, gpu: Gpu, dot_rank: int = 0
) -> int:
    """At most this much shared memory is used by a program of ``kernel``.

    The scale gradients hold both operands, g and x, for every stage. The others hold W, x or g and up to UNROLLED_RANK
    rows of both scales for every stage but one, whose weight is in registers; one operand is then on its way to another
    layout. On gfx950 that stage is in shared memory too: it loads straight into it. Never less than 48 KiB, which every
    GPU has: changes of layout at the end of a program share the memory of the stages; in a persistent grid these hold
    the next tile by then, and a strip of W is beside them. Products with ``dot_rank`` vectors of the
    scales hold these once more, and G ⊙ W four times.
    """
    size, barriers, least = dtype.itemsize, 64, 48 << 10
    if kernel == "grad_scales":
        stages = tiles.block_m * (tiles.block_n + tiles.block_k) * size * tiles.stages
        if dot_rank:
            vectors = min(dot_rank, 32) * (tiles.block_n + tiles.block_k)
            least = max(least, 4 * (4 * tiles.block_n * tiles.block_k + vectors))
        return max(least, stages + barriers + (tiles.block_n * STRIP_BYTES if tiles.schedule == "persistent" else 0))
    contracted = tiles.block_k if kernel == "forward" else tiles.block_n
    first, second = tiles.block_m * contracted, tiles.block_n * tiles.block_k
    scales = max(UNROLLED_RANK, dot_rank) * (tiles.block_n + tiles.block_k) * max(4, size)
    stage = first * size + second * weight_dtype.itemsize + scales
    result = scales if dot_rank else 0  # on its way to another layout
    last = first * size + second * weight_dtype.itemsize if gpu.family == "gfx950" else max(first, second) * size
    return max(least, stage * max(tiles.stages - 1, 1) + last + barriers + result)


def fits(kernel: str, tiles: Tiles, dtype: torch.dtype, weight_dtype: torch.dtype, gpu: Gpu) -> bool:
    """Whether a GPU has a program's shared memory; an unknown one is taken to have the least."""
    limit = devices.SHARED_BYTES.get(gpu.name, devices.LEAST_SHARED_BYTES)
    return shared_bytes(kernel, tiles, dtype, weight_dtype, gpu) <= limit


def shape_class(kernel: str, gpu: Gpu, dtype: torch.dtype, rows: int) -> int:
    """The largest M of the table's class that serves ``rows``; 0 for the last, which has none."""
    return next((limit for limit, _ in TABLE[gpu.family][kernel, dtype.itemsize][:-1] if rows <= limit), 0)


# ---------------------------------------------------------------- which schedules serve a product


class Operand(NamedTuple):
    """The layout of a matrix."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    itemsize: int
    aligned: bool  # whether it begins at a multiple of 16 bytes


class Product(NamedTuple):
    """One of the layer's products, as the choice of its tiles sees it."""

    kernel: str
    gpu: Gpu
    dtype: torch.dtype  # of x and g
    weight_dtype: torch.dtype
    rank: int
    first: Operand  # [M, ...]: x or g
    second: Operand  # W or x
    sampled: bool = False  # whether G is an estimate from sampled rows

    @classmethod
    def of(
        cls, kernel: str, gpu: Gpu, first: torch.Tensor, second: torch.Tensor, weight_dtype: torch.dtype, rank: int,
        sampled: bool = False,
    ) -> Product:  # fmt: skip
        """That of two tensors."""
        operands = [Operand(t.shape, t.stride(), t.itemsize, t.data_ptr() % 16 == 0) for t in (first, second)]
        return cls(kernel, gpu, first.dtype, weight_dtype, rank, *operands, sampled)

    @property
    def regular(self) -> bool:
        """Whether :data:`TABLE` applies: rows 16 elements apart or contiguous, and no loop in the product's loop."""
        strides = *self.first.strides, *self.second.strides
        unrolled = self.rank <= UNROLLED_RANK or self.kernel == "grad_scales"
        in_table = unrolled or multiplied_in_pipeline(self.rank, self.dtype, self.weight_dtype.itemsize, self.gpu)
        return in_table and all(stride == 1 or stride % 16 == 0 for stride in strides)


def schedules_for(product: Product) -> tuple[str, ...]:
    """The schedules that can serve a product, whether or not they are faster or proven.

    ``persistent`` loads both operands by TMA: their rows must be contiguous and begin, as the matrix does, at multiples
    of 16 bytes, one after another, and coordinates are 32 bits wide. A loop over the rank would take the registers that
    a wide tile of G leaves.
    """
    able = (
        product.kernel == "grad_scales"
        and product.gpu.family in TMA_FAMILIES
        and product.rank <= UNROLLED_RANK
        and not product.sampled
    )
    if able and all(
        0 < rows < 2**31
        and 0 < columns < 2**31
        and inner == 1
        and stride >= columns
        and stride * itemsize % 16 == 0
        and stride * itemsize < 2**40
        and aligned
        for (rows, columns), (stride, inner), itemsize, aligned in (product.first, product.second)
    ):
        return ("tiled", "persistent")
    return ("tiled",)


def proven(kernel: str, schedule: str, gpu: Gpu) -> bool:
    """Whether a schedule may serve without being asked for."""
    return schedule == "tiled" or (kernel, schedule, gpu.name) in EXECUTED + PROVEN


def tiles_of(product: Product) -> Tiles:
    """The shipped tiles of a product."""
    if product.gpu.family != devices.INTERPRETER and not product.regular:
        return IRREGULAR[product.kernel, product.dtype.itemsize]
    return tiles_for(product.kernel, product.gpu, product.dtype, product.first.shape[0], schedules_for(product))


@functools.lru_cache(maxsize=4096)
def tiles_for(kernel: str, gpu: Gpu, dtype: torch.dtype, rows: int, schedules: tuple[str, ...] = ("tiled",)) -> Tiles:
    """The shipped tiles of ``kernel`` for M = ``rows`` rows of x of ``dtype``, where ``schedules`` can serve.

    For operands that are :attr:`Product.regular`.
    """
    persistent = PERSISTENT.get(gpu.family, {}).get((kernel, dtype.itemsize))
    if (
        persistent is not None
        and "persistent" in schedules
        and rows >= PERSISTENT_MIN_ROWS
        and proven(kernel, "persistent", gpu)
    ):
        return persistent
    entries = TABLE[gpu.family][kernel, dtype.itemsize]
    return next((tiles for limit, tiles in entries[:-1] if rows <= limit), entries[-1][1])


def no_such_schedule(kernel: str, tiles: Tiles) -> ValueError:
    """The error of tiles whose schedule the kernel does not have."""
    known = [name for name, kernels in SCHEDULES.items() if kernel in kernels]
    return ValueError(f"schedule of {kernel} must be one of {known}; got {tiles.schedule!r}")


# ---------------------------------------------------------------- how work is cut


def wave(tiles: Tiles, gpu: Gpu) -> int:
    """Programs that run at once: one of 8 warps has a multiprocessor's registers to itself; of 4, two share it."""
    return gpu.multiprocessors * max(1, 8 // tiles.warps)


def steps_a_program(steps: int, tiles: Tiles, gpu: Gpu) -> int:
    """Iterations of each program of a persistent grid that shares ``steps``, so that all run at once; at least 4."""
    return max(4, -(-steps // wave(tiles, gpu)))


def splits_for(rows: int, tiles: Tiles, programs: int, gpu: Gpu) -> int:
    """The number of splits of M for the scale gradients, each of which ``programs`` tiles cover.

    The one that is done first if a multiprocessor runs one program at a time: whole waves of programs, each as long as
    its blocks of M and EDGE_BLOCKS. A split keeps at least 4 blocks.
    """
    multiprocessors = gpu.multiprocessors
    blocks, programs = -(-rows // tiles.block_m), max(programs, 1)
    most = min(rows // (4 * tiles.block_m), max(MOST_SPLITS, 2 * multiprocessors // programs))

    def length(splits: int) -> int:
        return -(-programs * splits // multiprocessors) * (-(-blocks // splits) + EDGE_BLOCKS)

    return min(range(1, max(most, 1) + 1), key=length)


def contraction_splits(blocks: int, programs: int, tiles: Tiles, gpu: Gpu) -> int:
    """Split-K: the number of splits of the ``blocks`` along K (forward) or N (∂x), where tiles alone fill no GPU.

    A 768-wide layer at M ≤ 64 has 12 tiles for 132 multiprocessors. 1 when there are as many programs as
    multiprocessors; each split keeps at least 2 blocks, and all of them start at most one wave. 1 also where the blocks
    that a program is spared take no longer than the kernel that sums the splits: one block takes as long as its
    products at half the GPU's peak, and no less than its tiles take to arrive, ``stages`` - 1 of them at a time.
    """
    splits = max(1, min(gpu.multiprocessors // max(programs, 1), blocks // 2, tiles.max_splits))
    if splits == 1 or gpu.name == devices.INTERPRETER:  # small tests must meet split products
        return splits
    rate = gpu.peaks.half / 2 / gpu.multiprocessors
    products_us = 2e6 * tiles.block_m * tiles.block_n * tiles.block_k / rate
    block_us = max(products_us, ARRIVAL_US / max(tiles.stages - 1, 1))
    return splits if blocks * (1 - 1 / splits) * block_us > KERNEL_US else 1
