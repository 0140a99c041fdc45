"""Times of kernel launches on an H200, by what they move and compute; ``docs/costs/model.md`` says what is assumed.

A launch takes the largest of: bytes over bandwidth, each operand read once and each result written once; operations
over rate, idle multiprocessors counted; for the fused kernels what their tiles read from the L2 cache; and waits one
after another. A fixed cost of every launch is added. All else overlaps: real times are longer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.support.common import Problem
from rlrr_kernels import devices
from rlrr_kernels.ops.choice import path as path_model
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles

ARCHITECTURE = "sm_90"
"""Whose tiles and paths are modelled."""

SCHEDULES = tuple(configs.SCHEDULES)
"""What the shipped tiles may be of."""

GPU = devices.typical(ARCHITECTURE)
_, _, MULTIPROCESSORS, PEAKS = GPU
BANDWIDTH = path_model.REACHED_BANDWIDTH * PEAKS.bandwidth
CLOCK_HZ = 1.755e9
"""Of an H100 or H200 SXM under load; the datasheet's 989 TFLOP/s are 132 times 4096 operations at 1.83 GHz."""

L2_BYTES_A_CLOCK = 5120
"""From the L2 cache to all multiprocessors (A100 whitepaper; none is published for Hopper)."""

LIBRARY_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.87, (64, 256): 0.8, (64, 128): 0.7, (64, 64): 0.5}
"""Output tiles the vendor's library is taken to choose from, and the share of its best rate that each reaches."""

LIBRARY_IN_FLIGHT = 384
"""Of the contraction, how much one of its programs is taken to have on its way: six stages of 64."""

PARTIAL_SUM_CLOCKS = 0.13
"""Clocks of a multiprocessor for each value of G that is made partial sums of, read off the sm_90 code."""


class Ceilings(NamedTuple):
    """Bytes a second of a large copy (reads plus writes), operations a second of a large product by precision."""

    bandwidth: float
    rates: dict[str, float]


_HALF = path_model.REACHED_RATE * PEAKS.half
H200 = Ceilings(
    BANDWIDTH,
    {"bf16": _HALF, "fp16": _HALF} | {
        "tf32": path_model.REACHED_RATE * PEAKS.tf32, "fp32": path_model.REACHED_RATE * PEAKS.float32,
    },
)  # fmt: skip
"""What is taken for an H200 where none has measured."""


class Cost(NamedTuple):
    """What one kernel launch is charged for; the largest of its times counts, and ``KERNEL_US``."""

    bytes: float  # from and to memory
    operations: float = 0.0  # multiplications and additions
    idle: float = 1.0  # how much longer these take because some multiprocessors have no tile, or a tile is padded
    cache_bytes: float = 0.0  # from the L2 cache to the multiprocessors
    least_us: float = 0.0  # waits one after another, whatever the rates

    def microseconds(self, bandwidth: float, rate: float) -> float:
        """With ``bandwidth`` bytes and ``rate`` operations a second."""
        rated = max(self.operations / rate, self.cache_bytes / (L2_BYTES_A_CLOCK * CLOCK_HZ)) * self.idle
        return max(1e6 * max(self.bytes / bandwidth, rated), self.least_us) + configs.KERNEL_US


def _split(split: Cost, result_bytes: float, partial_bytes: float) -> list[Cost]:
    """A product's launch, and where it is split the one that sums its fp32 partial results."""
    if not partial_bytes:
        return [split._replace(bytes=split.bytes + result_bytes)]
    return [split._replace(bytes=split.bytes + partial_bytes), Cost(partial_bytes + result_bytes)]


def whole_waves(programs: int) -> float:
    """How much longer ``programs`` equal programs take than their share of all multiprocessors' time."""
    return -(-programs // MULTIPROCESSORS) * MULTIPROCESSORS / programs


def library_product(m: int, n: int, k: int, size: int, bandwidth: float, rate: float) -> list[Cost]:
    """The vendor library's launches of [M, K] by [K, N], elements of ``size`` bytes: the fastest tile and split-K."""
    if not m * n * k:
        return [Cost(size * m * n)]
    options = []
    for (a, b), share in LIBRARY_TILES.items():
        tiles = -(-m // a) * -(-n // b)
        padding = tiles * a * b / (m * n)
        # An operand that only one row of programs reads comes from memory.
        arrival = configs.ARRIVAL_US if m <= a or n <= b else 0.0
        for splits in (1, 2, 3, 4, 5, 6, 7, 8, 16):
            idle = whole_waves(tiles * splits) * padding / share
            waits = arrival * max(0.0, k / splits / LIBRARY_IN_FLIGHT - 1)
            launch = Cost(size * (m * k + n * k), 2.0 * m * n * k, idle, 0.0, waits)
            options.append(_split(launch, size * m * n, 4 * splits * m * n if splits > 1 else 0))
    return min(options, key=lambda launches: sum(launch.microseconds(bandwidth, rate) for launch in launches))


class Grid(NamedTuple):
    """How a fused kernel cuts a problem into programs."""

    programs: int
    iterations: int  # of a program's main loop
    tile_bytes: int  # of the operands of an iteration
    result_bytes: int  # of a program
    m_tiles: int
    splits: int
    ends: float = 0.0  # how often a program of a persistent grid ends a tile


def grid(kernel: str, tiles: Tiles, m: int, n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Grid:
    """The grid of a kernel of ``configs.KERNELS`` on x [M, K] and W [N, K], as it is launched on Hopper."""
    size, weight_size = dtype.itemsize, weight_dtype.itemsize
    bm, bn, bk = tiles[:3]
    of_m, of_n, of_k = -(-m // bm), -(-n // bn), -(-k // bk)
    if kernel == "grad_scales":
        moved = bm * (bn + bk) * size
        if tiles.schedule == "persistent":
            iterations = configs.steps_a_program(of_n * of_k * of_m, tiles, GPU)
            ends = iterations / of_m + 1
            splits = max(1, -(-of_m // iterations))
            programs = -(-of_n * of_k * of_m // iterations)
            return Grid(programs, iterations, moved, round(4 * (bn + bk) * ends), of_m, splits, ends)
        programs = of_n * (of_k + 1)  # those that sum g for the bias among them
        splits = configs.splits_for(m, tiles, programs, GPU)
        return Grid(programs * splits, -(-of_m // splits), moved, 4 * (bn + bk), of_m, splits, 1.0)
    output_tiles, steps, width, contracted = (of_n, of_k, bn, bk) if kernel == "forward" else (of_k, of_n, bk, bn)
    output_tiles *= of_m
    moved = bm * contracted * size + bn * bk * weight_size
    splits = configs.contraction_splits(steps, output_tiles, tiles, GPU)
    iterations = -(-steps // splits)
    splits = -(-steps // iterations)
    return Grid(output_tiles * splits, iterations, moved, bm * width * (4 if splits > 1 else size), of_m, splits)


class _Layer:
    """The launches of one problem at given ceilings."""

    def __init__(self, problem: Problem, ceilings: Ceilings, precision: str) -> None:
        precision = precision.split("/")[0]
        self.problem, self.bandwidth, self.rate = problem, ceilings.bandwidth, ceilings.rates[precision]
        self.tf32 = precision == "tf32"
        self.sizes = self.m, self.n, self.k = problem.m, problem.n, problem.k
        self.rank = problem.rank
        self.dtype, self.weight_dtype = problem.dtype, problem.weight_dtype or problem.dtype
        self.x, self.y = self.m * self.k * self.dtype.itemsize, self.m * self.n * self.dtype.itemsize
        self.weight, self.merged = (self.n * self.k * dtype.itemsize for dtype in (self.weight_dtype, self.dtype))

    def library(self, m: int, n: int, k: int) -> list[Cost]:
        return library_product(m, n, k, self.dtype.itemsize, self.bandwidth, self.rate)

    def cast(self) -> list[Cost]:
        """Autocast's copy of an fp32 W."""
        return [Cost(self.weight + self.merged)] if self.weight != self.merged else []

    def multiply_adds(self, count: float) -> float:
        """So many fp32 multiply-adds outside the matrix units, in operations at the rate of the products."""
        return 2.0 * count * self.rate / (path_model.REACHED_RATE * PEAKS.float32)

    def factors(self, products: int) -> float:
        """What ``products`` of the scales by one another, or by G ⊙ W, cost for each element of W, beside rank 1."""
        if self.rank > configs.UNROLLED_RANK:
            return 2.0 * products * path_model.MATRIX_OPERATIONS * configs.padded_rank(self.rank)
        return products * self.multiply_adds(self.rank - 1)

    def product(self, kernel: str, path: str) -> list[Cost]:
        """y or ∂x: ``library`` with a given W, ``merge``, ``fused`` (fused) or ``auto``."""
        if path == "auto":
            dtypes = self.dtype, self.weight_dtype, self.tf32
            path = "merge" if path_model.merge_gain(*self.sizes, self.rank, GPU, *dtypes) > 1 else "fused"
        if path == "fused":
            return self._fused(kernel)
        merged = Cost(self.weight + self.merged, self.multiply_adds((self.rank - 1) * self.n * self.k))
        merge = [merged] if path == "merge" else []
        sizes = (self.m, self.n, self.k) if kernel == "forward" else (self.m, self.k, self.n)
        return merge + self.library(*sizes)

    def _fused(self, kernel: str) -> list[Cost]:
        itemsize, weight_itemsize = self.dtype.itemsize, self.weight_dtype.itemsize
        tiles = configs.tiles_for(kernel, GPU, self.dtype, self.m)
        in_pipeline = configs.multiplied_in_pipeline(self.rank, self.dtype, weight_itemsize, GPU)
        if self.rank > configs.UNROLLED_RANK and not in_pipeline:
            tiles = configs.IRREGULAR[kernel, itemsize]
        cut = grid(kernel, tiles, *self.sizes, self.dtype, self.weight_dtype)
        given, result = (self.x, self.y) if kernel == "forward" else (self.y, self.x)
        arrival = configs.ARRIVAL_US if cut.m_tiles == 1 else configs.ARRIVAL_US / 2
        iterations = cut.programs * cut.iterations
        launch = Cost(
            self.weight + given, iterations * tiles.block_n * tiles.block_k * (2.0 * tiles.block_m + self.factors(1)),
            whole_waves(cut.programs), iterations * cut.tile_bytes,
            arrival * max(0.0, cut.iterations / max(tiles.stages - 1, 1) - 1),
        )  # fmt: skip
        return _split(launch, result, 4 * cut.splits * result / itemsize if cut.splits > 1 else 0)

    def scales(self, share: float) -> list[Cost]:
        """Partial sums of ∂s_r, ∂s_c and ∂b from ``share`` of the rows, and their reduction."""
        schedules = SCHEDULES if share == 1 and self.rank <= configs.UNROLLED_RANK else SCHEDULES[:1]
        tiles = configs.tiles_for("grad_scales", GPU, self.dtype, self.m, schedules)
        rows = max(1, round(self.m * share))
        cut = grid("grad_scales", tiles, rows, self.n, self.k, self.dtype, self.weight_dtype)
        bm, bn, bk = tiles[:3]
        of_n, of_k = -(-self.n // bn), -(-self.k // bk)
        iterations = cut.m_tiles * of_n * of_k
        if tiles.schedule == "persistent":
            idle = cut.iterations * MULTIPROCESSORS / iterations
        else:
            idle = whole_waves(cut.programs) * (of_k + 1) / of_k
        partial = 4 * cut.splits * (self.rank * (of_k * self.n + of_n * self.k) + self.n)
        made = bn * bk * cut.programs * cut.ends  # values of G that are made partial sums of
        made_us = 1e6 * (PARTIAL_SUM_CLOCKS * made / MULTIPROCESSORS / CLOCK_HZ + self.factors(2) * made / self.rate)
        launch = Cost(share * (self.x + self.y) + self.weight + partial, 2.0 * iterations * bm * bn * bk, idle)
        launch = launch._replace(cache_bytes=iterations * cut.tile_bytes)
        products_us = launch._replace(bytes=0.0).microseconds(self.bandwidth, self.rate) - configs.KERNEL_US
        return [launch._replace(least_us=products_us + made_us), Cost(partial)]

    def reference(self) -> tuple[list[Cost], list[Cost], list[Cost]]:
        """Forward, ∂x and scale gradients of the eager formula, kernel by kernel."""
        w = self.weight
        if self.rank == 1:
            merge = [Cost(2 * w), Cost(2 * w), Cost(3 * w), *self.cast()]  # ⊙ s_c, ⊙ s_r, + W
            gradients = [Cost(3 * w), Cost(w), Cost(2 * w), Cost(3 * w), Cost(w), Cost(self.y)]
        else:
            factor = Cost(w, self.multiply_adds(self.rank * self.n * self.k))  # s_r s_c; its like for either gradient
            merge = [factor, Cost(3 * w), Cost(3 * w), *self.cast()]  # ⊙ W, + W
            gradients = [Cost(3 * w), factor, factor, Cost(self.y)]
        forward = merge + self.product("forward", "library")
        scales = self.library(self.n, self.k, self.m) + self.cast() + gradients
        return forward, self.product("grad_x", "library"), scales


def launches(
    name: str, work: str, problem: Problem, share: float = 1.0, ceilings: Ceilings = H200, precision: str = "bf16"
) -> list[Cost]:
    """The launches of implementation ``name`` for ``work`` ("forward", "step": forward and backward, or "scales").

    ``scales`` is the gradient of scales and bias alone, G = gᵀx for the floor; under ``share`` from these rows, whose
    drawing is left out.
    """
    layer = _Layer(problem, ceilings, precision)
    if name == "reference":
        forward, grad_x, scales = layer.reference()
    elif name in ("floor", "frozen", "merged"):
        cast = layer.cast() if name == "frozen" else []
        forward, grad_x = cast + layer.product("forward", "library"), cast + layer.product("grad_x", "library")
        scales = layer.library(layer.n, layer.k, layer.m) if name == "floor" else [Cost(layer.y)]  # only ∂b
    elif name == "torch":
        forward, grad_x = layer.product("forward", "merge"), layer.product("grad_x", "merge")
        scales = [*layer.library(layer.n, layer.k, layer.m), Cost(layer.merged + 10 * layer.n * layer.k * 4)]
    else:
        path = {"triton": "fused"}.get(name, name.removeprefix("triton."))
        forward, grad_x, scales = layer.product("forward", path), layer.product("grad_x", path), layer.scales(share)
        if share < 1:  # rows of x are copied in the forward; the images' means read all of g
            forward, scales = [*forward, Cost(2 * share * layer.x)], [Cost(layer.y + share * layer.x), *scales]
    return {"forward": forward, "scales": scales, "step": forward + grad_x + scales}[work]


MODELLED = ("floor", "frozen", "merged", "reference", "triton", "triton.fused", "triton.merge", "auto", "torch")


def model_us(
    name: str, work: str, problem: Problem, precision: str, ceilings: Ceilings = H200, share: float | None = None
) -> float | None:
    """Microseconds the model gives ``name``, or with ``share`` an estimate from these rows; None if not modelled."""
    path = "auto" if share else name
    if path not in MODELLED:
        return None
    rate = ceilings.rates[precision.split("/")[0]]
    found = launches(path, work, problem, share or 1.0, ceilings, precision)
    return sum(launch.microseconds(ceilings.bandwidth, rate) for launch in found)
