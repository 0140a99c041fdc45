"""Adapter and run folders that an older version wrote still load, evaluate and go on.

Commit 9f82ca8 wrote ``tests/data/version_0.1.0``, on weights that :func:`tests.train.output.fixed_weights.fill` makes:
``adapter`` by ``save_adapter``; ``finished`` by :func:`old_run`, ``bias`` by the same with ``method="bias"``;
``stopped`` is the first run at the end of its second epoch.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.image_folders import make_splits
from tests.support.paths import ROOT
from tests.train.output.fixed_weights import fill, spread

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import load_file, save_file

from rlrr_kernels import adapter_info, load_adapter, merge_adapter, save_adapter
from rlrr_kernels.train.config.files import read_config
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, find_samples, make_loader
from rlrr_kernels.train.evaluate import evaluate
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop.distributed import make_accelerator
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.task import load_task

FOLDERS = ROOT / "tests" / "data" / "version_0.1.0"

LOGITS = (
    (0.0809418112039566, -0.043908413499593735, -0.07127827405929565, -0.0415022112429142, 0.0656743273139),
    (0.0819658488035202, -0.04289336875081062, -0.07186400890350342, -0.042215052992105484, 0.06535480171442032),
)
"""Of the adapted model whose adapter is in ``adapter``, when it was written."""


def old_run(folder: Path) -> FinetuneConfig:
    """The run that was written, in ``folder``, with its images and weights there."""
    weights = folder / "backbone.safetensors"
    save_file(fill(timm.create_model("test_vit", num_classes=0)).state_dict(), weights)
    return FinetuneConfig(
        model="test_vit",
        weights=weights,
        image_size=32,
        data=make_splits(folder / "images", train=8, val=4, test=4),
        out=folder / "run",
        layers="qkv",
        recipe="layers",
        lr=0.01,
        cpu=True,
        train=TrainConfig(epochs=3, batch_size=8, workers=0, mixed_precision="no"),
    )


def test_an_old_adapter_folder_loads_and_is_written_again_as_it_was(tmp_path):
    options = {"num_classes": 5, "depth": 2, "embed_dim": 48, "img_size": 32}
    model = fill(timm.create_model("vit_tiny_patch16_224", **options))
    assert load_adapter(model, FOLDERS / "adapter").trained == 5141
    images = spread(2 * 3 * 32 * 32, 0).view(2, 3, 32, 32)
    torch.testing.assert_close(model(images), torch.tensor(LOGITS), rtol=1e-4, atol=1e-6)
    assert adapter_info(FOLDERS / "adapter").metadata == {"classes": list("abcde")}

    save_adapter(model, tmp_path, metadata={"classes": list("abcde")})
    old, new = (load_file(folder / "adapter.safetensors") for folder in (FOLDERS / "adapter", tmp_path))
    assert list(old) == list(new)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FOLDERS / "adapter", tmp_path))
    assert old.items() <= new.items()

    merge_adapter(model)
    torch.testing.assert_close(model(images), torch.tensor(LOGITS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["finished", "bias"])
def test_an_old_run_evaluates_as_it_did(name, tmp_path):
    run = old_run(tmp_path)
    model, task = load_task(FOLDERS / name / "adapter", run.weights)
    samples = find_samples(run.data / "test", task.classes)
    loader = make_loader(ImageDataset(samples, task.preprocessing.transform()), 8)
    accelerator = make_accelerator(run.train, cpu=True)
    scores = evaluate(*accelerator.prepare(model, loader), len(task.classes), accelerator)
    expected = json.loads((FOLDERS / name / "result.json").read_text())["test"]
    assert expected["loss"] < 0.4  # the head's start has ln 2 = 0.69
    assert list(scores.recall) == expected["recall"]
    for name in ("accuracy", "macro_f1", "loss", "count"):
        assert getattr(scores, name) == pytest.approx(expected[name], rel=1e-3)


def test_an_old_run_goes_on_and_ends_as_it_would_have(tmp_path):
    run = old_run(tmp_path)
    shutil.copytree(FOLDERS / "stopped", run.out)
    written = read_config(FinetuneConfig, run.out / "config.json")
    assert dataclasses.replace(written, data=run.data, out=run.out, weights=run.weights) == run

    finetune(run, resume=True, quiet=True)
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (run.out, FOLDERS / "finished"))
    assert expected["settings"].items() <= result["settings"].items()  # a newer setting has its default
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3]
    for entry, before in zip(result["history"], expected["history"], strict=True):
        assert entry | {"seconds": 0} == pytest.approx(before | {"seconds": 0}, rel=1e-3)
    sessions = json.loads((run.out / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["commit"] == "9f82ca8353ffaaa0904d98de18757ecebc32317a"
    tensors, before = (
        load_file(folder / "adapter" / "adapter.safetensors") for folder in (run.out, FOLDERS / "finished")
    )
    for name in [name for name in tensors if name.endswith("qkv.shift")]:
        # Adding to all keys changes no attention: this gradient is rounding noise, which AdamW scales to steps of lr.
        tensors[name][64:128] = before[name][64:128]
    torch.testing.assert_close(tensors, before, rtol=1e-3, atol=1e-5)
