"""The report of the CPU benchmark: the published page is made of the published rows."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.cpu import report

ROWS = report.read_rows(report.RESULTS / "linear_cpu.csv")


def test_the_published_page_says_what_the_rows_say():
    assert report.markdown(ROWS) == (report.RESULTS / "linear_cpu.md").read_text()
    assert len(ROWS) == 192


def test_results_become_the_same_rows_and_every_file(tmp_path: Path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in ROWS]}))
    report.write_report([results], tmp_path)
    assert report.read_rows(tmp_path / "linear_cpu.csv") == ROWS
    assert (tmp_path / "linear_cpu.md").read_text() == report.markdown(ROWS)
    assert (tmp_path / "linear_cpu.png").stat().st_size > 10_000


def test_a_speedup_is_that_of_the_worst_shape():
    rows = [
        {"reference": 9.0, "cpp": 3.0, "cold reference": None},
        {"reference": 8.0, "cpp": 4.0, "cold reference": None},
    ]
    assert report.worst_speedup(rows, "reference") == 2.0
    assert report.worst_speedup(rows, "reference", "cold ") is None


def test_the_results_stay_small():
    data = [path for path in report.RESULTS.iterdir() if path.suffix in (".json", ".csv")]
    assert sum(path.stat().st_size for path in data) < 100_000
