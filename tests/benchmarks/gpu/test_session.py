"""What ``python -m benchmarks.gpu`` survives: crashes, deadlocks, a lost GPU, no memory, no time, a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.correctness.check import MOST_DEATHS, Checks
from benchmarks.gpu.plan import PRECISIONS, RunPlan, cpu_plan
from benchmarks.gpu.session import session
from benchmarks.gpu.session.session import Session
from benchmarks.gpu.session.units import SECTIONS, make_units
from benchmarks.gpu.session.worker import Bench
from benchmarks.gpu.timing import ContextLost
from benchmarks.gpu.work import Row, Unit, announce
from tests.support.paths import ROOT

PROBLEM = {"M": 8, "N": 32, "K": 16}


def good(bench: Bench) -> list[Row]:
    return [{"section": "ceilings", "what": "good", "process": os.getpid(), "rows before": len(bench._rows)}]


def no_memory(bench: Bench) -> list[Row]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")


def crash(bench: Bench) -> list[Row]:
    announce("triton.merge", "fp32", **PROBLEM)
    announce("triton.fused", "fp32", **PROBLEM)
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hang(bench: Bench) -> list[Row]:
    announce("sampled rows", "fp32")
    time.sleep(1000)
    return []


def lose_the_gpu(bench: Bench) -> list[Row]:
    announce("model", "bf16", model="vit", batch=8, mode="eager")
    raise ContextLost("AcceleratorError: CUDA error: an illegal memory access was encountered")


def without_peft() -> None:
    """No unit here needs it, and each process would import it for as long as all else takes."""
    if "RLRR_CACHE_DIR" in os.environ:
        sys.modules.setdefault("peft", None)


def faulty_units() -> tuple[RunPlan, list[Unit]]:
    """Every fault once, and a good unit after each; imported by the processes that run them."""
    without_peft()
    units = [Unit(1, "ceilings", "good", 0.0, good)]
    for fault in (no_memory, crash, hang, lose_the_gpu):
        units += [Unit(1, "memory", fault.__name__, 0.0, fault), Unit(1, "ceilings", "good", 0.0, good)]
    return cpu_plan(), units


def broken_start() -> tuple[RunPlan, list[Unit]]:
    """Good where the session lives; its processes never get ready."""
    if "RLRR_CACHE_DIR" in os.environ:
        os._exit(3)
    return cpu_plan(), [Unit(1, "ceilings", "good", 0.0, good)]


def test_a_unit_that_ends_its_process_leaves_a_row_and_the_others_go_on(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr(session, "TINY_LIMIT", 2.0)
    run = Session(faulty_units, tmp_path, command.environment("cpu", "abc"), 10.0)
    run.run()
    run.finish()
    rows = report.read_rows(tmp_path / report.JSON)
    errors = {row["label"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "no_memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.",
        "crash": "its process died by signal SIGSEGV, running triton.fused",
        "hang": "killed after 2 s, running sampled rows",
        "lose_the_gpu": "ContextLost: AcceleratorError: CUDA error: an illegal memory access was encountered, "
        "running model",
    }
    processes = [row["process"] for row in rows if "process" in row]
    assert len(processes) == 5
    assert processes[0] == processes[1]  # no memory is no reason for another process
    assert len(set(processes)) == 4
    for process in set(processes):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    # Each process knows the rows of those before it.
    known = [row["rows before"] for row in rows if "process" in row]
    assert known == sorted(set(known))
    text = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    for reason in errors.values():
        assert reason in text
    deaths = [row for row in rows if row.get("check") == "survival"]
    assert [row["backend"] for row in deaths] == ["triton.fused", "sampled rows", "model"]
    assert "running triton.fused" in capfd.readouterr().out

    # The checks of a later process refuse what was at fault, on that problem, or where it had none everywhere.
    checks = Checks(cpu_plan(), rows)
    fp32, shape = PRECISIONS["fp32"], cpu_plan().layers[0][1]
    problem = cpu_plan().problem(8, shape, fp32)
    assert "SIGSEGV" in checks.reason_against("triton.fused", fp32, problem)
    assert "killed after 2 s" in checks.reason_against("sampled rows", fp32)
    assert "illegal" not in (checks.reason_against("model", PRECISIONS["bf16"]) or "")  # that step is not tried again
    again = [row for row in deaths if row["backend"] == "triton.fused"] * MOST_DEATHS
    assert "ended 2 processes" in Checks(cpu_plan(), again).reason_against("auto", fp32)


def test_processes_that_do_not_get_ready_end_the_session_with_a_report(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(session, "STARTS", 1)
    monkeypatch.delenv("RLRR_CACHE_DIR", raising=False)
    run = Session(broken_start, tmp_path, command.environment("cpu", "abc"), 10.0)
    with pytest.raises(RuntimeError, match="1 processes did not get ready"):
        run.run()
    run.finish()
    assert (tmp_path / report.MARKDOWN).exists()


def test_a_unit_that_outlasts_the_session_is_ended_with_it(tmp_path: Path):
    run = Session(faulty_units, tmp_path, command.environment("cpu", "abc"), 10.0)
    run.units = [unit for unit in run.units if unit.run in (good, hang)]
    run._ready_worker()
    number = faulty_units()[1].index(next(unit for unit in faulty_units()[1] if unit.run is hang))
    run.deadline = time.perf_counter() + 1.0
    run._run_unit(number, run.units[1])
    run.finish()
    rows = report.read_rows(tmp_path / report.JSON)
    assert [row["error"] for row in rows] == ["killed when the time was up, running sampled rows"]


def test_what_there_was_no_time_for_is_counted(tmp_path: Path):
    run = Session(lambda: make_units(SECTIONS, "cpu"), tmp_path, command.environment("cpu", "abc"), 0.0)
    run.run()
    run.finish()
    rows = report.read_rows(tmp_path / report.JSON)
    assert {row["section"] for row in rows} == {*SECTIONS, "ceilings", "correctness"}
    assert all(row["skipped"] == report.NO_TIME and row["commit"] == "abc" for row in rows)
    text = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    for section in SECTIONS:
        count = sum(row["section"] == section for row in rows)
        assert f"| {section} |  | no time left | {count} |" in text


def test_a_terminated_command_reports_what_it_has_and_leaves_no_process(tmp_path: Path):
    arguments = [sys.executable, "-u", "-m", "benchmarks.gpu", "--out", str(tmp_path), "--sections", "layers"]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "correctness: torch" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait(timeout=60) == 1
    assert "not measured" in output
    rows = json.loads((tmp_path / report.JSON).read_text(encoding="utf-8"))["rows"]
    assert any(row["section"] == "ceilings" for row in rows)
    assert (tmp_path / report.MARKDOWN).exists()
    end = time.monotonic() + 20  # one that only counts resources ends by itself when the command has ended
    while any(_runs(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.1)


def _runs(process: str) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
