"""The kernel scheduled by hand for Hopper: its results in any order of events, and what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gluon_simulator import Deadlock, Descriptor, Fault, Pointer, Simulation

SOURCE = Path(__file__).parent.parent / "rlrr_kernels/ops/linear_gluon_kernels.py"

SHAPES = [  # M, N, K, groups, block_m, stages, programs
    (1, 8, 8, 1, 16, 2, 1),
    (20, 136, 200, 1, 16, 3, 2),
    (37, 256, 72, 2, 16, 2, 3),
    (50, 384, 192, 3, 32, 4, 2),
    (130, 320, 64, 1, 64, 3, 5),
    (16, 128, 512, 1, 16, 5, 1),
]


def check(
    simulation: Simulation, transposed: bool, shape: tuple[int, ...], seeds: Sequence[int], residual=True
) -> None:
    """What the kernel stores is the result in float64, for whole numbers that are exact in every dtype on the way."""
    for seed in seeds:
        result, exact = simulate(simulation, transposed, shape, seed, residual)
        np.testing.assert_array_equal(result, exact)


def simulate(simulation: Simulation, transposed: bool, shape: tuple[int, ...], seed: int, residual: bool = True):
    """What the kernel stores and the exact result."""
    count, n, k, groups, block_m, stages, programs = shape
    draw = np.random.default_rng(seed)
    weight = draw.integers(-3, 4, (n, k)).astype(np.float16)
    row = draw.integers(-2, 3, n).astype(np.float32)
    col = draw.integers(-2, 3, (groups, k)).astype(np.float32)
    bias = draw.integers(-9, 9, n).astype(np.float32)
    merged = weight.astype(np.float64) * (residual + row[:, None] * np.repeat(col, n // groups, 0))
    rows, contracted = (k, n) if transposed else (n, k)
    x = draw.integers(-3, 4, (count, contracted)).astype(np.float16)
    y = np.full((count, rows), np.nan, np.float32)
    row_tiles = -(-rows // 128)
    simulation.launch(
        "rescaled_product_kernel", programs, seed,
        x_desc=Descriptor(x, (block_m, 64)), w_desc=Descriptor(weight, (64, 64)),
        col_desc=Descriptor(row[None] if transposed else col, (1, 64)), y_desc=Descriptor(y, (block_m, 64)),
        row_ptr=Pointer(col if transposed else row), bias_ptr=Pointer(bias),
        tiles=row_tiles * -(-count // block_m), row_tiles=row_tiles, steps=-(-contracted // 128) * 2, rows=rows,
        group_size=n // groups, TRANSPOSED=transposed, ONE_GROUP=groups == 1, RESIDUAL=residual,
        HAS_BIAS=not transposed, BLOCK_M=block_m, STAGES=stages,
    )  # fmt: skip
    return y, x @ merged if transposed else x @ merged.T + bias


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "grad_x"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_the_result_is_exact_in_every_order_of_events(transposed: bool, shape: tuple[int, ...]):
    check(Simulation(SOURCE), transposed, shape, range(12))


def test_without_the_residual():
    check(Simulation(SOURCE), False, SHAPES[1], range(2), residual=False)


MISTAKES = {
    "tiles are read before they have come": (
        "    mbarrier.wait(full.index(stage), step // STAGES & 1)\n    tile", "    tile"
    ),
    "tiles are overwritten while they are used": (
        "            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)\n",
        "",
    ),
    "one half gives a stage back for both": (
        "mbarrier.init(ring[4].index(stage), count=2)",
        "mbarrier.init(ring[4].index(stage), count=1)",
    ),
    "a stage is given back before its product has ended": (
        "    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])\n    mbarrier.arrive(ring[4].index(step % STAGES))\n",
        "    mbarrier.arrive(ring[4].index(step % STAGES))\n    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])\n",
    ),
    "the last product is not waited for": ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),
    "registers are free while a product reads them": ("    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])\n",
                                                      "    acc = warpgroup_mma_wait(0, deps=[acc])\n"),
    "too few bytes are expected": ("+ 2 * w_desc.block_type.nbytes", "+ w_desc.block_type.nbytes"),
    "the wrong phase": ("step // STAGES & 1 ^ 1", "step // STAGES & 1"),
    "no stage is given back": ("    mbarrier.arrive(ring[4].index(step % STAGES))\n", ""),
    "the wrong stage is given back": ("ring, step - 1, STAGES)", "ring, step, STAGES)"),
    "y is overwritten before it has left": ("        tma.store_wait(0)  # what is in y_tile has left\n", ""),
    "a program ends before y has left": ("y_tile)\n    tma.store_wait(0)\n", "y_tile)\n"),
    "no fence before y leaves": (
        "        fence_async_shared()\n        copy_out",
        "        copy_out",
    ),
    "no fence after the barriers": ("    fence_async_shared()\n    numbers", "    numbers"),
    "a copy is started twice": (
        "            copy_in(x_desc, [m, k], ready, x_tiles.index(stage))\n",
        "            copy_in(x_desc, [m, k], ready, x_tiles.index(stage))\n" * 2,
    ),
    "both halves read one tile of W": ("w_tiles.index(2 * stage + half)\n    if", "w_tiles.index(2 * stage)\n    if"),
    "scales of the next step": ("ring, step + 1, half,", "ring, step, half,"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str):
    simulation = Simulation(SOURCE, MISTAKES[mistake])
    with pytest.raises((Fault, Deadlock, AssertionError)):
        check(simulation, False, SHAPES[1], range(25))


def test_one_stage_would_deadlock():
    with pytest.raises(Deadlock, match="waits for a barrier's phase"):
        simulate(Simulation(SOURCE), False, (16, 128, 128, 1, 16, 1, 1), 0)
