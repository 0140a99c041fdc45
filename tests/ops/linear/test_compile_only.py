"""Every Triton kernel in every shipped configuration through the real compiler, without a GPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from rlrr_kernels import backends

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from benchmarks import compile_report
from benchmarks.compile_report import verdict
from rlrr_kernels.ops.choice import tiles as configs

QUICK = {
    "sm_80": ("tf32",),
    "sm_90": ("bf16",),
}
"""One dtype for each family of tiles that is executed from PTX; the slow tests compile the rest, several tasks too."""


@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [
        *QUICK.items(),
        *(pytest.param(arch, compile_report.DTYPES, marks=pytest.mark.slow) for arch in compile_report.TARGETS),
    ],
)
def test_no_configuration_got_worse_or_spills_where_it_costs(arch: str, dtypes: tuple[str, ...]):
    rows = list(compile_report.rows([arch], dtypes, whole=dtypes is compile_report.DTYPES))
    wrong, remarks = verdict.judge(rows)
    assert not wrong, "\n".join(wrong)
    if remarks:
        warnings.warn("\n".join(remarks), stacklevel=1)
    seen = {(row["kernel"], row["dtype"]) for row in rows}
    assert {(kernel, dtype) for kernel in configs.KERNELS for dtype in dtypes} <= seen


def test_products_of_few_rows_are_compiled_in_parts_and_whole():
    cases = [case for case in compile_report.linear_cases("sm_90") if case.dtype == "bf16"]
    for kernel in ("forward", "grad_x"):
        for limit, tiles in configs.TABLE["sm_90"][kernel, 2][:-1]:
            metas = [case.launch.plan.meta for case in cases if case.kernel == kernel and f"; {limit} x" in case.config]
            split = {meta["SPLIT"] for meta in metas if meta["BLOCK_M"] == tiles.block_m}
            assert split == {True, False}, (kernel, limit)


ROW = {"arch": "sm_90", "kernel": "forward", "dtype": "bf16", "config": "tile", "spills": 0, "shared_bytes": 9}
ROW |= {"spills_in_loops": True, "uses_dot": True, "matrix_instruction": "wgmma", "shared_bound": None, "tma": None}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"matrix_instruction": "mma.sync"}, "not wgmma"),
        ({"matrix_instruction": None}, "no matrix instruction"),
        ({"tma": False}, "TMA"),
        ({"spills": 8}, "spills 8 bytes a thread, over 0"),
        ({"spills": 8, "spills_in_loops": False}, "0 when it was accepted"),
        ({"spills": 520, "spills_in_loops": False}, "over 512: even once a program"),
        ({"spills": 72, "dtype": "tf32"}, "spills 72 bytes a thread, over 64"),
        ({"spills": 16, "dtype": "tf32"}, "8 when it was accepted"),
        ({"shared_bytes": 1 << 20}, "shared"),
        ({"shared_bound": 8}, "shared"),
    ],
    ids=str,
)
def test_the_report_can_fail(change: dict, text: str):
    figures = {"sm_90": {verdict.name(ROW | {"dtype": "tf32"}): 8}}
    assert not verdict.problems(ROW, figures)
    assert not verdict.problems(ROW | {"dtype": "tf32", "spills": 8}, figures)
    (found,) = verdict.problems(ROW | change, figures)
    assert text in found


def test_a_new_triton_or_architecture_has_remarks_and_accepting_makes_them_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verdict, "ACCEPTED", tmp_path / "accepted.json")
    verdict.ACCEPTED.write_text("{}")
    small, large = ROW | {"dtype": "tf32", "spills": 8}, ROW | {"spills": 200}
    wrong, remarks = verdict.judge([ROW, small, large])
    assert not wrong
    assert len(remarks) == 3
    verdict.accept([ROW, small, large])
    assert json.loads(verdict.ACCEPTED.read_text())[verdict.version()] == {"sm_90": {verdict.name(small): 8}}
    wrong, remarks = verdict.judge([ROW, small, large])
    assert ["over 0" in line for line in wrong] == [True], "what costs cannot be accepted"
    assert not remarks
    assert len(verdict.judge([small | {"arch": "sm_80"}])[1]) == 2
    verdict.accept([large | {"arch": "sm_75"}])
    assert not verdict.judge([large | {"arch": "sm_75"}])[0], "auto does not choose Triton there"


def test_what_was_accepted_is_within_the_limits():
    for figures in json.loads(verdict.ACCEPTED.read_text(encoding="utf-8")).values():
        for arch, rows in figures.items():
            for name, spills in rows.items():
                assert 0 < spills <= verdict.ONCE.bytes, (arch, name)
