"""The versions that the documents name are those that ``make matrix`` ran; what it reads and writes is right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

if not (ROOT / ".ci" / "matrix.py").exists():
    pytest.skip("not run from a checkout", allow_module_level=True)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = load()
PROJECT = {
    "name": "rlrr-kernels",
    "optional-dependencies": {
        "models": ["timm>=1.0.20", "numpy"],
        "train": ["rlrr-kernels[models]", "rich>=13.7"],
        "all": ["rlrr-kernels[models, train]", "numpy", "ruff>=0.9", "mkdocstrings[python]>=0.29"],
    },
}


def minors(versions: list[str]) -> list[str]:
    return [version.rpartition(".")[0] for version in versions]


def test_own_extras_are_resolved_and_lower_bounds_become_pins():
    assert matrix.requirements(PROJECT, "all") == ["timm>=1.0.20", "numpy", "rich>=13.7"]
    assert matrix.requirements(PROJECT, "all", oldest=True) == ["timm==1.0.20", "numpy", "rich==13.7"]


def test_the_oldest_row_has_the_oldest_torch_that_is_asked_for():
    oldest, *others = matrix.ROWS
    assert f'"torch>={oldest.name}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert oldest.oldest
    assert not any(row.oldest for row in others)
    names = [tuple(map(int, row.name.split("."))) for row in matrix.ROWS]
    assert names == [(2, minor) for minor in range(names[0][1], names[-1][1] + 1)], "a minor version is left out"


@pytest.mark.skipif(not matrix.TABLE.exists(), reason="make matrix MATRIX=--write has not run yet")
def test_the_readme_names_what_ran():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in matrix.TABLE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d", line)
    ]
    assert [row[0] for row in rows] == [row.torch for row in matrix.ROWS]
    torch, triton, python = (minors([row[column] for row in rows]) for column in range(3))
    pythons = sorted(python, key=lambda name: int(name.partition(".")[2]))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"torch {torch[0]} to {torch[-1]}, each with its Triton, {triton[0]} to {triton[-1]}" in readme
    assert f"on Python {pythons[0]} to {pythons[-1]}" in readme
    assert f"needs torch >= {torch[0]} alone" in readme
    assert not any("failed" in cell for row in rows for cell in row)


def test_a_report_is_counted(tmp_path: Path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite time="90">'
        '<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="left"><skipped/></testcase>'
        '<testcase classname="tests.a" name="bad"><failure/></testcase>'
        '<testcase classname="tests.b" name="worse"><error/></testcase></testsuite></testsuites>'
    )
    found = matrix.counts(report)
    assert found["failures"] == ["tests.a::bad", "tests.b::worse"]
    assert (found["passed"], found["skipped"], found["failed"], found["seconds"]) == (1, 1, 2, 90.0)
    result = {
        "torch": "2.9.1",
        "triton": "3.5.1",
        "python": "3.10.13",
        "cpp": "no",
        "suite": found,
        "interpreted": found,
        "commit": "1234567",
    }
    text = matrix.table([(matrix.ROWS[0], result), (matrix.ROWS[1], {"error": "no Python 3.11 on this machine"})])
    head, rule, first, second = text.splitlines()
    assert "1 passed, 2 failed, 1 skipped" in first
    assert "no Python 3.11" in second
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    assert text in matrix.page(text)


def test_what_passed_earlier_is_not_repeated_if_one_says_so(tmp_path: Path):
    row = matrix.ROWS[0]
    here = tmp_path / "now"
    assert matrix.known_result(row, here, earlier=True) == here / f"{row.name}.json"
    counted = {"failures": []}
    for index, (name, failures) in enumerate([("old", []), ("new", []), ("bad", ["tests.a::bad"]), ("new-slow", [])]):
        path = tmp_path / name / f"{row.name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"suite": counted | {"failures": failures}, "interpreted": counted, "commit": "1"}))
        os.utime(path, (index, index))
    assert matrix.known_result(row, here, earlier=True) == tmp_path / "new" / f"{row.name}.json"
    assert matrix.known_result(row, here, earlier=False) == here / f"{row.name}.json"
    assert matrix.known_result(row, tmp_path / "old", earlier=True) == tmp_path / "old" / f"{row.name}.json"
