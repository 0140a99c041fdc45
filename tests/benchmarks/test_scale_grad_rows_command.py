"""``python -m benchmarks.scale_grad_rows`` on a tiny model: its runs, that nothing is done twice, its tables."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.image_folders import make_splits

timm = pytest.importorskip("timm", reason="the command needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import save_file

from benchmarks import scale_grad_rows
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.grid import runs as grid
from rlrr_kernels.train.run.config import FinetuneConfig


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images", train=20, val=3, test=3)


def test_command(images, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    monkeypatch.setattr(scale_grad_rows, "TIMM_NAME", "test_vit")
    monkeypatch.setattr(scale_grad_rows, "backbone_file", lambda cache: weights)
    monkeypatch.setattr(scale_grad_rows, "elpv_folder", lambda cache: images)
    monkeypatch.setattr(scale_grad_rows, "SHARES", (1.0, 0.25))
    trained, original = [], grid.finetune
    monkeypatch.setattr(
        grid, "finetune", lambda config, **options: trained.append(config) or original(config, **options)
    )
    arguments = ["--cache", tmp_path, "--out", tmp_path / "runs", "--seeds", 1, "--epochs", 1, "--image-size", 32]
    monkeypatch.setattr(sys, "argv", ["scale_grad_rows", *map(str, [*arguments, "--batches", 2])])
    for _ in range(2):
        scale_grad_rows.main()
    assert [config.scale_grad_rows for config in trained] == [1.0, 0.25]
    document = json.loads((tmp_path / "runs" / "scale_grad_rows.json").read_text())
    assert [row["scale_grad_rows"] for row in document["runs"]] == [1.0, 0.25]
    ours, plain, uniform = document["noise"]
    assert plain["kept_bytes"] == ours["kept_bytes"]
    assert ours["kept_bytes"] < ours["kept_bytes_exact"]
    assert 0 < ours["added_variance"] < uniform["added_variance"]
    assert uniform["cosine"] < ours["cosine"] < 1
    text = (tmp_path / "runs" / "scale_grad_rows.md").read_text()
    assert "| 1 (exact) | 1 |" in text
    assert "| 0.25 |" in text


def test_a_run_goes_on_with_its_own_share_only(images, tmp_path):
    train = scale_grad_rows.TrainConfig(epochs=2, warmup_epochs=0.5, batch_size=6, mixed_precision="no")
    config = FinetuneConfig(
        model="test_vit", data=images, out=tmp_path / "run", weights="none", image_size=32, scale_grad_rows=0.25,
        train=train,
    )  # fmt: skip
    finetune(config, quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["scale_grad_rows"] == 0.25
    other = FinetuneConfig(**{**vars(config), "scale_grad_rows": 0.5})
    with pytest.raises(ValueError, match="scale_grad_rows"):
        finetune(other, resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"scale_grad_rows is a setting of rlrr; got 0\.5 for lora"):
        FinetuneConfig(model="test_vit", method="lora", scale_grad_rows=0.5)
