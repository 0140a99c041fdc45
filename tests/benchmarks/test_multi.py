"""``python -m benchmarks.multi`` on tiny layers, and that its variants compute what they say."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("peft", reason="the command compares with PEFT")

from benchmarks import multi


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(multi, "LAYER_SHAPES", ((12, 8), (24, 8)))
    monkeypatch.setattr(multi, "BATCHES", ((3, 4), (1, 8)))
    monkeypatch.setattr(multi, "SAMPLES", 8)
    monkeypatch.setattr(multi, "ROWS", 3)


@pytest.mark.parametrize("step", [False, True])
def test_command(step, tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--seconds", "0.001", "--threads", "1", "--out", str(tmp_path), "--cpu", *(["--step"] if step else [])]
    monkeypatch.setattr(sys, "argv", ["multi", *arguments])
    before = torch.get_num_threads()
    multi.main()
    torch.set_num_threads(before)
    name = "multi_cpu_step" if step else "multi_cpu"
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    variants = multi.STEP_VARIANTS if step else multi.FORWARD_VARIANTS
    assert len(rows) == 2 * 2 * (1 if step else 2)
    assert all(tuple(row["seconds"]) == variants and min(row["seconds"].values()) > 0 for row in rows)
    table = (tmp_path / f"{name}.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert f"{variants[1]} over {variants[0]}" in table


def test_forwards_compute_the_same_layers(tiny):
    """The merged rival is the first adapter's layer; PEFT's two ways agree."""
    with torch.no_grad():
        steps = multi.forward_steps(3, 1, 12, 8, torch.float32)
        layer = multi.arguments(12, 8, 1, torch.float32)
        torch.testing.assert_close(steps["ours"](), steps["merged"]() + layer["shift"][0], rtol=1e-5, atol=1e-5)
        assert steps["adapter_names"]().shape == steps["ours"]().shape
