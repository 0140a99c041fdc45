"""The bytes a block keeps between forward and backward: the formulas of the benchmark against what autograd saves."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels import backends

if backends.INTERPRETING:
    pytest.skip("whole models, on the other backends", allow_module_level=True)

pytest.importorskip("timm", reason="needs timm, of the extra [models]")

from benchmarks.activation_bytes import VARIANTS, counted, measured, peak, table
from benchmarks.support.baselines import peft_reason

DIM, HEADS = 48, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula_gives_what_is_measured(variant: str, dtype: torch.dtype):
    if variant == "lora" and (reason := peft_reason("lora")):
        pytest.skip(reason)
    assert measured(variant, DIM, HEADS, dtype) == counted(variant, DIM, HEADS, dtype.itemsize)


def test_a_compiled_model_keeps_no_more_than_an_eager_one():
    variant = "rlrr + mlp + norms"
    found, eager = measured(variant, DIM, HEADS, torch.bfloat16, compiled=True), counted(variant, DIM, HEADS, 2)
    assert found.block == 0
    statistics = 4 * 4
    assert eager.token - statistics <= found.token <= eager.token


def test_recomputed_is_no_more_than_a_frozen_model_keeps():
    tokens = {variant: counted(variant, 768, 12, 2).token for variant in VARIANTS}
    assert tokens["rlrr + mlp + norms"] - tokens["frozen"] == 8  # float32 statistics where plain norms have bfloat16's
    assert tokens["rlrr + mlp + norms"] < tokens["rlrr + mlp"] < tokens["rlrr"] < tokens["lora"] < tokens["reference"]


def test_the_peak_of_a_step_falls_by_what_is_not_kept():
    plain, again, frozen = (peak(v, 2, DIM, HEADS, torch.float32, 32) for v in ("rlrr", "rlrr + mlp + norms", "frozen"))
    assert frozen < again < plain


def test_a_wrong_formula_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.activation_bytes.VARIANTS", ("rlrr",))
    assert table(DIM, HEADS, torch.float32).count("\n") == 2
    monkeypatch.setattr("benchmarks.activation_bytes.counted", lambda *_: counted("frozen", DIM, HEADS, 4))
    with pytest.raises(ArithmeticError, match="rlrr keeps"):
        table(DIM, HEADS, torch.float32)
