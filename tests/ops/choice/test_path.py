"""The choice between one pass over W and a merge: a pure function, tried over a grid without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlrr_kernels import devices
from rlrr_kernels.ops.choice import path as path_model
from rlrr_kernels.ops.choice import tiles as configs

SM_80, SM_90 = devices.typical("sm_80"), devices.typical("sm_90")
ROWS = (0, 1, 16, 64, 197, 1576, 4096, 12608, 50432, 10**7, 10**9)
SHAPES = ((1, 1), (768, 768), (2304, 768), (768, 3072), (5120, 1280), (8192, 8192))
DTYPES = ((torch.bfloat16,) * 2, (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2)


def path(rows: int, shape: tuple[int, int] = (768, 768), rank: int = 1, arch: str = "sm_90", dtypes=DTYPES[0], **more):
    gain = path_model.merge_gain(rows, *shape, rank, devices.typical(arch), *dtypes, **more)
    return "merge" if gain > 1 else "fused"


@pytest.mark.parametrize("arch", [*configs.TABLE, "sm_89", "sm_103", "gfx90a", "unknown"])
def test_fused_for_few_rows_then_merge_and_never_back(arch: str):
    for shape, rank, dtypes in itertools.product(SHAPES[1:], (1, 2, 4, 64), DTYPES):
        chosen = [path(rows, shape, rank, arch, dtypes) for rows in ROWS]
        assert chosen == sorted(chosen, key=("fused", "merge").index)
        assert (chosen[0], chosen[-1]) == ("fused", "merge")


def test_a_product_of_microseconds_is_not_worth_another_kernel():
    assert path(1576) == "fused"  # 2 µs on an H200
    assert path(4096, (8192, 8192)) == "merge"
    assert path(12608, (3072, 768)) == "merge"
    assert {path(rows, shape) for rows in (1, 16, 64, 197) for shape in SHAPES} == {"fused"}


def test_the_arithmetic_of_one_case():
    for dtypes, size, kind in ((DTYPES[0], 4, "half"), (DTYPES[1], 6, "half of float32")):
        saved = path_model.OVERHEAD[kind] * 2 * 12608 * 3072 * 768 / (0.8 * 989e12)
        cost = 1e-6 * configs.KERNEL_US + size * 3072 * 768 / (0.9 * 4.8e12)
        assert math.isclose(path_model.merge_gain(12608, 3072, 768, 1, SM_90, *dtypes), saved / cost)


def test_what_makes_the_fused_kernel_work_more_brings_the_merge_forward():
    gains = [path_model.merge_gain(1576, 768, 768, rank, SM_90, *DTYPES[0]) for rank in (1, 2, 3, 4, 5, 17)]
    assert gains == sorted(gains)
    assert gains[4] == path_model.merge_gain(1576, 768, 768, 16, SM_90, *DTYPES[0])  # as matrices of 16 vectors
    on_others = [path_model.merge_gain(1576, 768, 768, rank, SM_80, *DTYPES[0]) for rank in (4, 5, 32, 64)]
    assert on_others == sorted(on_others)
    wide = path_model.merge_gain(1576, 768, 768, 1, SM_90, *DTYPES[1])
    assert wide > gains[0]
    assert len({path_model.merge_gain(1576, 768, 768, 1, SM_90, *DTYPES[2], tf32=tf32) for tf32 in (False, True)}) == 2
    half = (path_model.merge_gain(1576, 768, 768, 1, SM_90, *DTYPES[0], tf32=tf32) for tf32 in (False, True))
    assert len(set(half)) == 1


@pytest.mark.parametrize(("rank", "rows"), [(1, 1123), (2, 958), (4, 742), (5, 542), (16, 542), (32, 358), (64, 53)])
def test_from_which_rows_on_an_h200_merges_fc1_of_vit_b(rank: int, rows: int):
    """A further rank brings the merge forward, one that leaves the pipeline most of all."""
    assert [path(m, (3072, 768), rank) for m in (rows - 1, rows)] == ["fused", "merge"]


def test_the_crossover_is_the_devices_own():
    """A GPU with half the multiprocessors has twice as long a product to shorten; slow memory makes a merge dear."""
    h200 = SM_90
    given = 1123, 3072, 768, 1
    half = h200._replace(peaks=h200.peaks._replace(half=h200.peaks.half / 2))
    slow = h200._replace(peaks=h200.peaks._replace(bandwidth=h200.peaks.bandwidth / 2))
    gain = path_model.merge_gain(*given, h200, *DTYPES[0])
    assert math.isclose(path_model.merge_gain(*given, half, *DTYPES[0]), 2 * gain)
    assert gain / 2 < path_model.merge_gain(*given, slow, *DTYPES[0]) < gain
    assert path_model.merge_gain(*given, SM_90, *DTYPES[0]) == gain


def test_under_the_interpreter_small_tests_meet_both_paths():
    for shape, dtypes in itertools.product(SHAPES, DTYPES):
        assert path(path_model.INTERPRETER_ROWS, shape, 1, "interpreter", dtypes) == "fused"
        assert path(path_model.INTERPRETER_ROWS + 1, shape, 1, "interpreter", dtypes) == "merge"
