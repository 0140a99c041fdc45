"""Every Triton kernel in every shipped configuration through the real compiler, for four architectures and no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlrr_kernels import backends
from tests.support.paths import ROOT

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from benchmarks import compile_report
from rlrr_kernels.ops.linear import tiles as linear_configs


@pytest.mark.parametrize("arch", compile_report.TARGETS)
def test_no_configuration_spills_or_misses_the_tensor_cores(arch: str):
    rows = list(compile_report.rows([arch]))
    problems = [(row, found) for row in rows if (found := compile_report.problems(row))]
    assert not problems, problems
    seen = {(row["kernel"], row["dtype"]) for row in rows}
    dtypes = ("bf16", "fp16", "bf16/fp32", "fp32", "tf32", "fp64")
    assert {(kernel, dtype) for kernel in linear_configs.KERNELS for dtype in dtypes} <= seen


def test_products_of_few_rows_are_compiled_in_parts_and_whole():
    cases = [case for case in compile_report.linear_cases("sm_90") if case.dtype == "bf16"]
    for kernel in ("forward", "grad_x"):
        for limit, tiles in linear_configs.TABLE["sm_90"][kernel, 2][:-1]:
            metas = [case.launch.plan.meta for case in cases if case.kernel == kernel and f"; {limit} x" in case.config]
            split = {meta["SPLIT"] for meta in metas if meta["BLOCK_M"] == tiles.block_m}
            assert split == {True, False}, (kernel, limit)


def test_the_report_can_fail():
    row = {"arch": "sm_90", "dtype": "bf16", "spills": 0, "shared_bytes": 9, "uses_dot": True}
    row |= {"shared_bound": None, "tma": None}
    assert not compile_report.problems(row | {"matrix_instruction": "HGMMA"})
    assert "not HGMMA" in compile_report.problems(row | {"matrix_instruction": "HMMA"})[0]
    assert "TMA" in compile_report.problems(row | {"matrix_instruction": "HGMMA", "tma": False})[0]
    assert "spills" in compile_report.problems(row | {"matrix_instruction": "HGMMA", "spills": 8})[0]
    assert "shared" in compile_report.problems(row | {"matrix_instruction": "HGMMA", "shared_bytes": 1 << 20})[0]
    assert "shared" in compile_report.problems(row | {"matrix_instruction": "HGMMA", "shared_bound": 8})[0]


@pytest.mark.slow
def test_triton_3_6_compiles_them_as_well(tmp_path: Path):
    """GPU machines often have an older Triton than the newest torch brings; 3.6 came with torch 2.11."""
    old = os.environ.get("RLRR_TRITON_3_6")
    if not old:
        pytest.skip("RLRR_TRITON_3_6 does not name a folder with Triton 3.6; `make test-all` makes one")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([old, str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--json", str(tmp_path / "report.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["triton"].startswith("3.6.")
    problems = [(row, found) for row in report["rows"] if (found := compile_report.problems(row))]
    assert not problems, problems
