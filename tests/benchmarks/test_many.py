"""``python -m benchmarks.many``: what it measures ends in a table."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from benchmarks import many


@pytest.mark.slow
def test_both_ways_are_measured(monkeypatch, capsys):
    arguments = "--model test_vit --image-size 32 --tasks 2 --images 4 --batch-size 2 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["many", *arguments.split()])
    many.main()
    together, alone = capsys.readouterr().out.strip().splitlines()[-2:]
    assert together.startswith("| side by side | ")
    cells = [float(cell) for cell in alone.strip("| ").split(" | ")[1:]]
    assert cells[1] == pytest.approx(8 / cells[0], rel=0.02)
    assert (cells[2], cells[4]) == (1, 1)
