"""The choice of tiles and paths: pure functions, tried over a grid without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlrr_kernels.ops.linear import tiles as configs

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ROWS = (1, 2, 16, 17, 64, 197, 1576, 4096, 12608, 50432, 10**7)


@pytest.mark.parametrize("arch", [*configs.ARCHITECTURES, "sm_75", "unknown"])
def test_every_shape_has_tiles(arch: str):
    for kernel, dtype, rows, regular in itertools.product(configs.KERNELS, DTYPES, ROWS, (True, False)):
        tiles = configs.tiles_for(kernel, arch, dtype, rows, regular)
        for size in (tiles.block_m, tiles.block_n, tiles.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tiles.warps in (4, 8)


def test_more_rows_never_choose_a_smaller_block_of_rows():
    for arch, kernel in itertools.product(configs.ARCHITECTURES, configs.KERNELS):
        blocks = [configs.tiles_for(kernel, arch, torch.bfloat16, rows).block_m for rows in ROWS]
        assert blocks == sorted(blocks)


@pytest.mark.parametrize(
    ("capability", "gcn", "arch"),
    [
        ((9, 0), None, "sm_90"),
        ((8, 0), None, "sm_80"),
        ((8, 6), None, "sm_80"),
        ((7, 5), None, "sm_80"),
        ((10, 0), None, "sm_100"),
        ((12, 0), None, "sm_80"),
        (None, "gfx942:sramecc+:xnack-", "gfx942"),
        (None, "gfx1100", "sm_80"),
    ],
)
def test_architecture_names(capability, gcn, arch):
    assert configs.architecture(capability, gcn) == arch


def test_splits_fill_the_gpu_in_whole_waves_without_slivers():
    multiprocessors = configs.MULTIPROCESSORS["sm_90"]
    for rows, programs in itertools.product(ROWS, (1, 42, 126, 168, 5000)):
        tiles = configs.tiles_for("grad_scales", "sm_90", torch.bfloat16, rows)
        splits = configs.splits_for(rows, tiles, programs, "sm_90")
        assert splits >= 1
        assert splits == 1 or rows // splits >= 4 * tiles.block_m
        assert splits <= max(configs.MOST_SPLITS, 2 * multiprocessors // programs)
    tiles = configs.tiles_for("grad_scales", "sm_90", torch.bfloat16, 12608)
    for programs in (
        36,
        42,
        126,
        144,
        168,
    ):  # of ViT-B's layers: at least four fifths of the last wave's slots are used
        splits = configs.splits_for(12608, tiles, programs, "sm_90")
        assert programs * splits / (-(-programs * splits // multiprocessors) * multiprocessors) > 0.8, programs


def test_products_are_cut_where_tiles_fill_no_gpu_and_into_no_slivers():
    for arch, blocks, programs in itertools.product(configs.ARCHITECTURES, (0, 1, 3, 6, 24, 1000), (1, 12, 70, 5000)):
        tiles = configs.tiles_for("forward", arch, torch.bfloat16, 16)
        splits = configs.contraction_splits(blocks, programs, tiles, arch)
        assert 1 <= splits <= tiles.max_splits
        assert splits == 1 or (blocks >= 2 * splits and splits * programs <= configs.MULTIPROCESSORS[arch])
        assert configs.contraction_splits(blocks, programs, tiles._replace(max_splits=1), arch) == 1
    tiles = configs.tiles_for("forward", "sm_90", torch.bfloat16, 16)
    assert configs.contraction_splits(768 // tiles.block_k, 768 // tiles.block_n, tiles, "sm_90") == 1
    assert configs.contraction_splits(3072 // tiles.block_k, 768 // tiles.block_n, tiles, "sm_90") == 11


def every_entry(arch: str) -> list[tuple[str, torch.dtype, configs.Tiles]]:
    table = configs.TABLE[arch] | {
        key: [*configs.TABLE[arch][key], (0, tiles)] for key, tiles in configs.IRREGULAR.items()
    }
    found = [(kernel, size, tiles) for (kernel, size), rows in table.items() for _, tiles in rows]
    found += [(*key, tiles) for key, tiles in configs.PERSISTENT.get(arch, {}).items()]
    return [(kernel, dtype, tiles) for kernel, size, tiles in found for dtype in DTYPES if dtype.itemsize == size]


@pytest.mark.parametrize("device", [*configs.SHARED_BYTES, "sm_75", "sm_121", "gfx90a", "gfx1100", "unknown"])
def test_shipped_tiles_fit_in_the_shared_memory_of_every_gpu(device: str):
    arch = device if device in configs.ARCHITECTURES else configs.DEFAULT_ARCHITECTURE
    for kernel, dtype, tiles in every_entry(arch):
        assert configs.fits(kernel, tiles, dtype, dtype, device), (kernel, dtype, tiles)
        if dtype.itemsize == 2 and device in configs.SHARED_BYTES:
            assert configs.fits(kernel, tiles, dtype, torch.float32, device), (kernel, dtype, tiles, "fp32 weight")


def test_more_of_anything_needs_more_shared_memory():
    tiles = configs.Tiles(64, 64, 64, 4, 3)
    for kernel in configs.KERNELS:
        forms = tiles._replace(stages=5), tiles._replace(stages=5, schedule="persistent")
        tiled, persistent = (configs.shared_bytes(kernel, t, torch.bfloat16, torch.bfloat16) for t in forms)
        assert tiled < persistent
    for kernel, field in itertools.product(configs.KERNELS, ("block_m", "block_n", "block_k", "stages")):
        larger = tiles._replace(**{field: 2 * getattr(tiles, field)})
        needed, more = (configs.shared_bytes(kernel, t, torch.bfloat16, torch.bfloat16) for t in (tiles, larger))
        assert needed < more
    huge = configs.Tiles(256, 256, 64, 8, 4)
    assert not configs.fits("forward", huge, torch.bfloat16, torch.bfloat16, "sm_89")
    assert configs.fits("forward", huge._replace(stages=3), torch.bfloat16, torch.bfloat16, "sm_90")


def test_classes_are_the_tables():
    for arch, kernel, rows in itertools.product(configs.ARCHITECTURES, configs.KERNELS, ROWS):
        limit = configs.shape_class(kernel, arch, torch.bfloat16, rows)
        assert rows <= limit or limit == 0
        tiles = configs.tiles_for(kernel, arch, torch.bfloat16, rows)
        assert (limit, tiles) in configs.TABLE[arch][kernel, 2]
