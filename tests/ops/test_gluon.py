"""The kernel scheduled by hand for Hopper: its results in any order of events, and what the compiler makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.support.gluon_simulator import Deadlock, Descriptor, Fault, Pointer, Simulation
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, numerics
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.tiles import Tiles
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.tuning import store as tuned_tiles
from rlrr_kernels.ops.tuning import tiles as tuning

SOURCE = ROOT / "rlrr_kernels/ops/linear/triton/kernels_gluon.py"
KERNELS = ("forward", "grad_x")

needs_compiler = pytest.mark.skipif(backends.INTERPRETING, reason="with Triton's interpreter on, nothing compiles")

SHAPES = [  # M, N, K, groups, block_m, stages, programs
    (1, 8, 8, 1, 16, 2, 1),
    (20, 136, 200, 1, 16, 3, 2),
    (37, 256, 72, 2, 16, 2, 3),
    (50, 384, 192, 3, 32, 4, 2),
    (130, 320, 64, 1, 64, 3, 5),
    (16, 128, 512, 1, 16, 5, 1),
]


def simulate(
    simulation: Simulation, kernel: str, t: dict[str, torch.Tensor], shape, seed: int, residual=True, **changes
):
    """What the launch of a kernel on the tensors ``t`` stores, in the order of events that a seed makes."""
    *_, block_m, stages, programs = shape
    given = t["weight"], t["scale_row"], t["scale_col"], residual
    blocks = (block_m, 128, 64) if kernel == "forward" else (block_m, 64, 128)
    tiles = Tiles(*blocks, warps=4, stages=stages, schedule="gluon")
    result = torch.full_like(t["grad_y"] if kernel == "forward" else t["x"], torch.nan)
    if kernel == "forward":
        (launch,) = linear_launches.forward_launches(t["x"], *given[:3], t["bias"], residual, result, "sm_90", tiles)
    else:
        (launch,) = linear_launches.grad_x_launches(t["grad_y"], *given, result, "sm_90", tiles)
    plan, arrays = launch.plan, [tensor.numpy() for tensor in launch.tensors]
    arguments = [Descriptor(array, block) for array, block in zip(arrays, plan.blocks, strict=False)]
    arguments += [Pointer(array) for array in arrays[len(plan.blocks) :]] + list(plan.numbers)
    named = dict(zip(plan.kernel.arg_names, arguments, strict=False))
    constants = {name: value for name, value in plan.meta.items() if name in plan.kernel.arg_names}
    simulation.launch("rescaled_product_kernel", programs, seed, **(named | constants | changes))
    return result


def exact(kernel: str, t: dict[str, torch.Tensor], residual: bool = True) -> torch.Tensor:
    """The result in float64."""
    t = {name: tensor.double() for name, tensor in t.items()}
    groups = len(t["scale_col"])
    scales = t["scale_row"] * t["scale_col"][:, 0].repeat_interleave(len(t["weight"]) // groups, 0)
    merged = t["weight"] * (residual + scales)
    return t["x"] @ merged.T + t["bias"] if kernel == "forward" else t["grad_y"] @ merged


def whole(shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """A problem of numbers so small and whole that every dtype on the way holds every result."""
    draw = np.random.default_rng(seed)
    count, n, k, groups, *_ = shape
    sizes = {"x": (count, k), "grad_y": (count, n), "weight": (n, k)}
    scales = {"scale_row": (n, 1), "scale_col": (groups, 1, k), "bias": (n,)}
    drawn = {name: torch.tensor(draw.integers(-1, 2, size)) for name, size in (sizes | scales).items()}
    return {name: tensor.to(torch.float16 if name in sizes else torch.float32) for name, tensor in drawn.items()}


def check(simulation: Simulation, kernel: str, shape: tuple[int, ...], seeds: Sequence[int], residual=True) -> None:
    for seed in seeds:
        t = whole(shape, seed)
        assert torch.equal(simulate(simulation, kernel, t, shape, seed, residual).double(), exact(kernel, t, residual))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_the_result_is_exact_in_every_order_of_events(kernel: str, shape: tuple[int, ...]):
    check(Simulation(SOURCE), kernel, shape, range(12))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_error_stays_within_the_bound(kernel: str):
    shape = 40, 256, 136, 2, 16, 3, 2
    t = {name: x.detach() for name, x in Case(*shape[:3], groups=2, dtype=torch.float16).draw(0).items()}
    result = simulate(Simulation(SOURCE), kernel, t, shape, 0)
    bound = exact(kernel, {name: tensor.abs() for name, tensor in t.items()}) * torch.finfo(torch.float16).eps / 2
    assert ((result - exact(kernel, t)).abs() / bound).max() <= numerics.BOUND


def test_without_the_residual():
    check(Simulation(SOURCE), "forward", SHAPES[1], range(2), residual=False)


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
        check(simulation, "forward", SHAPES[1], range(25))


def test_one_stage_would_deadlock():
    shape = 16, 128, 128, 1, 16, 2, 1
    with pytest.raises(Deadlock, match="waits for a barrier's phase"):
        simulate(Simulation(SOURCE), "forward", whole(shape, 0), shape, 0, STAGES=1)


# ---------------------------------------------------------------- what the compiler makes of it


def products(sass: str) -> list[dict[str, int]]:
    """Of each asynchronous product: its instructions, those with W' in registers, the arithmetic before its wait."""
    found, current, running = [], {"instructions": 0, "registers": 0, "arithmetic": 0}, False
    for line in sass.splitlines():
        if "HGMMA" in line:
            assert not running, "a product starts before the last one was waited for"
            current["instructions"] += 1
            current["registers"] += bool(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line))
            running = "gsb0" in line  # the last instruction of a group
        elif running and re.search(r"\b(FFMA|FMUL)\b", line):
            current["arithmetic"] += 1
        elif "WARPGROUP.DEPBAR" in line:
            found.append(current)
            current, running = {"instructions": 0, "registers": 0, "arithmetic": 0}, False
    return found


def compiled(kernel: str, dtype: str, tiles: Tiles):
    from benchmarks import compile_report

    case = next(
        case
        for case in compile_report.experimental_cases("sm_90")
        if (case.kernel, case.dtype) == (kernel, dtype) and case.launch.plan.meta["BLOCK_M"] == tiles.block_m
    )
    return compile_report.compile_launch(case.launch, "sm_90")


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [0, 1])
def test_a_tile_is_rescaled_while_another_multiplies(kernel: str, size: int):
    sass = compiled(kernel, "bf16", tuning.EXPERIMENTAL_CANDIDATES[kernel, 2][size]).asm["sass"]
    found = products(sass)
    assert len(found) == 4, "two in turn in each half"
    for product in found:
        assert product["instructions"] == product["registers"] == 4, "64 deep, W' in registers, and none waits alone"
        assert product["arithmetic"] >= 56, "of 32 multiplications and 32 factors a thread, before the product's wait"
    assert sass.count("UTMALDG.2D") == 4
    assert "UTMASTG.2D" in sass
    assert ("LDSM.16.MT88.4" in sass) == (kernel == "grad_x"), "W is transposed on its way into registers"


def test_the_overlap_can_be_missed():
    serial = "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR12], R24, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nFFMA R1\n"
    assert products(serial * 2) == [{"instructions": 1, "registers": 1, "arithmetic": 0}] * 2


@pytest.mark.slow
def test_triton_3_6_overlaps_as_well():
    old = os.environ.get("RLRR_TRITON_3_6")
    if not old:
        pytest.skip("RLRR_TRITON_3_6 does not name a folder with Triton 3.6; `make test-all` makes one")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([old, str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "rescaled_while or driver"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "6 passed" in found.stdout, found.stdout


# ---------------------------------------------------------------- how it is launched


def drawn(*sizes: int, **options) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in Case(*sizes, dtype=torch.bfloat16, **options).draw(0).items()}


def launch_of(kernel: str, rows=300, n=2304, k=768, groups=3, tiles: Tiles | None = None):
    draw = drawn(rows, n, k, groups=groups)
    tiles = tiles or tuning.EXPERIMENTAL_CANDIDATES[kernel, 2][0]
    (launch,) = tuning.launches_of(kernel, draw, "sm_90", tiles)
    return launch, draw


@needs_compiler
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_driver_is_given_the_matrices_and_their_blocks(kernel: str):
    from benchmarks.host_overhead.fake_cuda import fake_cuda

    launch, draw = launch_of(kernel)
    with fake_cuda() as cuda:
        for _ in range(2):
            cuda.record(["tensordesc", "i32", "i32", "i64", "i64"] * 4)  # Triton adds sizes and strides
            launch.run()
            sent = cuda.last()
    assert sent["block"] == 384, "two groups of warps that multiply, one that copies"
    rows, contracted = (2304, 768) if kernel == "forward" else (768, 2304)
    assert sent["grid"] == [rows // 128 * 2, 1, 1]
    # Address, columns and rows, bytes from one row to the next, columns and rows of a block, type, swizzle.
    x, weight, col, y = (sent["parameters"][first : first + 8] for first in range(0, 80, 20))
    swizzled, plain, bf16, fp32 = 3, 0, 9, 7  # as the driver numbers them
    assert x[1:] == [contracted, 300, 2 * contracted, 64, 256, bf16, swizzled]
    assert weight == [draw["weight"].data_ptr(), 768, 2304, 2 * 768, 64, 64, bf16, swizzled]
    assert col[1:] == [contracted, 3 if kernel == "forward" else 1, 4 * contracted, 64, 1, fp32, plain]
    assert y[1:] == [rows, 300, 2 * rows, 64, 256, bf16, swizzled]


def test_tiles_that_the_kernel_does_not_have_are_refused():
    for tiles in (Tiles(256, 64, 64, 4, 3), Tiles(256, 128, 64, 8, 3), Tiles(256, 128, 64, 4, 1)):
        with pytest.raises(ValueError, match="schedule gluon"):
            launch_of("forward", tiles=tiles._replace(schedule="gluon"))
    with pytest.raises(ValueError, match="schedule of grad_scales"):
        launch_of("grad_scales", tiles=Tiles(64, 128, 128, 8, 4, schedule="gluon"))


# ---------------------------------------------------------------- when it is chosen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "weight_dtype": torch.float16}, True),
        ({"groups": 3}, True),
        ({"weight_shape": (1000, 776)}, True),
        ({"arch": "sm_100"}, False),
        ({"arch": "interpreter"}, False),
        ({"weight_dtype": torch.float32}, False),
        ({"dtype": torch.float32, "weight_dtype": torch.float32}, False),
        ({"rank": 2}, False),
        ({"groups": 3, "weight_shape": (576, 768)}, False),  # groups of 192 rows
        ({"weight_shape": (1001, 768)}, False),
        ({"weight_shape": (1000, 772)}, False),
    ],
)
def test_what_it_serves(changes: dict, expected: bool):
    given = {
        "arch": "sm_90", "dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "weight_shape": (2304, 768),
        "rank": 1, "groups": 1,
    } | changes  # fmt: skip
    assert linear_configs.by_hand(**given) is expected


def tried(kernel="forward", arch="sm_90", dtype=torch.bfloat16, rows=4096, experimental=True) -> list[Tiles]:
    return [t for t in tuning.candidates(kernel, arch, dtype, rows, experimental) if linear_configs.experimental(t)]


def test_it_is_tried_only_when_asked_for():
    for kernel in linear_configs.KERNELS:
        for rows in (8, 64, 4096):
            assert bool(tried(kernel, rows=rows)) == (kernel in KERNELS and rows == 4096)
            assert not tried(kernel, rows=rows, experimental=False)
    assert not tried(arch="sm_100")
    assert not tried(arch="interpreter")
    assert not tried(dtype=torch.float32)


def test_it_is_not_tried_with_a_compiler_that_was_never_checked(monkeypatch: pytest.MonkeyPatch):
    assert tried()
    monkeypatch.setattr(tuning.triton, "__version__", "3.60.0")
    assert not tried()


@pytest.mark.parametrize("kernel", KERNELS)
def test_tuned_tiles_serve_only_what_it_can(kernel: str):
    gluon = tuning.EXPERIMENTAL_CANDIDATES[kernel, 2][0]

    def chosen(rows=1576, shape=(768, 768), dtype=torch.bfloat16, groups=1, rank=1, arch="sm_90") -> str:
        x, weight = torch.empty(rows, shape[1], dtype=dtype), torch.empty(shape, dtype=torch.bfloat16)
        with tuned_tiles.only_tiles(kernel, gluon):
            return tuned_tiles.tiles_for(kernel, arch, x, weight, weight, rank, groups=groups).schedule

    assert chosen() == chosen(groups=3) == "gluon"
    others = {"shape": (772, 768)}, {"shape": (768, 772)}, {"groups": 4}, {"rank": 2}, {"arch": "sm_80"}
    for changes in (*others, {"dtype": torch.float32}):
        assert chosen(**changes) == "tiled", changes


def test_the_tuner_says_what_it_does_not_serve():
    draw = drawn(300, 768, 768, rank=2)
    reason = tuning.rejection("forward", draw, "sm_90", tuning.EXPERIMENTAL_CANDIDATES["forward", 2][0])
    assert reason == "the schedule gluon does not serve this problem"


# ---------------------------------------------------------------- on a GPU

ON_A_GPU = """
import sys, torch
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.tuning import tiles as tuning

kernel, dtype, device = sys.argv[1], getattr(torch, sys.argv[2]), torch.device("cuda", 0)
arch = linear_triton.architecture(device)
for groups, sizes in (3, (4096, 2304, 768)), (1, (12608, 768, 3072)), (1, (300, 1000, 776)):
    drawn = Case(*sizes, groups=groups, dtype=dtype, device=str(device)).draw(0)
    drawn = {name: tensor.detach() for name, tensor in drawn.items()}
    for tiles in tuning.candidates(kernel, arch, dtype, 4096, experimental=True):
        if linear_configs.experimental(tiles):
            reason = tuning.rejection(kernel, drawn, arch, tiles)
            assert reason is None, (sizes, tiles, reason)
"""


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_ends_and_is_exact(kernel: str, dtype: str):
    """In a process of its own: one whose kernel hangs can only be killed."""
    command = [sys.executable, "-c", ON_A_GPU, kernel, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
