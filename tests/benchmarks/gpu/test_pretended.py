"""Every unit of the GPU command as a GPU would run it, on a pretended one: no line waits for the real one to fail."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, targets, timing
from benchmarks.gpu.correctness import check as check_module
from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.measurements import layers, steps
from benchmarks.gpu.measurements.tune import fallback_rows
from benchmarks.gpu.plan import PRECISIONS, RunPlan, Shape, cpu_plan
from benchmarks.gpu.session.units import SECTIONS, units_of
from benchmarks.gpu.session.worker import Bench
from benchmarks.support.baselines import peft_module
from rlrr_kernels import backends, devices, numerics
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.host import cache
from tests.benchmarks.gpu.pretended_gpu import pretended_gpu

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not backends.INTERPRETING, reason="the kernels need TRITON_INTERPRET=1 here"),
]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuning = pytest.importorskip("rlrr_kernels.ops.tuning.tiles", reason="needs Triton")
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    monkeypatch.setattr(timing, "GRAPH_SECONDS", 0.0)
    monkeypatch.setattr(layers, "TOKENS", 20)  # from one image on estimates are timed
    monkeypatch.setattr(steps, "MIN_ROUNDS", 1)
    monkeypatch.setattr(steps, "MAX_ROUNDS", 1)
    # What is exact enough is not the question here: one draw, whose ratio of errors is noise.
    monkeypatch.setattr(numerics, "SEEDS", 1)
    monkeypatch.setattr(check_module, "FEW_VALUES_RATIO", 4.0)
    few = {key: values[:1] for key, values in tuning.CANDIDATES.items()}
    monkeypatch.setattr(tuning, "CANDIDATES", few)
    store.forget()
    peft_module()
    gc.freeze()  # as a process of units does
    with pretended_gpu():
        yield
    gc.unfreeze()
    store.forget()


def a_plan(tiny: bool) -> RunPlan:
    """A GPU's plan of the CPU's sizes, in precisions that the interpreter computes."""
    shape = Shape("ViT-B fc1", 32, 16)
    timed = [(1, shape, 20, "fp32"), (3, shape, 3, "fp16/fp32")]
    modes = ("eager", "graph", "compile", "estimate")
    return cpu_plan()._replace(
        device="cuda", tiny=tiny, graphs=True, many_m=20, layers=timed,
        again=[(3, shape, 20, "fp32")], check_cases=[(20, 32, 16, 1, 1)], rule_m=0,
        tuned=[(2, [(shape, 20)], "fp32")], memory=[(3, shape, 8, "fp16/fp32")], blocks=[(3, 16, 1, 1, "fp32")],
        models=[(4, "vit_base_patch16_224", 8, "fp32", mode) for mode in modes],
    )  # fmt: skip


def test_every_unit_runs_as_on_a_gpu(gpu, tmp_path: Path):
    pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    here = command.environment("cuda", "abc")
    assert here["gpu"] == "Pretended"
    assert here["meaningless"] is False
    rows, plan = [], a_plan(tiny=False)
    for tiny in (True, False):  # ceilings and host time are of sizes that a CPU would take minutes for
        bench = Bench(a_plan(tiny), rows)
        for unit in units_of(bench.plan, SECTIONS):
            if tiny == (unit.section in ("ceilings", "host")):
                found, answers = bench.run(unit)
                assert answers
                rows += found
    for row in rows:
        assert "error" not in row, row
        assert row.get("passed", True), row
        assert "peft" in row.get("skipped", "peft") or "tiles" in row["skipped"], row
    timed = targets.measured(rows, "layers")
    assert {row["implementation"] for row in timed} >= {"auto", "triton.fused", "triton.merge", "compiled (default)"}
    assert all(row["graph_us"] > 0 and row["model_us"] != 0 for row in timed)
    assert all("note" not in row for row in timed)
    memory = targets.measured(rows, "memory")
    assert all(row["alive_bytes"] is not None and row["peak_bytes"] > 0 for row in memory)
    measured = targets.measured(rows, "steps")
    assert {row["mode"] for row in measured} == {"eager", "graph", "compile", "estimate"}
    assert all(row["peak_bytes"] > 0 and row["ms"] > 0 for row in measured)
    assert {row["kernel"] for row in rows if row.get("winner")} == {"forward", "grad_x", "grad_scales"}
    report.write_report(rows, plan, here, tmp_path)
    assert (tmp_path / report.MARKDOWN).exists()


def test_the_copies_that_rotate_are_larger_than_the_cache(gpu):
    from benchmarks.support.common import Problem

    small = Problem(16, 64, 64, torch.float32, True, "cuda")
    size = 4 * (16 * 64 * 2 + 64 * 64)
    assert timing.copies_for(small) == min(timing.MAX_COPIES, -(-2 * (1 << 16) // size))
    assert timing.copies_for(small._replace(m=100_000)) == 1


@pytest.mark.parametrize("reason", [None, "y has an error of 1.0"])
def test_what_ships_for_tma_is_done_without_where_it_fails(gpu, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    checks, seen = Checks(a_plan(False)), []

    def check(kernel, precision, problem):
        seen.append(dict(store.read(store.cache_file())))  # what the next process finds if this one hangs
        assert configs.PERSISTENT["sm_90"][kernel, 2] in store._forced.values()
        return reason

    monkeypatch.setattr(checks, "reason_against_tiles", check)
    monkeypatch.setattr("rlrr_kernels.devices.gpu_of", lambda device: devices.typical("sm_90"))
    rows = fallback_rows(checks.plan, checks, PRECISIONS["bf16"])
    assert [row["passed"] for row in rows] == [reason is None] * len(seen)
    assert seen
    for number, entries in enumerate(seen, 1):
        assert len(entries) == (1 if reason is None else number)
        assert all(entry["schedule"] == "tiled" for entry in entries.values())
    left = store.read(store.cache_file())
    assert left == ({} if reason is None else seen[-1])
    assert not fallback_rows(checks.plan, checks, PRECISIONS["fp32"])
