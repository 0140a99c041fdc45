"""``python -m benchmarks.gpu``, run on a CPU as the test of itself that it is; what it does on a GPU with stand-ins."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import launch_model as model
from benchmarks.gpu import report, targets, timing
from benchmarks.gpu.correctness import check as check_module
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.measurements import steps
from benchmarks.gpu.plan import PRECISIONS, Shape, cpu_plan, gpu_plan
from benchmarks.gpu.session import units
from benchmarks.gpu.session.units import SECTIONS
from rlrr_kernels import backends, devices
from rlrr_kernels.ops.choice import tiles as configs
from tests.benchmarks.gpu.pretended_gpu import pretended_gpu
from tests.support.paths import ROOT

CEILINGS = model.Ceilings(4e12, {"bf16": 8e14, "fp16": 8e14, "fp32": 5e13, "tf32": 4e14})
PLAN = cpu_plan()
SHAPE = PLAN.layers[0][1]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and output of one run through Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    folder = tmp_path_factory.mktemp("gpu")
    result = run(folder, "--minutes", "10", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_every_section_has_rows_that_say_where_they_were_measured(interpreted):
    rows = report.read_rows(interpreted[0] / report.JSON)
    assert {row["section"] for row in rows} == {"ceilings", "correctness", *SECTIONS}
    for row in rows:
        assert row["meaningless"] is True
        assert row["gpu"] == "none"
        assert row["torch"] == torch.__version__
        assert {"driver", "triton", "commit", "python"} <= set(row)
    assert not [row for row in rows if "error" in row]


def test_every_rival_is_timed_where_it_is_installed(interpreted):
    rows = report.read_rows(interpreted[0] / report.JSON)
    layers = [row for row in rows if row["section"] == "layers"]
    peft = {"hira", "dora", "lora"}
    expected = {
        "forward": {"triton.fused", "triton.merge", "auto", "torch", "reference", "frozen", "merged", "floor"} | peft,
        "step": {"triton.fused", "triton.merge", "auto", "torch", "reference", "frozen", "floor"}
        | peft
        | set(ESTIMATES),
        "scales": {"triton", "torch", "floor"},
    }
    for work, names in expected.items():
        here = [row for row in layers if row["work"] == work]
        assert {row["implementation"] for row in here if not row["compile_mode"]} == names
        for row in here:
            if "skipped" in row:
                assert ("peft" in row["skipped"] and row["implementation"] in peft) or "no tiles were faster" in row[
                    "skipped"
                ]
            else:
                assert row["wall_us"] > 0
                assert row["graph_us"] is None
    assert {row["implementation"] for row in layers if row["compile_mode"]} >= {"auto", "compiled (default)"}
    assert {row["implementation"] for row in rows if row["section"] == "steps" and "ms" in row} >= {
        "auto",
        "recompute",
        "reference",
    }


def test_the_gate_ran_and_the_memory_rows_keep_the_promise(interpreted):
    rows = report.read_rows(interpreted[0] / report.JSON)
    checked = [row for row in rows if row["section"] == "correctness"]
    assert {row["backend"] for row in checked} == set(check_module.CHECKED)
    for row in checked:
        small = row["M"] <= PLAN.rule_m and row["backend"] not in ("sampled rows by images", "mlp", "norm")
        checks = {r["check"] for r in checked if all(r[k] == row[k] for k in ("backend", "precision", "M"))}
        assert checks == {"one problem"} | ({"error rule"} if small else set())
    assert all(row["passed"] for row in checked)
    memory = [row for row in rows if row["section"] == "memory" and "kept_bytes" in row]
    kept = {row["implementation"]: row["kept_bytes"] for row in memory if row["shape"] == "ViT-B fc1"}
    block = {row["implementation"]: row["kept_bytes"] for row in memory if "block" in row["shape"]}
    assert block["rlrr + mlp + norms"] < block["rlrr + mlp"] < block["rlrr"] < block["reference"]
    assert kept["auto"] == kept["triton.fused"] == kept["torch"] == 0
    assert kept["reference"] > 0
    with_x = {row["implementation"]: row["kept_with_x_bytes"] for row in memory if row["shape"] == "ViT-B fc1"}
    assert with_x["rows 1/8"] < with_x["rows 1/4"] < with_x["rows 1/2"] < with_x["auto"]
    assert {row["implementation"] for row in rows if row.get("mode") == "estimate" and "ms" in row} >= {
        "auto",
        "recompute",
        *ESTIMATES,
        "rows 1/4, recompute",
    }


def test_the_tuner_names_one_winner_for_each_kernel_and_schedule(interpreted):
    rows = report.read_rows(interpreted[0] / report.JSON)
    tuned = [row for row in rows if row["section"] == "tune"]
    many = min(rows for _, problems, _ in PLAN.tuned for _, rows in problems) >= configs.TMA_MIN_ROWS
    expected = {
        (kernel, schedule)
        for schedule, kernels in configs.SCHEDULES.items()
        for kernel in kernels
        if schedule == "tiled" or many
    }
    assert {(row["kernel"], row["schedule"]) for row in tuned} == expected
    for kernel, schedule in expected:
        here = [row for row in tuned if (row["kernel"], row["schedule"]) == (kernel, schedule)]
        winners = [row for row in here if row.get("winner")]
        assert len(winners) == 1
        assert sum(row["used"] for row in here) == 1
        assert winners[0]["us"] == min(row["us"] for row in here)
        assert winners[0]["table_row"].startswith(f"({kernel!r}, 4): (0, Tiles(")
        assert winners[0]["table_row"] in interpreted[1]


def test_files_and_verdicts(interpreted):
    folder, output = interpreted
    names = {path.name for path in folder.iterdir()}
    others = {report.TILES, *report.PICTURES}
    assert {report.JSON, report.MARKDOWN} <= names <= {report.JSON, report.MARKDOWN, *others}
    assert len(names) <= 6
    text = (folder / report.MARKDOWN).read_text(encoding="utf-8")
    assert "Timings mean nothing" in text
    for verdict in targets.verdicts(report.read_rows(folder / report.JSON), PLAN):
        assert verdict.target in text
        assert verdict.target in output
    assert "kept beyond x and parameters: 0 bytes a layer | meaningless (reached)" in text


def test_a_dry_run_lists_every_unit_by_its_value(tmp_path: Path):
    result = run(tmp_path / "none", "--dry-run", "--minutes", "8")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    tiers = [line for line in lines if line.startswith("tier")]
    assert [int(line.split(":")[0].split()[1]) for line in tiers] == sorted(range(len(tiers)))
    assert "beyond" not in tiers[2]
    assert "beyond 8 minutes" in tiers[-1]
    assert len(lines) - len(tiers) == len(units.make_units(units.SECTIONS, "cuda")[1])
    assert not (tmp_path / "none").exists()


def test_every_time_waits_for_its_gate():
    _, ordered = units.make_units(units.SECTIONS, "cuda")
    seen = set()
    for unit in ordered:
        if unit.section == "correctness":
            seen.add(tuple(unit.label.split(", ")))
        elif unit.section == "layers":
            precision = unit.label.split(", ")[2]
            assert {(name, precision) for name in ("shipped tiles", *check_module.CHECKED[:4])} <= seen, unit.label
        elif unit.section == "steps":
            assert {(name, unit.label.split(", ")[2]) for name in check_module.CHECKED} <= seen, unit.label
        elif unit.section == "tune":
            assert ("shipped tiles", unit.label.split(", ")[-1]) in seen, unit.label
    assert len({(unit.section, unit.label) for unit in ordered}) == len(ordered)


def test_without_time_nothing_is_started_and_bad_arguments_are_named(tmp_path: Path):
    result = run(tmp_path / "none", "--report-only")
    assert result.returncode == 2
    assert "gpu.json" in result.stderr
    result = run(tmp_path / "none", "--minutes", "0")
    assert result.returncode == 2
    assert "--minutes" in result.stderr
    assert not (tmp_path / "none").exists()


def test_the_file_of_rows_is_whole_after_every_write(tmp_path: Path):
    file = report.RowFile(tmp_path / "rows.json", {"gpu": "none"})
    assert report.read_rows(tmp_path / "rows.json") == []
    for count in range(1, 4):
        file.write([{"section": "layers", "what": f"{count} ³"}])
        rows = report.read_rows(tmp_path / "rows.json")
        assert [row["what"] for row in rows] == [f"{n} ³" for n in range(1, count + 1)]
        assert rows[-1]["gpu"] == "none"
    file.close()


@pytest.fixture
def capturing() -> Iterator[list[bool]]:
    """Not empty while a graph is being captured, on a pretended GPU."""
    with pretended_gpu() as capturing:
        yield capturing


def test_replays_are_timed_by_events_and_a_step_that_cannot_be_captured_says_so(capturing: list[bool]):
    def uncapturable() -> None:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    def broken() -> None:
        raise ValueError("no such layer\nand more")

    captured = {"good": []}
    good = [lambda: captured["good"].append(1) if capturing else None] * 4
    implementations = {"good": good, "uncapturable": [uncapturable], "broken": [broken]}
    timings, failures = timing.interleave(implementations, "cpu", 0.0, graphs=True)
    calls = len(captured["good"])
    assert calls % 4 == 0
    assert calls > 400  # calls this short are repeated until starting the graph is no matter
    assert math.isclose(timings["good"].graph_us, 1000.0 / calls)  # a millisecond passes
    assert timings["uncapturable"].graph_us is None
    assert timings["uncapturable"].wall_us > 0
    assert "stream is capturing" in timings["uncapturable"].note
    assert failures == {"broken": "ValueError: no such layer"}


def test_every_set_of_tensors_is_captured(capturing: list[bool]):
    seen = []
    calls = [lambda i=i: seen.append(i) if capturing else time.sleep(1e-3) for i in range(100)]
    timing.interleave({"it": calls}, "cpu", 0.0, graphs=True)
    assert seen == list(range(100))


def test_a_training_step_is_captured_whole(capturing: list[bool]):
    pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    checks = check_module.Checks(PLAN)
    rows = steps.step_rows(PLAN, checks, "vit_base_patch16_224", 2, PRECISIONS["fp32"], "graph")
    assert {row["implementation"] for row in rows if row.get("ms", 0) > 0} >= {"auto", "reference"}
    assert all("peft" in row["skipped"] for row in rows if "skipped" in row)


def test_the_reference_model_computes_what_ours_computes():
    pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    ours, reference = (
        steps.build_model(PLAN, implementation, "vit_base_patch16_224", PRECISIONS["fp32"])[0]
        for implementation in ("auto", "reference")
    )
    reference.load_state_dict(ours.state_dict())
    assert {type(module).__name__ for module in reference.modules()} >= {"ReferenceLinear", "ReferenceNorm"}
    images = torch.randn(2, 3, 16, 16)
    for network in (ours, reference):  # the recipe zeroes the head, which would make all logits equal
        torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference(images), ours(images), rtol=1e-4, atol=1e-5)


def test_the_plan_for_a_gpu_covers_the_targets_and_starts_with_them():
    plan = gpu_plan()
    widths = {"ViT-B": 768, "ViT-L": 1024, "ViT-H": 1280}
    measured = {(shape, rows) for _, shape, rows, precision in plan.layers if precision == "bf16"}
    for name, width in widths.items():
        for part, n, k in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
            shape = Shape(f"{name} {part}", n * width, k * width)
            assert {rows for s, rows in measured if s == shape} == {1, 4, 16, 64, 197, 1576, 12608, 50432}
    assert {entry[3] for entry in plan.layers} == {"bf16", "bf16/fp32", "fp16", "tf32", "fp32"}
    first = [entry for entry in plan.layers if entry[0] == 1]
    assert {entry[3] for entry in first} == {"bf16"}
    assert {(entry[1], entry[2]) for entry in plan.models} == {
        (model, batch)
        for model in ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
        for batch in (8, 64)
    }
    assert {entry[4] for entry in plan.compiled} == {"default", "max-autotune"}
    assert {entry[1:] for entry in plan.again} <= {entry[1:] for entry in first}
    tuning = pytest.importorskip("rlrr_kernels.ops.tuning.tiles", reason="needs Triton")
    gpu = devices.typical("sm_90")
    for tier, problems, name in plan.tuned:
        for kernel in configs.KERNELS:
            precision = PRECISIONS[name]
            classes = {configs.shape_class(kernel, gpu, precision.dtype, rows) for _, rows in problems}
            assert len(classes) == 1  # one row of the table is the result
            assert (kernel, precision.dtype.itemsize, classes.pop()) in tuning.CANDIDATES, (problems, name)
        assert all(
            tier < again for again, shape, rows, main in plan.again if (shape, rows) in problems and main == name
        )


def row(name: str, graph_us: float, work: str = "step", rows: int = 4096) -> dict:
    head = {"section": "layers", "shape": "fc1", "M": rows, "N": 8, "K": 8, "precision": "bf16", "work": work}
    return head | {
        "compile_mode": None, "tiles": "shipped", "implementation": name, "graph_us": graph_us,
        "wall_us": 99.0,
    }  # fmt: skip


def verdict(rows: list[dict], start: str) -> targets.Verdict:
    return next(v for v in targets.verdicts(rows, gpu_plan()) if v.target.startswith(start))


def test_verdicts_take_the_worst_case_and_its_bound():
    rows = [row("auto", 1.0, "forward"), row("merged", 1.0, "forward")]
    assert verdict(rows, "forward, M ≥ 4096").text == "reached"
    rows += [row("auto", 1.2, "forward", 12608), row("merged", 1.0, "forward", 12608)]
    worst = verdict(rows, "forward, M ≥ 4096")
    assert (worst.text, worst.value, worst.count) == ("not reached", 1.2, 2)
    assert "12608" in worst.where
    assert verdict(rows, "forward, M ≤ 64: time").text == "not measured"
    # Eager takes 1.2 times the floor: 0.95 * 1.2 = 1.14 times its speed is asked for, not 1.5 times.
    rows = [row("floor", 1.0), row("reference", 1.2), row("auto", 1.0)]
    speed = verdict(rows, "forward + backward, M ≥ 4096: speed")
    assert speed.reached
    assert math.isclose(speed.bound, 1.14)
    # What was timed again with tuned tiles counts instead.
    again = [{**row("auto", 0.8, "forward", 12608), "tiles": "tuned"}, row("auto", 1.2, "forward", 12608)]
    merged = [{**row("merged", 1.0, "forward", 12608), "tiles": tiles} for tiles in ("tuned", "shipped")]
    assert verdict(again + merged, "forward, M ≥ 4096").value == 0.8
    kept = {"section": "memory", "shape": "fc1", "M": 8, "precision": "bf16", "implementation": "auto", "kept_bytes": 0}
    assert verdict([kept | {"alive_bytes": 512}], "kept").text == "not reached"
    assert verdict([kept | {"alive_bytes": 0}], "kept").text == "reached"


def test_merging_is_faster_from_where_it_stays_faster():
    times = {64: (1.0, 2.0), 197: (2.0, 1.0), 1576: (1.0, 1.1), 4096: (3.0, 2.0), 12608: (9.0, 6.0)}
    rows = [row(name, us, rows=m) for m, pair in times.items() for name, us in zip(
        ("triton.fused", "triton.merge"), pair, strict=True)]  # fmt: skip
    assert targets.merge_crossovers(rows) == [("fc1", "bf16", "step", 4096)]
    assert targets.merge_crossovers(rows[:2]) == [("fc1", "bf16", "step", None)]


@pytest.mark.slow
def test_no_tiles_the_tuner_tries_spill_or_need_too_much_shared_memory_on_sm_90():
    if backends.INTERPRETING:
        pytest.skip("with Triton's interpreter on, nothing compiles")
    compile_report = pytest.importorskip("benchmarks.compile_report", reason="needs Triton")
    from benchmarks.compile_report import verdict
    from rlrr_kernels.ops.tuning import tiles as tuning

    tried = [
        (kernel, size, limit, configs.Tiles(*values))
        for (kernel, size, limit), candidates in tuning.CANDIDATES.items()
        for values in candidates
    ]
    tried += [
        (kernel, size, 0, configs.Tiles(*values, schedule="persistent"))
        for (kernel, size), candidates in tuning.PERSISTENT_CANDIDATES.items()
        for values in candidates
    ]
    for kernel, size, limit, tiles in tried:
        dtype = torch.bfloat16 if size == 2 else torch.float32
        name = "bf16" if size == 2 else "fp32"
        case = compile_report._case(kernel, "sm_90", name, tiles, (dtype, dtype), limit or 4096)
        row = compile_report.report_row(case, "sm_90")
        # Few rows wait for memory, whatever the matrix instruction: small tiles that cannot use wgmma are tried.
        problems = [found for found in verdict.problems(row) if "wgmma" not in found or limit != 16]
        assert not problems, (kernel, tiles, problems)


def test_report_only_writes_the_report_of_earlier_rows(interpreted, tmp_path: Path):
    rows = json.loads((interpreted[0] / report.JSON).read_text(encoding="utf-8"))
    (tmp_path / report.JSON).write_text(json.dumps(rows), encoding="utf-8")
    assert run(tmp_path, "--report-only").returncode == 0
    again = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    assert sorted(again.splitlines()[4:]) == sorted(
        (interpreted[0] / report.MARKDOWN).read_text(encoding="utf-8").splitlines()[4:]
    )
