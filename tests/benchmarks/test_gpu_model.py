"""The model of what every path takes, and what it says of the targets: arithmetic alone, no GPU and no Triton."""

from __future__ import annotations

import math

import pytest

from benchmarks.common import Problem
from benchmarks.gpu.plan import PRECISIONS, gpu_plan
from benchmarks.model import layers as model
from benchmarks.model import library, predict
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.tiles import KERNEL_US

RATE, BANDWIDTH = 8e14, 4e12
CEILINGS = model.Ceilings(BANDWIDTH, {"bf16": RATE, "fp16": RATE, "fp32": 5e13, "tf32": 4e14})


def problem(m: int, n: int, k: int, precision: str = "bf16") -> Problem:
    return Problem(m, k, n, PRECISIONS[precision].dtype, True, "cpu", PRECISIONS[precision].weight_dtype)


def us(name: str, work: str, *sizes: int, precision: str = "bf16") -> float:
    return model.model_us(name, work, problem(*sizes, precision), precision, CEILINGS)


def test_a_launch_takes_its_largest_part_and_a_fixed_cost():
    assert library.Launch(4e6).microseconds(BANDWIDTH, RATE) == KERNEL_US + 1
    assert library.Launch(4e6, 8e9).microseconds(BANDWIDTH, RATE) == KERNEL_US + 10
    assert library.Launch(4e6, 8e9, idle=1.5).microseconds(BANDWIDTH, RATE) == KERNEL_US + 15
    assert library.Launch(4e6, 8e9, least_us=40).microseconds(BANDWIDTH, RATE) == KERNEL_US + 40
    cached = library.Launch(0, 0, 2.0, 1e-6 * library.L2_BYTES_A_SECOND)
    assert math.isclose(cached.microseconds(BANDWIDTH, RATE), KERNEL_US + 2)


def test_idle_multiprocessors_are_counted():
    assert library.whole_waves(library.MULTIPROCESSORS) == 1
    assert library.whole_waves(library.MULTIPROCESSORS + 1) == 264 / 133
    (whole,) = library.product(128 * 132, 256, 768, 2, BANDWIDTH, RATE)
    assert (whole.idle, whole.operations) == (1, 2.0 * 128 * 132 * 256 * 768)
    assert library.product(128 * 133, 256, 768, 2, BANDWIDTH, RATE)[0].idle > 1.1
    split = library.product(768, 768, 12608, 2, BANDWIDTH, RATE)  # 18 tiles of 128 x 256
    assert len(split) == 2
    assert split[0].idle < 1.2
    assert library.product(0, 768, 768, 2, BANDWIDTH, RATE)[0].operations == 0


def test_the_paths_are_charged_what_they_move():
    m, n, k = 12608, 3072, 768
    for precision, size in (("bf16", 2), ("bf16/fp32", 4)):
        library_us = us("merged", "forward", m, n, k, precision=precision)
        merge = us("triton.merge", "forward", m, n, k, precision=precision)
        assert math.isclose(merge - library_us, KERNEL_US + 1e6 * (size + 2) * n * k / BANDWIDTH)
    eager = us("reference", "forward", m, n, k)
    assert math.isclose(eager - us("merged", "forward", m, n, k), 3 * KERNEL_US + 1e6 * 7 * 2 * n * k / BANDWIDTH)
    frozen = us("frozen", "step", m, n, k)
    assert frozen < us("floor", "step", m, n, k) < us("reference", "step", m, n, k)
    assert us("auto", "forward", m, n, k) == us("triton.merge", "forward", m, n, k)
    assert us("auto", "forward", 16, n, k) == us("triton.one_pass", "forward", 16, n, k)
    assert us("rows 1/8", "step", m, n, k) < us("rows 1/4", "step", m, n, k) < us("rows 1/2", "step", m, n, k)
    assert us("rows 1/8", "step", m, n, k) < us("auto", "step", m, n, k)
    assert model.model_us("dora", "step", problem(m, n, k), "bf16", CEILINGS) is None


def test_a_one_pass_product_is_bound_by_memory_at_few_rows_and_by_the_cache_at_many():
    few, wide = us("triton.one_pass", "forward", 16, 8192, 8192), 1e6 * 2 * 8192 * 8192 / BANDWIDTH
    assert wide < few < 1.1 * wide + KERNEL_US
    (launch,) = model.launches("triton.one_pass", "forward", problem(12608, 3072, 768))
    tiles = linear_configs.tiles_for("forward", "sm_90", PRECISIONS["bf16"].dtype, 12608)
    assert launch.operations == 2.0 * -(-12608 // tiles.block_m) * tiles.block_m * 3072 * 768
    assert launch.cache_bytes / library.L2_BYTES_A_SECOND > launch.operations / RATE


def test_products_in_parts_write_and_add_them():
    first, total = model.launches("triton.one_pass", "forward", problem(16, 768, 3072))
    parts = 8 * 16 * 768 * 4  # 12 tiles of 24 steps, in 8 parts of 3
    whole = 2 * (3072 * 768 + 16 * (3072 + 768))
    assert (first.bytes, total.bytes) == (whole - 2 * 16 * 768 + parts, parts + 2 * 16 * 768)
    assert total.operations == 0


@pytest.mark.parametrize("rows", [16, 1576, 12608])
def test_the_scale_gradients_are_charged_their_partial_sums(rows: int):
    products, reduction = model.launches("triton.one_pass", "scales", problem(rows, 3072, 768))
    assert products.bytes == 2 * (rows * (3072 + 768) + 3072 * 768) + reduction.bytes
    assert reduction.bytes >= 4 * (3072 + 768)
    assert products.operations >= 2.0 * rows * 3072 * 768


def test_the_prediction_names_every_shape_and_every_target():
    plan = gpu_plan()
    text = predict.report(plan)
    assert text.startswith("# Predicted for an H200, measured by no GPU")
    for shape in {entry[1].name for entry in plan.layers}:
        assert text.count(f"| {shape} |") >= 3
    lines = predict.target_lines(predict.predicted_rows(plan), plan)
    for line in lines:
        assert f"| {line[0]} |" in text
    reached = {line[0]: line[5] for line in lines}
    assert reached["forward, M ≤ 64, W ≥ 64 MB: share of measured bandwidth ≥ 0.8"] == "none"
    assert "M = 12608: ViT-B" in reached["forward, M ≥ 4096: time over the merged Linear's ≤ 1.05"]
