"""The figures read off machine code: on a small listing counted by hand, and on kernels compiled here without a GPU."""

from __future__ import annotations

import math

import pytest

from rlrr_kernels import backends

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.model import sass as sass_model
from benchmarks.model import tiles as tile_model
from rlrr_kernels.ops.linear import path as linear_paths
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.tiles import Tiles

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


def test_the_loop_of_a_listing_is_what_it_says():
    loop = sass_model.read_loop(LISTING, warps=8)
    assert (loop.macs, loop.instruction) == (2 * 2 * 64 * 128 * 16, "HGMMA")
    assert loop.tensor == loop.macs / 2048
    body = 12  # the store is jumped over on most trips
    assert loop.issue == body * 8 / 4
    assert loop.stalls == 4 + 2 + 4 + 1 + 1 + 2 + 1 + 1 + 4 + 4 + 11 + 6
    matrix = 2 * (128 * 32 + (128 + 64) * 32)  # one of the two instructions reads its first operand there as well
    assert loop.operands == (8 * (512 + 256) + matrix) / 128
    assert loop.copied_bytes == 8 * 32 * (16 + 4)
    assert (loop.outside, loop.rare) == (1 + 1 + 1 + 1 + 1, 1)  # not the branch that ends the program before the loop


def test_a_trip_is_ruled_by_its_slowest_part():
    loop = sass_model.Loop(1 << 20, "HGMMA", 512.0, 300.0, 400, 100.0, 0, 50, 0)
    few = sass_model.trip(loop, 1024)
    assert few == (512.0, 912.0, "tensor cores")
    many = sass_model.trip(loop, 64 << 10)
    assert many.bound == "L2 cache"
    assert many.overlapped == many.serial == (64 << 10) / sass_model.L2_BYTES_A_CLOCK


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(119, 8, 57728, 2), (145, 8, 115456, 1), (128, 8, 0, 2), (129, 8, 0, 1), (32, 4, 110 << 10, 2), (16, 1, 0, 32)],
)
def test_how_many_programs_fit(registers: int, warps: int, shared: int, programs: int):
    assert sass_model.resident(registers, warps, shared) == programs


def test_text_that_is_no_machine_code_is_refused():
    with pytest.raises(ValueError, match="sass must be machine code"):
        sass_model.parse("ld.param.b32 %r18;")
    assert sass_model.read_loop("--:-:-:-:1	EXIT;\n", 4) is None


@pytest.mark.parametrize(
    ("kernel", "rows", "dtype"),
    [("forward", 16, "bf16"), ("forward", 4096, "bf16/fp32"), ("grad_x", 4096, "bf16"), ("grad_scales", 64, "bf16")],
)
def test_a_compiled_loop_multiplies_and_copies_its_tile(kernel: str, rows: int, dtype: str):
    x_dtype = tile_model.DTYPES[dtype][0]
    tiles = linear_configs.tiles_for(kernel, "sm_90", x_dtype, rows)
    code = tile_model.compiled(kernel, tiles, dtype, rows)
    assert code.loop.macs == tiles.block_m * tiles.block_n * tiles.block_k
    assert code.loop.instruction == "HGMMA"
    moved = tile_model.grid(kernel, tiles, rows, 3072, 768, dtype).tile_bytes
    assert moved <= code.loop.copied_bytes <= moved + 4 * 2 * max(tiles[:3])  # and a vector of scales
    assert code.resident >= 1


@pytest.mark.parametrize(
    ("kernel", "blocks", "most"), [("forward", (256, 128, 64, 8, 3), 0.7), ("grad_scales", (64, 128, 256, 8, 4), 0.3)]
)
def test_a_persistent_loop_loads_by_tma_and_has_room_between_its_products(kernel: str, blocks: tuple, most: float):
    tiles = Tiles(*blocks, schedule="persistent")
    code = tile_model.compiled(kernel, tiles, "bf16", 4096)
    assert (code.spills, code.loop.instruction) == (0, "HGMMA")
    assert code.loop.macs == tiles.block_m * tiles.block_n * tiles.block_k
    assert code.loop.copied_bytes <= 4 * 1024, "only scales are copied by threads"
    assert code.loop.issue < most * code.loop.tensor, "divisions back in the loop?"
    assert code.loop.rare > code.loop.issue, "the end of a tile is in the loop"


def test_the_grid_of_a_persistent_kernel():
    tiles = Tiles(256, 128, 64, 8, 3, schedule="persistent")
    cut = tile_model.grid("forward", tiles, 12608, 3072, 768, "bf16")
    assert (cut.programs, cut.ends, cut.trips) == (132, 10, 120)  # 24 x 50 tiles of 12 blocks
    assert tile_model.grid("grad_x", tiles._replace(block_n=64, block_k=128), 256, 768, 768, "bf16").programs == 6
    scales = tile_model.grid("grad_scales", Tiles(64, 128, 256, 8, 4, schedule="persistent"), 12608, 3072, 768, "bf16")
    assert (scales.programs, scales.trips) == (132, 108)  # 24 x 3 tiles of 197 blocks


def test_matrix_instructions_of_single_warps_are_counted_as_well():
    code = tile_model.compiled("forward", Tiles(16, 32, 128, 4, 4), "bf16", 16)
    assert (code.loop.instruction, code.loop.macs) == ("HMMA", 16 * 32 * 128)


@pytest.mark.parametrize("schedule", [name for name in linear_configs.SCHEDULES if name != "tiled"])
def test_other_schedules_are_read_as_well(schedule: str):
    warps = 4 if schedule == "gluon" else 8
    tiles = Tiles(256, 128, 64, warps, 3, schedule=schedule)
    code = tile_model.compiled("forward", tiles, "bf16", 4096)
    assert code.loop.macs == 256 * 128 * 64
    assert code.loop.copied_bytes <= 4 * 2 * 256  # scales at most: TMA copies the tiles
    cut = tile_model.grid("forward", tiles, 12608, 3072, 768, "bf16")
    assert (cut.programs, cut.ends) == (132, 50 * 24 // 132 + 1)
    assert tile_model.predict("forward", tiles, 12608, 3072, 768, "bf16", code).best_us > 75  # of operations alone


def test_predictions_follow_the_problem():
    tiles = linear_configs.tiles_for("forward", "sm_90", tile_model.DTYPES["bf16"][0], 4096)
    code = tile_model.compiled("forward", tiles, "bf16", 4096)
    times = [tile_model.predict("forward", tiles, m, 3072, 768, "bf16", code) for m in (1576, 4096, 12608, 50432)]
    assert [t.likely_us for t in times] == sorted(t.likely_us for t in times)
    assert all(t.best_us <= t.likely_us for t in times)
    floor = 1e6 * 2 * 50432 * 3072 * 768 / 989e12
    assert times[-1].best_us > floor
    wide = tile_model.predict("forward", tiles, 64, 8192, 8192, "bf16", code)
    assert wide.best_us > 1e6 * 2 * 8192 * 8192 / tile_model.BANDWIDTH
    library = tile_model.library_us(50432, 3072, 768, "bf16")
    assert math.isclose(library, floor / linear_paths.REACHED_RATE + linear_configs.KERNEL_US, rel_tol=0.1)
