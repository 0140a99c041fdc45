"""The choice of tiles and paths: pure functions, tried over a grid without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlrr_kernels import devices
from rlrr_kernels.ops.choice import tiles as configs

SM_80, SM_90 = devices.typical("sm_80"), devices.typical("sm_90")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ROWS = (1, 2, 16, 17, 64, 197, 1576, 4096, 12608, 50432, 10**7)


def product(
    kernel="forward", gpu: str = "sm_90", dtype=torch.bfloat16, rows=1576, shape=(128, 64), strides=None, rank=1,
    weight_dtype=None, transposed=False, offset=0, sampled=False,
) -> configs.Product:  # fmt: skip
    """A product of x or g and a weight of ``shape``, or of g and x."""
    width = {"forward": shape[1], "grad_x": shape[0], "grad_scales": shape[1]}[kernel]
    first_strides = (1, rows) if transposed else strides or (width, 1)
    first = configs.Operand((rows, width), first_strides, dtype.itemsize, offset % 16 == 0)
    second_shape = (rows, shape[0]) if kernel == "grad_scales" else shape
    second = configs.Operand(second_shape, (second_shape[1], 1), dtype.itemsize, True)
    dtypes = dtype, weight_dtype or dtype
    return configs.Product(kernel, devices.typical(gpu), *dtypes, rank, first, second, sampled)


@pytest.mark.parametrize("arch", [*configs.TABLE, "sm_75", "unknown"])
def test_every_shape_has_tiles(arch: str):
    for kernel, dtype, rows, stride in itertools.product(configs.KERNELS, DTYPES, ROWS, (64, 67)):
        tiles = configs.tiles_of(product(kernel, arch, dtype, rows, strides=(stride, 1)))
        assert stride == 64 or (tiles == configs.IRREGULAR[kernel, dtype.itemsize]) == (arch != "interpreter")
        for size in (tiles.block_m, tiles.block_n, tiles.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tiles.warps in (4, 8)


def test_more_rows_never_choose_a_smaller_block_of_rows():
    for arch, kernel in itertools.product(configs.TABLE, configs.KERNELS):
        blocks = [configs.tiles_for(kernel, devices.typical(arch), torch.bfloat16, rows).block_m for rows in ROWS]
        assert blocks == sorted(blocks)


def test_splits_fill_the_gpu_in_whole_waves_without_slivers():
    multiprocessors = SM_90.multiprocessors
    for rows, programs in itertools.product(ROWS, (1, 42, 126, 168, 5000)):
        tiles = configs.tiles_for("grad_scales", SM_90, torch.bfloat16, rows)
        splits = configs.splits_for(rows, tiles, programs, SM_90)
        assert splits >= 1
        assert splits == 1 or rows // splits >= 4 * tiles.block_m
        assert splits <= max(configs.MOST_SPLITS, 2 * multiprocessors // programs)
    tiles = configs.tiles_for("grad_scales", SM_90, torch.bfloat16, 12608)
    for programs in (
        36,
        42,
        126,
        144,
        168,
    ):  # of ViT-B's layers: at least four fifths of the last wave's slots are used
        splits = configs.splits_for(12608, tiles, programs, SM_90)
        assert programs * splits / (-(-programs * splits // multiprocessors) * multiprocessors) > 0.8, programs


def test_so_many_splits_at_most_where_each_has_tiles_enough():
    tiles = configs.tiles_for("grad_scales", SM_80, torch.bfloat16, 50432)
    assert configs.splits_for(50432, tiles, 114, SM_80) == configs.MOST_SPLITS == 16  # 17 would be done sooner


def test_products_are_cut_where_tiles_fill_no_gpu_and_into_no_slivers():
    for arch, blocks, programs in itertools.product(configs.TABLE, (0, 1, 3, 6, 24, 1000), (1, 12, 70, 5000)):
        tiles = configs.tiles_for("forward", devices.typical(arch), torch.bfloat16, 16)
        splits = configs.contraction_splits(blocks, programs, tiles, devices.typical(arch))
        assert 1 <= splits <= tiles.max_splits
        assert splits == 1 or (blocks >= 2 * splits and splits * programs <= devices.typical(arch).multiprocessors)
        assert configs.contraction_splits(blocks, programs, tiles._replace(max_splits=1), devices.typical(arch)) == 1
    tiles = configs.tiles_for("forward", SM_90, torch.bfloat16, 16)
    assert configs.contraction_splits(768 // tiles.block_k, 768 // tiles.block_n, tiles, SM_90) == 1
    assert configs.contraction_splits(3072 // tiles.block_k, 768 // tiles.block_n, tiles, SM_90) == 11


def every_entry(arch: str) -> list[tuple[str, torch.dtype, configs.Tiles]]:
    table = configs.TABLE[arch] | {
        key: [*configs.TABLE[arch][key], (0, tiles)] for key, tiles in configs.IRREGULAR.items()
    }
    found = [(kernel, size, tiles) for (kernel, size), rows in table.items() for _, tiles in rows]
    found += [(*key, tiles) for key, tiles in configs.PERSISTENT.get(arch, {}).items()]
    return [(kernel, dtype, tiles) for kernel, size, tiles in found for dtype in DTYPES if dtype.itemsize == size]


@pytest.mark.parametrize("device", [*devices.SHARED_BYTES, "sm_75", "sm_121", "gfx90a", "gfx1100", "unknown"])
def test_shipped_tiles_fit_in_the_shared_memory_of_every_gpu(device: str):
    gpu = devices.typical(device)
    for kernel, dtype, tiles in every_entry(gpu.family):
        assert configs.fits(kernel, tiles, dtype, dtype, gpu), (kernel, dtype, tiles)
        if dtype.itemsize == 2 and device in devices.SHARED_BYTES:
            assert configs.fits(kernel, tiles, dtype, torch.float32, gpu), (kernel, dtype, tiles, "fp32 weight")


def test_more_of_anything_needs_more_shared_memory():
    tiles = configs.Tiles(64, 64, 64, 4, 3)
    forms = tiles._replace(stages=5), tiles._replace(stages=5, schedule="persistent")
    tiled, persistent = (configs.shared_bytes("grad_scales", t, torch.bfloat16, torch.bfloat16, SM_90) for t in forms)
    assert tiled < persistent
    for kernel, field in itertools.product(configs.KERNELS, ("block_m", "block_n", "block_k", "stages")):
        larger = tiles._replace(**{field: 2 * getattr(tiles, field)})
        needed, more = (configs.shared_bytes(kernel, t, torch.bfloat16, torch.bfloat16, SM_90) for t in (tiles, larger))
        assert needed < more
    huge = configs.Tiles(256, 256, 64, 8, 4)
    assert not configs.fits("forward", huge, torch.bfloat16, torch.bfloat16, devices.typical("sm_89"))
    assert configs.fits("forward", huge._replace(stages=3), torch.bfloat16, torch.bfloat16, SM_90)


def test_classes_are_the_tables():
    for arch, kernel, rows in itertools.product(configs.TABLE, configs.KERNELS, ROWS):
        limit = configs.shape_class(kernel, devices.typical(arch), torch.bfloat16, rows)
        assert rows <= limit or limit == 0
        tiles = configs.tiles_for(kernel, devices.typical(arch), torch.bfloat16, rows)
        assert (limit, tiles) in configs.TABLE[arch][kernel, 2]


# ---------------------------------------------------------------- which schedules serve


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"strides": (72, 1)}, True),
        ({"rows": 1}, True),
        ({"rows": 0}, False),
        ({"shape": (128, 0)}, False),
        ({"strides": (68, 1)}, False),  # 136 bytes apart
        ({"strides": (68, 1), "dtype": torch.float32}, True),
        ({"transposed": True, "rows": 16}, False),
        ({"strides": (0, 1)}, False),  # one row for all
        ({"strides": (128, 2)}, False),
        ({"offset": 8}, False),
        ({"rows": 2**31}, False),
        ({"sampled": True}, False),
        ({"gpu": "sm_100"}, True),
        ({"gpu": "sm_103"}, True),
        ({"gpu": "sm_80"}, False),
        ({"gpu": "sm_120"}, False),
        ({"gpu": "gfx942"}, False),
        ({"rank": 4}, True),
        ({"rank": 5}, False),  # a loop over the rank takes the registers of a wide tile
        ({"kernel": "forward"}, False),
        ({"kernel": "grad_x"}, False),
    ],
)
def test_a_persistent_grid_serves_what_tma_can_load(changes: dict, expected: bool):
    found = configs.schedules_for(product(**{"kernel": "grad_scales"} | changes))
    assert ("persistent" in found) is expected
    assert found[0] == "tiled"


def test_only_what_was_executed_or_proven_serves_unasked(monkeypatch: pytest.MonkeyPatch):
    def schedule(kernel: str, gpu: str, rows: int = 4096) -> str:
        return configs.tiles_of(product(kernel, gpu, rows=rows)).schedule

    assert configs.PROVEN == ()  # no GPU has run anything yet
    assert schedule("grad_scales", "sm_90") == "persistent"
    assert schedule("grad_scales", "sm_100") == schedule("grad_scales", "sm_103") == "tiled"
    assert schedule("forward", "sm_90") == schedule("grad_x", "sm_90") == "tiled"
    monkeypatch.setattr(configs, "PROVEN", (("grad_scales", "persistent", "sm_100"),))
    configs.tiles_for.cache_clear()
    assert schedule("grad_scales", "sm_100") == "persistent"
    assert schedule("grad_scales", "sm_103") == "tiled"
    configs.tiles_for.cache_clear()


def test_a_persistent_grid_is_one_wave_of_the_devices_own_multiprocessors():
    tiles = configs.PERSISTENT["sm_90"]["grad_scales", 2]
    for multiprocessors in (16, 78, 114, 132):
        gpu = SM_90._replace(multiprocessors=multiprocessors)
        for steps in (100, 14184, 10**6):
            assert -(-steps // configs.steps_a_program(steps, tiles, gpu)) <= multiprocessors


# ---------------------------------------------------------------- what the constants decide


def test_a_persistent_grid_serves_from_many_rows_on():
    schedules = {rows: configs.tiles_of(product("grad_scales", rows=rows)).schedule for rows in (256, 1023, 1024)}
    assert schedules == {256: "tiled", 1023: "tiled", 1024: "persistent"}


def test_the_parts_of_the_scale_gradients():
    """Of ViT-B's qkv, proj, fc1 and fc2 at 12,608 rows: EDGE_BLOCKS of 1 would give 11 twice, of 4 give 6."""
    tiles = configs.Tiles(64, 128, 128, 8, 4)
    parts = [configs.splits_for(12608, tiles, programs, SM_90) for programs in (126, 42, 168, 144)]
    assert parts == [1, 3, 3, 9]
    assert configs.splits_for(12608, tiles, 42, SM_80) == 5


def test_a_product_in_parts_must_save_more_than_their_sum_costs():
    """A block takes 0.35 µs to arrive (half ARRIVAL_US, of 3 stages), the sum of the parts KERNEL_US."""
    tiles = configs.Tiles(16, 64, 128, 4, 3)
    assert [configs.contraction_splits(blocks, 12, tiles, SM_90) for blocks in (4, 9, 10, 24)] == [1, 1, 5, 11]


def test_scales_are_multiplied_in_a_pipeline_where_its_tiles_have_room():
    narrow, gpu = torch.bfloat16, SM_90
    served = [rank for rank in range(1, 65) if configs.multiplied_in_pipeline(rank, narrow, 2, gpu)]
    assert served == list(range(5, 33))
    assert not configs.multiplied_in_pipeline(32, narrow, 4, gpu), "an fp32 W takes 256 KiB beside them"
    assert not configs.multiplied_in_pipeline(32, torch.float32, 4, gpu)
    assert not configs.multiplied_in_pipeline(32, narrow, 2, SM_80)
    for kernel in ("forward", "grad_x"):
        for _, tiles in configs.TABLE[gpu.family][kernel, 2]:
            assert configs.shared_bytes(kernel, tiles, narrow, narrow, gpu, 32) <= 227 << 10, (kernel, tiles)
