"""The model of launches and what it says of the targets: arithmetic alone; and the model of tiles by machine code."""

from __future__ import annotations

import math
import shutil

import pytest

from benchmarks.cpu.report import RESULTS
from benchmarks.gpu import launch_model as model
from benchmarks.gpu.launch_model import Cost, grid, library_product
from benchmarks.gpu.plan import PRECISIONS, gpu_plan
from benchmarks.model import __main__ as command
from benchmarks.support.common import Problem
from rlrr_kernels import backends, devices
from rlrr_kernels.ops.choice.tiles import KERNEL_US, Tiles, tiles_for
from tests.support.versions import version_of

RATE, BANDWIDTH = 8e14, 4e12
CEILINGS = model.Ceilings(BANDWIDTH, {"bf16": RATE, "fp16": RATE, "fp32": 5e13, "tf32": 4e14})
BF16 = PRECISIONS["bf16"].dtype
PERSISTENT = Tiles(64, 128, 256, 8, 4, schedule="persistent")

needs_triton_3_6 = pytest.mark.skipif(
    version_of("triton") < (3, 6), reason="Triton 3.5 leaves a third more in persistent loops"
)


def problem(m: int, n: int, k: int, precision: str = "bf16") -> Problem:
    return Problem(m, n, k, PRECISIONS[precision].dtype, True, "cpu", PRECISIONS[precision].weight_dtype)


def us(name: str, work: str, *sizes: int, precision: str = "bf16", share: float | None = None) -> float:
    return model.model_us(name, work, problem(*sizes, precision), precision, CEILINGS, share)


def test_the_published_prediction_is_the_models():
    """Pins every constant: where this fails on purpose, write the page anew with --markdown."""
    assert command.report(gpu_plan()) == (RESULTS / "gpu_model.md").read_text(encoding="utf-8")


def test_a_launch_takes_its_largest_part_and_a_fixed_cost():
    assert Cost(4e6).microseconds(BANDWIDTH, RATE) == KERNEL_US + 1
    assert Cost(4e6, 8e9, idle=1.5).microseconds(BANDWIDTH, RATE) == KERNEL_US + 15
    assert Cost(4e6, 8e9, least_us=40).microseconds(BANDWIDTH, RATE) == KERNEL_US + 40
    cached = Cost(0, 0, 2.0, 1e-6 * model.L2_BYTES_A_CLOCK * model.CLOCK_HZ)
    assert math.isclose(cached.microseconds(BANDWIDTH, RATE), KERNEL_US + 2)


def test_idle_multiprocessors_are_counted():
    (whole,) = library_product(128 * 132, 256, 768, 2, BANDWIDTH, RATE)
    assert (whole.idle, whole.operations) == (1, 2.0 * 128 * 132 * 256 * 768)
    assert library_product(128 * 133, 256, 768, 2, BANDWIDTH, RATE)[0].idle > 1.1
    split = library_product(768, 768, 12608, 2, BANDWIDTH, RATE)  # 18 tiles of 128 x 256
    assert len(split) == 2
    assert split[0].idle < 1.2


def test_the_paths_are_charged_what_they_move():
    m, n, k = 12608, 3072, 768
    for precision, size in (("bf16", 2), ("bf16/fp32", 4)):
        library_us = us("merged", "forward", m, n, k, precision=precision)
        merge = us("triton.merge", "forward", m, n, k, precision=precision)
        assert math.isclose(merge - library_us, KERNEL_US + 1e6 * (size + 2) * n * k / BANDWIDTH)
    eager = us("reference", "forward", m, n, k)
    assert math.isclose(eager - us("merged", "forward", m, n, k), 3 * KERNEL_US + 1e6 * 7 * 2 * n * k / BANDWIDTH)
    assert us("auto", "forward", m, n, k) == us("triton.merge", "forward", m, n, k)
    assert us("auto", "forward", 16, n, k) == us("triton.fused", "forward", 16, n, k)
    shares = [us("estimate", "step", m, n, k, share=share) for share in (1 / 8, 1 / 4, 1 / 2)]
    assert shares == sorted(shares)
    assert model.model_us("dora", "step", problem(m, n, k), "bf16", CEILINGS) is None


def test_split_products_write_and_add_their_partial_results():
    first, total = model.launches("triton.fused", "forward", problem(16, 768, 3072))
    partial = 8 * 16 * 768 * 4  # 12 tiles of 24 iterations, split 8 ways
    assert (first.bytes, total.bytes) == (2 * (3072 * 768 + 16 * 3072) + partial, partial + 2 * 16 * 768)
    products, reduction = model.launches("triton.fused", "scales", problem(1576, 3072, 768))
    assert products.bytes == 2 * (1576 * (3072 + 768) + 3072 * 768) + reduction.bytes


def test_the_grids_of_kernels_whose_programs_take_several_tiles():
    sizes, dtypes = (12608, 3072, 768), (BF16, BF16)
    cut = grid("grad_scales", PERSISTENT, *sizes, *dtypes)
    assert (cut.programs, cut.iterations) == (132, 108)  # 24 x 3 tiles of 197 blocks


# ---------------------------------------------------------------- machine code

LISTING = """Function:a_kernel
--:-:-:-:1	S2R R0, SR_TID.X;
--:-:-:-:5	@!P0 BRA LBB0;
--:-:-:-:1	IADD3 R1, R1, 0x1, RZ;
--:-:-:-:5	EXIT;
LBB0:
--:-:-:-:1	IADD3 R1, R1, 0x1, RZ;
LBB1:
--:-:-:Y:4	DEPBAR.LE SB0, 0x6;
--:-:1:-:2	LDSM.16.M88.4 R12, [R23+UR9+0x10000];
--:-:3:-:4	LDS.64 R96, [R132+0x1c000];
--:-:-:-:1	@!PT LDS RZ, [RZ];
--:-:-:-:1	FFMA R8, R22, R96, 1;
--:-:-:-:2	F2FP.BF16.F32.PACK_AB R97, R8, R99;
--:-:-:-:1	HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR8], R24;
--:-:-:-:1	HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0;
--:-:-:-:4	LDGSTS.E.BYPASS.128 [R19], desc[UR12][R12.64], P0;
--:-:-:-:4	@!P4 BRA P2, 0x100;
--:-:-:-:4	STG.E.128 desc[UR12][R12.64], R8;
--:-:-:-:b	@!P3 LDGSTS.E [R20+0x1c000], desc[UR12][R40.64], P0;
--:-:-:-:6	@!P0 BRA LBB1;
--:-:-:-:5	EXIT;
LBB3:
--:-:-:Y:0	BRA LBB3;
"""


@pytest.fixture(scope="module")
def machine_code():
    if backends.INTERPRETING or not backends.HAS_TRITON or shutil.which("cc") is None:
        pytest.skip("needs Triton's compiler")
    from benchmarks.model import machine_code

    return machine_code


def test_the_loop_of_a_listing_is_what_it_says(machine_code):
    loop = machine_code.read_loop(LISTING, warps=8)
    assert (loop.macs, loop.instruction) == (2 * 2 * 64 * 128 * 16, "HGMMA")
    assert loop.tensor == loop.macs / 2048
    assert loop.issue == 12 * 8 / 4  # the store is jumped over in most iterations
    assert loop.stalls == 4 + 2 + 4 + 1 + 1 + 2 + 1 + 1 + 4 + 4 + 11 + 6
    matrix = 2 * (128 * 32 + (128 + 64) * 32)  # one of the two instructions reads its first operand there as well
    assert loop.operands == (8 * (512 + 256) + matrix) / 128
    assert (loop.outside, loop.rare) == (1 + 1 + 1 + 1 + 1, 1)  # not the branch that ends the program before the loop
    with pytest.raises(ValueError, match="sass must be machine code"):
        machine_code.read_loop("ld.param.b32 %r18;", 4)
    assert machine_code.read_loop("--:-:-:-:1	EXIT;\n", 4) is None


def test_an_iteration_is_bound_by_its_slowest_part(machine_code):
    loop = machine_code.Loop(1 << 20, "HGMMA", 512.0, 300.0, 400, 100.0, 0, 50)
    assert loop.clocks(1024) == (512.0, 912.0, "tensor cores")
    cache = (64 << 10) * 132 / 5120
    assert loop.clocks(64 << 10) == (cache, cache, "L2 cache")


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(119, 8, 57728, 2), (145, 8, 115456, 1), (128, 8, 0, 2), (129, 8, 0, 1), (32, 4, 110 << 10, 2), (16, 1, 0, 32)],
)
def test_how_many_programs_fit(machine_code, registers: int, warps: int, shared: int, programs: int):
    assert machine_code.resident(registers, warps, shared) == programs


@needs_triton_3_6
def test_a_persistent_loop_has_room_between_its_products(machine_code):
    code = machine_code.compiled("grad_scales", PERSISTENT, "bf16", 4096)
    assert (code.spills, code.loop.instruction) == (0, "HGMMA")
    assert code.loop.macs == PERSISTENT.block_m * PERSISTENT.block_n * PERSISTENT.block_k
    assert code.loop.issue < 0.3 * code.loop.tensor, "divisions in the loop?"
    assert code.loop.rare > code.loop.issue, "the end of a tile is in the loop"


@needs_triton_3_6
def test_other_instructions_and_schedules_are_read_as_well(machine_code):
    code = machine_code.compiled("forward", Tiles(16, 32, 128, 4, 4), "bf16", 16)
    assert (code.loop.instruction, code.loop.macs) == ("HMMA", 16 * 32 * 128)


def test_the_figures_of_the_pages(machine_code):
    """docs/costs/gpu.md and the constants of ops/choice/path.py; the compiler's version moves them by some per cent."""
    sizes, scales = (12608, 3072, 768), {}
    for schedules in (("tiled",), model.SCHEDULES):
        tiles = tiles_for("grad_scales", devices.typical("sm_90"), BF16, 12608, schedules)
        code = machine_code.compiled("grad_scales", tiles, "bf16", 12608)
        scales[tiles.schedule] = machine_code.predict("grad_scales", tiles, *sizes, "bf16", code).likely_us
    assert scales == pytest.approx({"persistent": 94, "tiled": 139}, rel=0.05)
    assert machine_code.library_us("grad_scales", *sizes, "bf16") == pytest.approx(100, rel=0.01)
    _, line = machine_code.report(["forward"], ["bf16"], [], False)
    assert line.startswith("forward, bf16: median overhead ")
    assert float(line.split()[-1]) == pytest.approx(0.71, rel=0.05)
    lines = list(machine_code.report(["forward"], ["bf16"], [16], False))
    assert len(lines) == 5
    assert "HGMMA" in lines[3]
