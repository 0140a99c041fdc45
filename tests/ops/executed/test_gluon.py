"""The kernel scheduled by hand for Hopper, executed from compiled PTX: exact in any order of events, and no mistake
in its schedule goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices, numerics

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear.tiles import Tiles
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.tuning import tiles as tuning
from tests.ops.executed.test_tiles import launches_and_outputs
from tests.support.ptx import Deadlock, Fault
from tests.support.ptx.launcher import changed, execute

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    pytest.skip(f"Triton {triton.__version__} lacks what the kernel uses of Gluon", allow_module_level=True)

SM_90 = devices.typical("sm_90")

KERNELS = ("forward", "grad_x")
ORDERS = (None, 0, 1)
slow = pytest.mark.slow

SHAPES = [  # M, N, K, groups, block_m, stages, programs
    (20, 136, 200, 1, 16, 3, 2),
    pytest.param((37, 256, 72, 2, 16, 2, 3), marks=slow),
    pytest.param((1, 8, 8, 1, 16, 2, 1), marks=slow),
    pytest.param((50, 384, 192, 3, 32, 4, 2), marks=slow),
    pytest.param((130, 320, 64, 1, 64, 3, 5), marks=slow),
    pytest.param((16, 128, 512, 1, 16, 5, 1), marks=slow),
]


def whole(shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """A problem of numbers so small and whole that every dtype on the way holds every result."""
    draw = np.random.default_rng(seed)
    count, n, k, groups, *_ = shape
    sizes = {"x": (count, k), "grad_y": (count, n), "weight": (n, k)}
    scales = {"scale_row": (n, 1), "scale_col": (groups, 1, k), "bias": (n,)}
    drawn = {name: torch.tensor(draw.integers(-1, 2, size)) for name, size in (sizes | scales).items()}
    return {name: tensor.to(torch.float16 if name in sizes else torch.float32) for name, tensor in drawn.items()}


def problem(kernel: str, shape: tuple[int, ...], residual: bool = True) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """A launch of some programs, what it fills, and what that should hold."""
    t = whole(shape, 0)
    block_m, stages, programs = shape[4:]
    given = t["weight"], t["scale_row"], t["scale_col"]
    tiles = Tiles(block_m, *((128, 64) if kernel == "forward" else (64, 128)), 4, stages, schedule="gluon")
    if kernel == "forward":
        result = torch.full_like(t["grad_y"], torch.nan)
        (launch,) = linear_launches.forward_launches(t["x"], *given, t["bias"], residual, result, SM_90, "ieee", tiles)
    else:
        result = torch.full_like(t["x"], torch.nan)
        (launch,) = linear_launches.grad_x_launches(t["grad_y"], *given, residual, result, SM_90, "ieee", tiles)
    exact = numerics.exact_outputs(t, residual)["y" if kernel == "forward" else "x"]
    grid = (min(programs, *launch.plan.grid),)
    return changed(launch, Path(), grid=grid), result, exact


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_the_result_is_exact_in_every_order_of_events(kernel: str, shape: tuple[int, ...]):
    for seed in ORDERS:
        launch, result, exact = problem(kernel, shape)
        execute(launch, "sm_90", seed)
        assert torch.equal(result.double(), exact), seed


@slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_many_orders(kernel: str):
    for seed in range(25):
        launch, result, exact = problem(kernel, (20, 136, 200, 1, 16, 3, 2), residual=seed % 2 == 0)
        execute(launch, "sm_90", seed)
        assert torch.equal(result.double(), exact), seed


def tiles_and_dtypes() -> list:
    return [
        (kernel, tiles, dtype)
        for kernel in KERNELS
        for tiles in tuning.EXPERIMENTAL_CANDIDATES[kernel, 2]
        for dtype in (torch.bfloat16, torch.float16)
    ]


@slow
@pytest.mark.parametrize(("kernel", "tiles", "dtype"), tiles_and_dtypes())
def test_error_rule(kernel: str, tiles: Tiles, dtype: torch.dtype):
    """Of the tiles that the tuner tries."""
    for rows, n, k, groups in ((tiles.block_m + 24, 256, 320, 1), (tiles.block_m + 8, 384, 200, 3)):
        case = Case(rows, n, k, 1, groups, dtype=dtype)
        tensors = {name: tensor.detach() for name, tensor in case.draw(0).items()}
        (launch,), outputs = launches_and_outputs(kernel, tensors, "sm_90", tiles)
        execute(launch, "sm_90", 0)
        exact = numerics.exact_outputs(tensors, True)
        eager = numerics.outputs(numerics.rlrr_linear_reference, tensors, True)
        for name, actual in outputs.items():
            allowed = numerics.RATIO * numerics.relative_error(eager[name], exact[name])
            assert numerics.relative_error(actual, exact[name]) <= allowed, (name, case)


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "tiles are read before they have come": (
        "    mbarrier.wait(full.index(stage), step // STAGES & 1)\n    tile", "    tile"
    ),
    "tiles are overwritten while they are used": (
        "            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)\n", "",
    ),
    "one half gives a stage back for both": (
        "mbarrier.init(ring[4].index(stage), count=2)", "mbarrier.init(ring[4].index(stage), count=1)",
    ),
    "a stage is given back before its product has ended": (
        "    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])\n    mbarrier.arrive(ring[4].index(step % STAGES))\n",
        "    mbarrier.arrive(ring[4].index(step % STAGES))\n    acc, _ = warpgroup_mma_wait(0, deps=[acc, a])\n",
    ),
    "the last product is not waited for": ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),
    "too few bytes are expected": ("+ 2 * w_desc.block_type.nbytes", "+ w_desc.block_type.nbytes"),
    "the wrong phase": ("step // STAGES & 1 ^ 1", "step // STAGES & 1"),
    "no stage is given back": ("    mbarrier.arrive(ring[4].index(step % STAGES))\n", ""),
    "the wrong stage is given back": ("ring, step - 1, STAGES)", "ring, step, STAGES)"),
    "y is overwritten before it has left": ("        tma.store_wait(0)  # what is in y_tile has left\n", ""),
    "a program ends before y has left": ("y_tile)\n    tma.store_wait(0)\n", "y_tile)\n"),
    "no fence after the barriers": ("    fence_async_shared()\n    numbers", "    numbers"),
    "a copy is started twice": (
        "            copy_in(x_desc, [m, k], ready, x_tiles.index(stage))\n",
        "            copy_in(x_desc, [m, k], ready, x_tiles.index(stage))\n" * 2,
    ),
    "both halves read one tile of W": ("w_tiles.index(2 * stage + half)\n    if", "w_tiles.index(2 * stage)\n    if"),
    "scales of the next step": ("ring, step + 1, half,", "ring, step, half,"),
}  # fmt: skip
"""(old, new) text of the kernel's source. Registers that are free while a product reads them are none: ``ptxas`` gives
registers out. A missing fence before y leaves is none either: the compiler puts one there."""

LATE = ("a stage is given back before its product has ended",)
"""Found in adversarial orders alone."""

MISTAKEN = (40, 136, 392, 1, 16, 3, 2)


def outcome(orders: Iterable[int | None], *changes: tuple[str, str], folder: Path, edit=None, **meta) -> tuple:
    """The first order of events in which a result is wrong, and what is; (None, None) for none."""
    for seed in orders:
        launch, result, exact = problem("forward", MISTAKEN)
        try:
            execute(changed(launch, folder, *changes, **meta), "sm_90", seed, edit)
        except Fault as fault:
            return seed, type(fault)
        if not torch.equal(result.double(), exact):
            return seed, ValueError
    return None, None


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[slow] if index % 7 else []) for index, name in enumerate(MISTAKES)]
)
def test_mistakes_are_found(mistake: str, tmp_path: Path):
    if mistake in LATE:
        assert outcome([None], MISTAKES[mistake], folder=tmp_path)[1] is None
        assert outcome(range(25), MISTAKES[mistake], folder=tmp_path)[1]
    else:
        assert outcome(ORDERS, MISTAKES[mistake], folder=tmp_path)[1]


def test_a_missing_fence_before_y_leaves_is_found(tmp_path: Path):
    def all_but_the_first(ptx: str) -> str:
        first, fence, rest = ptx.partition("fence.proxy.async.shared::cta;")
        assert fence in rest
        return first + fence + rest.replace(fence, "")

    assert outcome([None], folder=tmp_path, edit=all_but_the_first) == (None, Fault)


def test_one_stage_would_deadlock(tmp_path: Path):
    assert outcome([None], folder=tmp_path, STAGES=1) == (None, Deadlock)


def test_no_mistake_is_found_where_there_is_none(tmp_path: Path):
    assert outcome(ORDERS, folder=tmp_path) == (None, None)
