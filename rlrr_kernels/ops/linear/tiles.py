"""Tile shapes of the Triton kernels: plain data and pure functions, no GPU needed to read or test them.

No entry has been timed on a GPU yet. They are chosen by compile-only figures (no spills, tensor-core instructions; see
``python -m benchmarks.compile_report``) and, on Hopper, by times predicted from the machine code of each
(``python -m benchmarks.model.tiles``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

UNROLLED_RANK = 4
"""Largest rank whose factor is built without a loop in the kernels."""


class Tiles(NamedTuple):
    """Block sizes over rows of x, rows of W and columns of W, with warps and pipeline stages per program.

    ``max_splits`` is the largest number of parts into which :func:`contraction_splits` may cut a product, ``schedule``
    one of :data:`SCHEDULES`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_splits: int = 16
    schedule: str = "tiled"


KERNELS = ("forward", "grad_x", "grad_scales")

SCHEDULES = {"tiled": KERNELS, "persistent": KERNELS, "gluon": ("forward", "grad_x")}
"""How the programs of a launch share its work, and which kernels know that way.

``tiled``: one program a tile, operands through pointers; any layout, any GPU. ``persistent``: one wave of programs,
each an equal share of all steps, operands by TMA; for operands that :func:`by_tma` can load. ``gluon``: scheduled by
hand for Hopper (``triton/kernels_gluon.py``), its ``warps`` are those of each half of a tile; for problems
that :func:`by_hand` describes besides.
"""

EXPERIMENTAL = ("gluon",)
"""Schedules that could hang a GPU, and that none has run: never chosen and never tuned unless asked for."""

TMA_ARCHITECTURES = ("sm_90", "sm_100", "interpreter")

TMA_MIN_ROWS = 256
"""Fewer rows of x are never loaded by TMA: a descriptor costs the host more than it saves a short launch."""

STRIP_BYTES = 128
"""Of a row of W: a persistent tile of G is multiplied by W in strips this wide; the rest of it waits in registers."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
"""Architectures with entries of their own; any other takes ``DEFAULT_ARCHITECTURE``'s."""

DEFAULT_ARCHITECTURE = "sm_80"
"""Safe anywhere: at most 64 KiB of shared memory in the 16-bit entries."""

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
    "interpreter": {(kernel, size): [(0, Tiles(16, 32, 64, 4, 1))] for kernel in KERNELS for size in (2, 4, 8)},
}

PERSISTENT: dict[str, dict[tuple[str, int], Tiles]] = {
    "sm_90": {("grad_scales", 2): Tiles(64, 128, 256, 8, 4, schedule="persistent")},
    "sm_100": {("grad_scales", 2): Tiles(64, 128, 256, 8, 4, schedule="persistent")},
}
"""What serves in :data:`TABLE`'s place from PERSISTENT_MIN_ROWS on, where TMA can load the operands.

The scale gradients alone. Next to the tiled kernel, by what the compiler made of both for sm_90: a step multiplies 64
rows of 128 x 256 where that one multiplies 128 x 128, so a product needs a quarter less from the L2 cache, which rules
both; other instructions fill a quarter of a step's tensor time; the wait in a step is for the product before; g is read
no second time for the bias; and no wave is partly idle. ``benchmarks.model.tiles`` predicts 92 µs for a 768 to
3072 layer at M = 12,608, where it gives the tiled kernel 139 and the library's gᵀx 110.

Forward and ∂x of many rows are merged and left to the library; their persistent forms are predicted to be level with
wide tiled ones, so they are left to the tuner. Triton's own warp specialisation is not used: on Hopper its compiler
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

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 6}
"""Used to split M in the scale gradients: from the architecture, not the device, so that results repeat everywhere."""


class Peaks(NamedTuple):
    """A GPU's datasheet: bytes a second of its memory, dense operations a second by what is multiplied."""

    bandwidth: float
    half: float
    tf32: float
    float32: float
    float64: float


PEAKS = {
    "sm_80": Peaks(2.0e12, 312e12, 156e12, 19.5e12, 19.5e12),  # A100, 80 GB
    "sm_90": Peaks(4.8e12, 989e12, 494e12, 67e12, 67e12),  # H200
    "sm_100": Peaks(8.0e12, 2250e12, 1100e12, 75e12, 37e12),  # B200
    "gfx942": Peaks(5.3e12, 1307e12, 653e12, 163e12, 163e12),  # MI300X
}
"""An architecture without an entry takes ``DEFAULT_ARCHITECTURE``'s."""

KERNEL_US = 2.5
"""What one more kernel costs beside its bytes, in a CUDA graph too: the gap before it, its ramp and its drain."""

ARRIVAL_US = 0.7
"""From the request of a tile to its arrival from memory, under load. Modelled, not measured, as is KERNEL_US."""

EDGE_BLOCKS, MOST_SPLITS = 2, 16
"""What a program of the scale gradients does beside its loop, in trips through it (1,300 instructions a warp beside 840
clocks a trip, both read off the sm_90 code); and the most parts where every part has enough tiles for the GPU."""

SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10,
    "interpreter": 1 << 30,
}  # fmt: skip
"""Shared memory one block may use, by the device's own name (CUDA C++ programming guide, compute capabilities; AMD CDNA
ISA), whether or not it has entries of its own above."""

LEAST_SHARED_BYTES = 64 << 10
"""What any GPU that Triton serves has."""


def device_name(capability: tuple[int, int] | None, gcn_arch: str | None = None) -> str:
    """ "sm_90" for capability (9, 0), AMD names without their features, "interpreter" for neither."""
    if gcn_arch:
        return gcn_arch.split(":")[0]
    return f"sm_{capability[0]}{capability[1]}" if capability else "interpreter"


def architecture(capability: tuple[int, int] | None, gcn_arch: str | None = None) -> str:
    """The architecture whose entries serve a device: its own name, or the safe default for one without entries."""
    name = device_name(capability, gcn_arch)
    return name if name in ARCHITECTURES else DEFAULT_ARCHITECTURE


def shared_bytes(kernel: str, tiles: Tiles, dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """At most this much shared memory is used by a program of ``kernel``.

    The scale gradients hold both operands, g and x, for every stage. The others hold W, x or g and up to
    UNROLLED_RANK rows of both scales for every stage but one, whose weight is in registers; one operand is then on its
    way to another layout. Never less than 48 KiB, which every GPU has: changes of layout at the end of a program share
    the memory of the stages; in a persistent grid these hold the next tile by then, and a strip of W or of the result
    is beside them.
    """
    size, barriers, least = dtype.itemsize, 64, 48 << 10
    persistent = tiles.schedule == "persistent"
    if kernel == "grad_scales":
        stages = tiles.block_m * (tiles.block_n + tiles.block_k) * size * tiles.stages
        return max(least, stages + barriers + (tiles.block_n * STRIP_BYTES if persistent else 0))
    contracted = tiles.block_k if kernel == "forward" else tiles.block_n
    if tiles.schedule == "gluon":  # tiles of x, W and a scale for every stage, that of y, barriers
        stage = (tiles.block_m * contracted + tiles.block_n * tiles.block_k) * size + contracted * 4
        result = tiles.block_m * (tiles.block_n + tiles.block_k - contracted) * size
        return stage * tiles.stages + result + 512
    first, second = tiles.block_m * contracted, tiles.block_n * tiles.block_k
    scales = UNROLLED_RANK * (tiles.block_n + tiles.block_k) * max(4, size)
    stage = first * size + second * weight_dtype.itemsize + scales
    result = 512 * tiles.warps if persistent else 0  # on its way to another layout
    return max(least, stage * max(tiles.stages - 1, 1) + max(first, second) * size + barriers + result)


def fits(kernel: str, tiles: Tiles, dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> bool:
    """Whether a device of this name has a program's shared memory; an unknown one is taken to have the least."""
    return shared_bytes(kernel, tiles, dtype, weight_dtype) <= SHARED_BYTES.get(device, LEAST_SHARED_BYTES)


def shape_class(kernel: str, arch: str, dtype: torch.dtype, rows: int) -> int:
    """The largest M of the table's class that serves ``rows``; 0 for the last, which has none."""
    entries = TABLE.get(arch, TABLE[DEFAULT_ARCHITECTURE])[kernel, dtype.itemsize]
    return next((limit for limit, _ in entries[:-1] if rows <= limit), 0)


@functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes
def regular(rank: int, *strides: int) -> bool:
    """Whether the tiles of :data:`TABLE` apply: rows 16 elements apart or contiguous, and no loop over the rank."""
    return rank <= UNROLLED_RANK and all(stride == 1 or stride % 16 == 0 for stride in strides)


@functools.lru_cache(maxsize=4096)
def tiles_for(kernel: str, arch: str, dtype: torch.dtype, rows: int, regular: bool = True, tma: bool = False) -> Tiles:
    """The tiles of ``kernel`` ("forward", "grad_x" or "grad_scales") for M = ``rows`` rows of x of ``dtype``.

    ``tma``: :func:`by_tma` holds for both operands of its product.
    """
    if not regular and arch != "interpreter":
        return IRREGULAR[kernel, dtype.itemsize]
    if tma and rows >= PERSISTENT_MIN_ROWS and (tiles := PERSISTENT.get(arch, {}).get((kernel, dtype.itemsize))):
        return tiles
    entries = TABLE.get(arch, TABLE[DEFAULT_ARCHITECTURE])[kernel, dtype.itemsize]
    return next((tiles for limit, tiles in entries[:-1] if rows <= limit), entries[-1][1])


def experimental(tiles: Tiles) -> bool:
    """Whether a launch with these tiles may hang, so that it belongs in a process that can be killed."""
    return tiles.schedule in EXPERIMENTAL


def check_schedule(kernel: str, tiles: Tiles) -> None:
    """Refuses tiles whose schedule the kernel does not have.

    Raises:
        ValueError: it does not.
    """
    if kernel not in SCHEDULES.get(tiles.schedule, ()):
        known = [name for name, kernels in SCHEDULES.items() if kernel in kernels]
        raise ValueError(f"schedule of {kernel} must be one of {known}; got {tiles.schedule!r}")


def by_tma(shape: tuple[int, int], strides: tuple[int, int], itemsize: int, address: int) -> bool:
    """Whether the tensor memory accelerator can load blocks of a matrix.

    Its rows must be contiguous and begin, as the matrix does, at multiples of 16 bytes, one after another; coordinates
    are 32 bits wide.
    """
    (rows, columns), (stride, inner) = shape, strides
    return (
        0 < rows < 2**31
        and 0 < columns < 2**31
        and inner == 1
        and stride >= columns
        and stride * itemsize % 16 == 0
        and stride * itemsize < 2**40
        and address % 16 == 0
    )


def by_hand(
    arch: str, dtype: torch.dtype, weight_dtype: torch.dtype, weight_shape: tuple[int, int], rank: int, groups: int
) -> bool:
    """Whether the schedule ``gluon`` serves a weight [N, K], beside operands that :func:`by_tma` can load.

    Rows of the result and of the scales must begin at multiples of 16 bytes, and no tile of W may straddle two groups.
    """
    rows, cols = weight_shape
    return (
        arch == "sm_90"
        and dtype == weight_dtype
        and dtype in (torch.bfloat16, torch.float16)
        and rank == 1
        and rows % 8 == 0
        and cols % 8 == 0
        and (groups == 1 or rows // groups % 128 == 0)
    )


def wave(tiles: Tiles, arch: str) -> int:
    """Programs that run at once: one of 8 warps has a multiprocessor's registers to itself; of 4, two share it."""
    return MULTIPROCESSORS.get(arch, MULTIPROCESSORS[DEFAULT_ARCHITECTURE]) * max(1, 8 // tiles.warps)


def steps_a_program(steps: int, tiles: Tiles, arch: str) -> int:
    """How many of ``steps`` blocks each program of a persistent grid does, so that all run at once; at least 4."""
    return max(4, -(-steps // wave(tiles, arch)))


def splits_for(rows: int, tiles: Tiles, programs: int, arch: str) -> int:
    """Into how many parts M is split for the scale gradients, of which ``programs`` tiles cover one part.

    The number that is done first where a multiprocessor runs one program at a time: whole waves of programs, each as
    long as its blocks of M and EDGE_BLOCKS. A part keeps at least 4 blocks.
    """
    multiprocessors = MULTIPROCESSORS.get(arch, MULTIPROCESSORS[DEFAULT_ARCHITECTURE])
    blocks, programs = -(-rows // tiles.block_m), max(programs, 1)
    most = min(rows // (4 * tiles.block_m), max(MOST_SPLITS, 2 * multiprocessors // programs))

    def length(splits: int) -> int:
        return -(-programs * splits // multiprocessors) * (-(-blocks // splits) + EDGE_BLOCKS)

    return min(range(1, max(most, 1) + 1), key=length)


def contraction_splits(blocks: int, programs: int, tiles: Tiles, arch: str) -> int:
    """Into how many parts forward and ∂x cut the ``blocks`` they contract, where tiles alone fill no GPU.

    A 768-wide layer at M ≤ 64 has 12 tiles for 132 multiprocessors. 1 when there are as many programs as
    multiprocessors; each part keeps at least 2 blocks, and all parts together start at most one wave. 1 also where the
    blocks that a program is spared take no longer than the kernel that sums the parts: one block takes as long as its
    products at half the GPU's peak, and no less than its tiles take to arrive, ``stages`` - 1 of them at a time.
    """
    multiprocessors = MULTIPROCESSORS.get(arch, MULTIPROCESSORS[DEFAULT_ARCHITECTURE])
    splits = max(1, min(multiprocessors // max(programs, 1), blocks // 2, tiles.max_splits))
    if splits == 1 or arch == "interpreter":  # small tests must meet products in parts
        return splits
    rate = PEAKS.get(arch, PEAKS[DEFAULT_ARCHITECTURE]).half / 2 / multiprocessors
    products_us = 2e6 * tiles.block_m * tiles.block_n * tiles.block_k / rate
    block_us = max(products_us, ARRIVAL_US / max(tiles.stages - 1, 1))
    return splits if blocks * (1 - 1 / splits) * block_us > KERNEL_US else 1
