"""What the GPU command says of schedules that no GPU has proven: the line to write, once they were right and faster."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.gpu import report
from benchmarks.gpu.measurements import tune
from benchmarks.gpu.plan import PRECISIONS, cpu_plan
from rlrr_kernels import backends
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.host import cache

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not backends.INTERPRETING, reason="the tuner needs Triton's interpreter, or a GPU"),
]


@pytest.mark.parametrize(
    ("persistent_us", "line"), [(1.0, "('grad_scales', 'persistent', 'interpreter')"), (9.0, None)]
)
def test_the_line_to_write_is_printed_where_it_is_faster(
    persistent_us: float, line: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def times(plan, problem, precision, kernel, gpu, candidates):
        return {tiles: persistent_us if tiles.schedule == "persistent" else 5.0 for tiles in candidates}, {}

    monkeypatch.setattr(tune, "_time_candidates", times)
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path))
    plan = cpu_plan()
    ((_, problems, name),) = plan.tuned
    rows = tune.tune_rows(plan, problems, PRECISIONS[name], "grad_scales", "persistent")
    assert [row["proven_row"] for row in rows if "proven_row" in row] == ([line] if line else [])
    text = "\n".join(report.proven_lines(rows))
    assert (f"    {line}," in text) if line else text == ""
    if line:
        assert eval(line) not in configs.PROVEN
    store.forget()
