"""What Inductor schedules around our operators: fewer kernels and bytes than for the literal formula."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="needs timm, of the extra [models]")
pytest.importorskip("triton", reason="needs Triton")
if not torch.__version__.startswith("2.15."):
    pytest.skip("reads the internals of PyTorch 2.15", allow_module_level=True)

from benchmarks.compiled_graphs import build, scheduled

TINY = {"embed_dim": 48, "num_heads": 3, "img_size": 32}


def test_ours_takes_fewer_kernels_and_bytes_than_the_formula():
    ours, formula = (scheduled(build(variant, 1, **TINY), batch=8) for variant in ("rlrr", "reference"))
    assert ours.calls >= 2 * 4 + 2  # four layers and the attention, each way
    assert ours.fused < formula.fused
    assert ours.calls < formula.calls
    assert ours.fused_bytes < formula.fused_bytes
    assert ours.call_bytes < formula.call_bytes
