"""The script that traces calls: what it counts, and that it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import walks
from rlrr_kernels import backends
from tests.support.paths import ROOT


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names of a package of two files: ``a`` calls ``b`` twice, and itself between."""
    names: dict[str, object] = {}
    sources = {
        "a.py": "def first():\n    second(); own()\n    return [second() for _ in range(2)]\ndef own(): return 1",
        "b.py": "def second(): return 2",
    }
    for name, source in sources.items():
        exec(compile(source, str(tmp_path / name), "exec"), names)
    monkeypatch.setattr(walks, "PACKAGE", f"{tmp_path}/")
    return names


def test_calls_files_and_switches_are_counted(package: dict[str, object]):
    calls, result = walks.walk(package["first"])
    assert result == [2, 2]
    assert [(call.file, call.name, call.depth) for call in calls] == [
        ("a.py", "first", 0), ("b.py", "second", 1), ("a.py", "own", 1), ("b.py", "second", 1), ("b.py", "second", 1),
    ]  # fmt: skip
    assert walks.counts(calls) == (5, 2, 3)


def test_it_prints_a_row_for_each_step():
    """In a process of its own: in this one, tests may have called the layouts before, and no call is a first one."""
    command = [sys.executable, "-m", "benchmarks.walks"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    lines = printed.stdout.splitlines()
    numbers = {line[:28].strip(): line[28:].split() for line in lines[1:] if line[28:].strip()}
    rows = {name: [int(word) for word in words] for name, words in numbers.items() if words[0].isdigit()}
    runs = {"torch", *(["cpp"] if backends.CPP_FAILURE is None else [])}
    if backends.HAS_TRITON and (backends.INTERPRETING or shutil.which("cc")):
        runs.add("triton")
    assert {f"{backend}, {step}" for backend in runs for step in walks.STEPS} <= set(rows)
    for backend in runs:
        assert rows[f"{backend}, second forward"] < rows[f"{backend}, first forward"]
        if backend == "triton" and not backends.INTERPRETING:  # where kernels are compiled, and so replayed
            for step, most in zip(walks.STEPS, ((64, 15), (96, 12), (15, 4), (18, 4)), strict=True):
                calls, files, _ = rows[f"triton, {step}"]
                assert calls <= most[0], f"{step}: ask once, and hand the answer down"
                assert files <= most[1], step
        for step in walks.STEPS:
            calls, files, switches = rows[f"{backend}, {step}"]
            assert calls > files >= 1
            assert calls > switches


def test_it_prints_the_functions_of_a_backend(capsys: pytest.CaptureFixture):
    walks.main(["torch"])
    out = capsys.readouterr().out
    assert ": rlrr_linear\n" in out
    assert out.index("torch, first forward:") < out.index("torch, first backward:")
