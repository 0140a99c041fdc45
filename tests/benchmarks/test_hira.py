"""``python -m benchmarks.hira`` on tiny layers and a tiny model, and the plain torch function that it measures."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft", reason="the command compares with PEFT")

from benchmarks import hira
from benchmarks.support.baselines import peft_reason
from benchmarks.support.common import kept_bytes
from benchmarks.support.plain_hira import HiraFunction
from rlrr_kernels.numerics import relative_error
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(peft_reason("hira") is not None, reason=str(peft_reason("hira")))


def arguments(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 20), torch.randn(30, 20), torch.randn(30)
    return [t.to(dtype) for t in (x, weight)] + [torch.randn(30, 3), torch.randn(3, 20), bias.to(dtype)]


def as_peft(x, weight, B, A, bias):
    """What PEFT's layer computes, in plain torch as there."""
    y = F.linear(x, weight, bias)
    return (y + F.linear(x.to(A.dtype), weight * (B @ A))).to(y.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_plain_function_is_hira(dtype, tolerance):
    given = arguments(dtype)
    trained = [given[i].requires_grad_() for i in (0, 2, 3, 4)]
    grad_y = torch.randn(2, 5, 30).to(dtype)
    y, expected = HiraFunction.apply(*given), as_peft(*given)
    assert y.dtype == dtype
    assert relative_error(y.detach(), expected.detach().double()) < tolerance
    actual = torch.autograd.grad(y, trained, grad_y)
    for ours, theirs in zip(actual, torch.autograd.grad(expected, trained, grad_y), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs.double()) < tolerance


def test_plain_function_keeps_nothing_the_size_of_a_weight():
    given = arguments(torch.float32)
    for index in (0, 2, 3):
        given[index].requires_grad_()
    assert kept_bytes(lambda: HiraFunction.apply(*given), given) == 0
    assert kept_bytes(lambda: as_peft(*given), given) == 4 * 30 * 20


def test_the_page_shows_the_function_that_is_measured():
    code = (ROOT / "benchmarks" / "support" / "plain_hira.py").read_text().split('"""\n\n', 1)[1]
    assert code in (ROOT / "docs" / "use" / "hira.md").read_text()


def test_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hira, "LAYER_SHAPES", ((12, 8), (8, 16)))
    words = ["--rows", "4", "--ranks", "2", "--dtypes", "bfloat16", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hira", *words])
    threads = torch.get_num_threads()
    hira.main()
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "hira_cpu.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == [[12, 8], [8, 16]]
    assert all(set(row["seconds"]) == set(hira.LAYER_VARIANTS) and min(row["seconds"].values()) > 0 for row in rows)
    worst = min(row["seconds"]["peft"] / row["seconds"]["ours"] for row in rows)
    assert f"| bfloat16 | 4 | 2 | {worst:.2f} | 1.30 |" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["--step", "--picture"])
def test_models(mode, tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="the models are timm's")
    pytest.importorskip("matplotlib", reason="the picture needs it")
    words = [mode, "--models", "test_vit", "--batch", "1", "--rank", "2", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hira", *words])
    threads = torch.get_num_threads()
    hira.main()
    torch.set_num_threads(threads)
    name = "hira_cpu_step" if mode == "--step" else "hira_cpu_methods"
    rows = {row["method"].lower(): row for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]}
    ours, peft = (rows["hira, ours"], rows["hira"]) if mode == "--step" else (rows["hira, accelerated"], rows["hira"])
    layers = [m for m in hira.build("test_vit").blocks.modules() if isinstance(m, torch.nn.Linear)]
    # PEFT's W ⊙ (B A) of every layer but the first, whose x needs no gradient.
    assert peft["kept"] - ours["kept"] == sum(layer.weight.nbytes for layer in layers[1:])
    assert ours["kept"] <= rows["lora"]["kept"]
    assert (tmp_path / f"{name}.png").exists() == (mode == "--picture")
