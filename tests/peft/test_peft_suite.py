"""``make peft-suite``: what is replaced in PEFT's own tests, and what is not."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="needs peft, of the extra [peft]")

from rlrr_kernels.peft import RLRRPeftConfig
from tests.peft.suite import CASES, ROWS, replace_cases

SOURCE = """\
from x import LoraConfig

TEST_CASES = [
    ("row", LoraConfig),
]
ALL = sorted(TEST_CASES)


def test(): assert TEST_CASES
"""


def test_lists_of_cases_are_imported_and_every_other_line_stays():
    replaced = replace_cases(SOURCE, ("TEST_CASES",))
    assert "from .rlrr_rows import TEST_CASES\n" in replaced
    kept = [line for line in SOURCE.splitlines() if line not in ("TEST_CASES = [", '    ("row", LoraConfig),', "]")]
    assert [line for line in replaced.splitlines() if "rlrr_rows" not in line] == kept
    with pytest.raises(ValueError, match="no lists called OTHER"):
        replace_cases(SOURCE, ("TEST_CASES", "OTHER"))


def test_the_rows_are_of_this_method_alone_and_have_a_list_for_each_that_is_replaced():
    rows: dict = {}
    exec(ROWS, rows)
    assert {name for names in CASES.values() for name in names} <= set(rows)
    assert {row[2] for row in rows["TEST_CASES"]} == {RLRRPeftConfig}
    assert all("RLRR" in row[0] for name, group in rows.items() if name.endswith("CASES") for row in group)
    for _, _, kind, arguments in rows["TEST_CASES"]:
        kind(**arguments)
