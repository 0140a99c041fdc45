"""Which way the rows of every task are multiplied in Triton, as pure functions of a batch's segments.

``library``: rows of the bare W, and tasks of so many rows that merging W' pays (the crossover of ``rlrr_linear``).
``tiles``: rows of one task a tile, whose W' is made in registers. ``mixed``: rows of many tasks in a tile, where x is
rescaled instead: 1 + r products of a row, but none for padding. Modelled, not measured, as all of
:mod:`rlrr_kernels.ops.choice.path`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlrr_kernels import devices
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.path import REACHED_BANDWIDTH, REACHED_RATE, precision_kind
from rlrr_kernels.ops.choice.tiles import KERNEL_US, Product, Tiles
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.multi.task_index import BARE, Segments

RESCALED_ROWS = 32
"""What making a tile of W' costs beside its product, in rows of x: four instructions an element, half of them in the
shadow of the tensor cores."""

CACHE_OVER_MEMORY = 2.0
"""Bytes a second of the L2 cache over those of memory."""

MOST_MIXED_RANK = 7
"""Above, most lines of a mixed tile would be scaled copies of few rows."""

LEAST_RUN, MOST_MIXED_ROWS = 64, 256
"""Samples of a task that are no neighbours stay where they are if they have so many rows each, or the batch so few."""

MIXED = {2: Tiles(64, 64, 64, 4, 3), 4: Tiles(32, 32, 32, 4, 2), 8: Tiles(16, 16, 16, 4, 1)}
"""Lines, columns of the result and values of the contraction of a mixed tile, by bytes of an element of x."""

MIXED_IRREGULAR = Tiles(64, 32, 32, 4, 1)
"""The same for 16 bits where operands are loaded element by element."""


class Cut(NamedTuple):
    """The rows of a batch by the way they are multiplied, each as (task, first row, end row)."""

    library: Segments
    tiled: Segments  # one tile each
    mixed: Segments
    tiles: Tiles
    mixed_tiles: Tiles

    @property
    def padding(self) -> float:
        """The share of the tiles' rows that belong to no sample."""
        rows = sum(end - first for _, first, end in self.tiled)
        return 1.0 - rows / (len(self.tiled) * self.tiles.block_m) if rows else 0.0


WIDE = {"forward": Tiles(256, 128, 64, 8, 3), "grad_x": Tiles(256, 64, 128, 8, 3)}
"""For 16-bit operands on sm_90 beside the shipped tiles of ``rlrr_linear``: the 197 rows of an image of 224 pixels in
one tile, for which W is read and rescaled once. By the machine code of each it takes less time than two tiles of 128,
and as long as one of 128 + 64 + 16 rows, whose three products have the compiler rescale W three times."""


def candidate_tiles(product: Product) -> tuple[Tiles, ...]:
    """What tiles of rows may be of."""
    if not product.regular and product.gpu.family != devices.INTERPRETER:
        return (configs.IRREGULAR[product.kernel, product.dtype.itemsize],)
    found = [tiles for _, tiles in configs.TABLE[product.gpu.family][product.kernel, product.dtype.itemsize]]
    narrow = product.dtype.itemsize == product.weight_dtype.itemsize == 2
    if product.gpu.family == "sm_90" and narrow and product.rank <= configs.UNROLLED_RANK:
        found.append(WIDE[product.kernel])
    return tuple(dict.fromkeys(found))


def lines_a_row(rank: int) -> int:
    """Lines of a mixed tile for a row: itself and its products with r scales, as a power of two."""
    return 1 << rank.bit_length()


def may_mix(rank: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether rows of several tasks may share a tile.

    x is rounded once more there, which beside an fp32 W that is rounded too would be over the error rule.
    """
    return rank <= MOST_MIXED_RANK and dtype == weight_dtype


def mixed_tiles(product: Product) -> Tiles:
    """Of what rows of several tasks are mixed in."""
    size = product.dtype.itemsize
    return MIXED[size] if product.regular or size > 2 else MIXED_IRREGULAR


def _rates(product: Product) -> tuple[float, float]:
    """Operations and bytes from the cache, a microsecond."""
    tf32 = product.dtype == torch.float32 and matmul_precision() == "tf32" and product.gpu.tf32
    peaks = product.gpu.peaks
    rate = REACHED_RATE * getattr(peaks, precision_kind(product.dtype, tf32))
    return 1e-6 * rate, 1e-6 * CACHE_OVER_MEMORY * REACHED_BANDWIDTH * peaks.bandwidth


def _pass_us(product: Product, multiplied: int, loaded: int, width: int) -> float:
    """A pass over W: operations of ``multiplied`` rows; W is read and, for each ``width`` columns, ``loaded`` rows."""
    rate, cache = _rates(product)
    (rows, cols), size = product.second.shape, product.dtype.itemsize
    columns, contracted = (rows, cols) if product.kernel == "forward" else (cols, rows)
    moved = rows * cols * product.weight_dtype.itemsize + -(-columns // width) * loaded * contracted * size
    return max(2.0 * multiplied * rows * cols / rate, moved / cache)


def tile_us(product: Product, tiles: Tiles) -> float:
    """Microseconds of a whole GPU for one tile of rows."""
    width = tiles.block_n if product.kernel == "forward" else tiles.block_k
    return _pass_us(product, tiles.block_m + RESCALED_ROWS, tiles.block_m, width)


def mixed_row_us(product: Product) -> float:
    """Microseconds of a whole GPU for a row of a mixed tile."""
    tiles = mixed_tiles(product)
    rows = tiles.block_m // lines_a_row(product.rank)
    return _pass_us(product, tiles.block_m, rows, tiles.block_n) / rows


def cut_rows(segments: Segments, product: Product, merges: Callable[[int, int], bool]) -> Cut:
    """The cut of least predicted time of those in which all tiles of rows are alike.

    Args:
        segments: (task, first row, end row), none of them empty.
        product: the forward or ∂x; the number of its rows does not matter.
        merges: whether the rows from a first to an end, which are one task's, are left to a merge.
    """
    library = tuple(s for s in segments if s[0] == BARE or merges(s[1], s[2]))
    fused = [s for s in segments if s not in library]
    mixable = may_mix(product.rank, product.dtype, product.weight_dtype)
    mixed_us = mixed_row_us(product) if mixable else float("inf")
    best, best_us = None, float("inf")
    for tiles in candidate_tiles(product):
        one_us, size = tile_us(product, tiles), tiles.block_m
        rests = [(task, end - (end - first) % size, end) for task, first, end in fused]
        mixed = tuple(s for s in rests if 0 < (s[2] - s[1]) * mixed_us < one_us)
        saved = sum(one_us - (end - first) * mixed_us for _, first, end in mixed)
        if saved < 2 * KERNEL_US:
            mixed, saved = (), 0.0
        us = one_us * sum(-(-(end - first) // size) for _, first, end in fused) - saved + 2 * KERNEL_US * bool(mixed)
        if us < best_us:
            apart, best_us = {end: first for _, first, end in mixed}, us
            tiled = tuple(
                (task, start, min(start + size, apart.get(end, end)))
                for task, first, end in fused
                for start in range(first, apart.get(end, end), size)
            )
            best = Cut(library, tiled, mixed, tiles, mixed_tiles(product))
    bare = tuple(s for s in library if s[0] == BARE and (s[2] - s[1]) * mixed_us < KERNEL_US)
    if best.mixed and bare:  # a few more rows rather than another launch
        best = best._replace(library=tuple(s for s in library if s not in bare), mixed=bare + best.mixed)
    return best
