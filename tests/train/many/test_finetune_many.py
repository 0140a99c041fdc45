"""``finetune_many``: each task ends as it ends alone, whatever trains beside it and whatever stops the process."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.image_folders import make_images, make_splits

timm = pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rlrr_kernels.cli import app
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.export import merge_to_file
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.many import run as many
from rlrr_kernels.train.many.drops import TaskDrops
from rlrr_kernels.train.many.run import finetune_many
from rlrr_kernels.train.many.streams import RandomStream
from rlrr_kernels.train.run.config import FinetuneConfig
from tests.support.killed import run_and_kill

ROUNDING = 1e-4
"""Of the largest element of a tensor: a dozen steps of AdamW on what is computed in another order in float32."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, and no pictures, which take longer than these trainings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlrr_kernels.train.run.results.learning_curve", lambda result, path, *_, **__: path.touch())
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two image folders, one with splits and two classes, one without and three; and a backbone's weights."""
    root = tmp_path_factory.mktemp("many")
    make_splits(root / "shades", train=9)
    make_images(root / "reds", {"few": 7, "some": 8, "most": 9})
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "weights.safetensors")
    return root


def task(root: Path, data: str, out: Path, training: dict[str, Any] | None = None, **settings: Any) -> FinetuneConfig:
    train = TrainConfig(**{"epochs": 2, "batch_size": 6, "mixed_precision": "no", **(training or {})})
    weights = root / "weights.safetensors"
    shared = {"model": "test_vit", "weights": weights, "image_size": 32, "lr": 1e-2, "check": False}
    return FinetuneConfig(data=root / data, out=out, train=train, **shared | settings)


def three(root: Path, out: Path) -> dict[str, FinetuneConfig]:
    """Tasks that differ in all that may differ; the first and last have vectors of one shape."""
    decayed = {"accumulate": 2, "clip_grad": 1.0, "ema_decay": 0.5, "seed": 7, "batch_size": 4}
    return {
        "shades": task(root, "shades", out / "shades", {"mixup": 0.8, "cutmix": 1.0}, drop=0.4, augment="timm"),
        "reds": task(root, "reds", out / "reds", decayed, rank=2, lr=3e-3, drop=0.2, drop_kind="branch"),
        "again": task(root, "reds", out / "again", {"epochs": 3, "select_by": "macro_f1"}, weight_decay=0.1),
    }


@pytest.fixture(scope="module")
def trained(root) -> dict[str, dict[str, Any]]:
    """The three trained together, in ``together``, and one after the other, in ``alone``."""
    before = torch.get_rng_state()
    results = finetune_many(three(root, root / "together"), quiet=True)
    assert list(results) == ["shades", "reds", "again"]
    for config in three(root, root / "alone").values():
        finetune(config, quiet=True)
    torch.set_rng_state(before)
    return results


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def assert_close(folder: Path, other: Path) -> None:
    """The adapters in both run folders are equal within rounding."""
    found, expected = tensors(folder), tensors(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("qkv.shift"):  # a key's bias changes no softmax: AdamW makes steps of what rounding leaves
            (tensor, _, third), (of_queries, _, of_values) = tensor.chunk(3), found[name].chunk(3)
            tensor, found[name] = torch.cat([tensor, third]), torch.cat([of_queries, of_values])
        assert (found[name] - tensor).abs().max() <= ROUNDING * tensor.abs().max() + 1e-7, name


@pytest.mark.parametrize("name", ["shades", "reds", "again"])
def test_each_task_ends_as_it_ends_alone(root, trained, name):
    together, alone = root / "together" / name, root / "alone" / name
    assert_close(together, alone)
    documents = [json.loads((folder / "result.json").read_text()) for folder in (together, alone)]
    assert documents[0] == trained[name]
    assert documents[0].keys() == documents[1].keys()
    for key in ("epoch", "settings", "task", "trained_parameters", "training", "precision"):
        assert documents[0][key] == documents[1][key], key
    for entry, expected in zip(*(document["history"] for document in documents), strict=True):
        assert entry | {"seconds": 0} == pytest.approx(expected | {"seconds": 0}, abs=1e-4)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (together, alone)]
    assert configs[0] | {"out": ""} == configs[1] | {"out": ""}


def test_what_a_task_draws_is_its_own(root, trained):
    """Else equal numbers would say nothing: with another seed they are others."""
    config = dataclasses.replace(
        three(root, root / "other")["shades"], train=dataclasses.replace(three(root, root)["shades"].train, seed=1)
    )
    finetune_many({"shades": config, "reds": three(root, root / "other")["reds"]}, quiet=True)
    assert_close(root / "other" / "reds", root / "alone" / "reds")
    ours, theirs = tensors(root / "other" / "shades"), tensors(root / "alone" / "shades")
    assert any((ours[name] - theirs[name]).abs().max() > 0.01 for name in theirs)


def test_a_step_takes_a_batch_of_each_task_in_one_forward(root, tmp_path, monkeypatch):
    batches: list[tuple[int, int]] = []
    original = many.AdapterBank.tasks
    monkeypatch.setattr(
        many.AdapterBank,
        "tasks",
        lambda bank, names: (batches.append((len(names), len(set(names)))), original(bank, names))[1],
    )
    configs = {
        "one": task(root, "shades", tmp_path / "one", {"epochs": 1}),
        "two": task(root, "shades", tmp_path / "two", {"epochs": 2, "seed": 1}),
    }
    finetune_many(configs, quiet=True)
    assert batches == [(12, 2)] * 3 + [(6, 1)] * 3
    batches.clear()
    configs = {name: dataclasses.replace(config, out=tmp_path / f"{name} apart") for name, config in configs.items()}
    finetune_many(configs, largest_batch=11, quiet=True)
    assert batches == [(6, 1)] * 9
    assert_close(tmp_path / "two apart", tmp_path / "two")


def test_other_commands_take_the_folder_of_a_task(root, trained, tmp_path):
    for name in ("shades", "again"):
        merged = merge_to_file(root / "together" / name / "adapter", tmp_path / f"{name}.safetensors", root / WEIGHTS)
        assert merged.difference < 1e-5
    adapter, data = root / "together" / "shades" / "adapter", root / "shades"
    command = ["evaluate", adapter, "--data", data, "--weights", root / WEIGHTS, "--json", tmp_path / "scores.json"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == trained["shades"]["test"]["accuracy"]
    assert scores["loss"] == pytest.approx(trained["shades"]["test"]["loss"], rel=1e-3)


WEIGHTS = "weights.safetensors"


def test_a_task_gets_more_epochs_and_a_new_one_beside_it(root, tmp_path):
    first = {"a": task(root, "shades", tmp_path / "a", {"epochs": 1})}
    finetune_many(first, quiet=True)
    with pytest.raises(ValueError, match=r"task a: .*holds a run already; go on with it with --resume"):
        finetune_many(first, quiet=True)
    more = {
        "a": task(root, "shades", tmp_path / "a", {"epochs": 2, "warmup_epochs": 0.5}),
        "b": task(root, "reds", tmp_path / "b"),
    }
    results = finetune_many(more, resume=True, quiet=True)
    assert results["a"]["extended_from_epochs"] == [1]
    assert len(results["a"]["history"]) == len(results["b"]["history"]) == 2
    finetune(task(root, "reds", tmp_path / "b alone"), quiet=True)
    assert_close(tmp_path / "b", tmp_path / "b alone")
    stamp = (tmp_path / "a" / "result.json").stat().st_mtime_ns
    assert finetune_many(more, resume=True, quiet=True) == results  # all finished: read, not computed again
    assert (tmp_path / "a" / "result.json").stat().st_mtime_ns == stamp


def test_killed_and_resumed_is_as_never_killed(root, trained, tmp_path):
    pytest.importorskip("tomllib", reason="a file of tasks needs Python 3.11")
    (tmp_path / "tasks.toml").write_text(
        f"""
        model = "test_vit"
        weights = "{root / WEIGHTS}"
        image-size = 32
        check = false
        epochs = 2
        batch-size = 6
        lr = 0.01
        mixed_precision = "no"
        checkpoint-minutes = 0
        out = "killed"

        [tasks.shades]
        data = "{root / "shades"}"
        mixup = 0.8
        cutmix = 1
        drop = 0.4
        augment = "timm"

        [tasks.reds]
        data = "{root / "reds"}"
        batch_size = 4
        accumulate = 2
        clip_grad = 1.0
        ema_decay = 0.5
        seed = 7
        rank = 2
        lr = 3e-3
        drop = 0.2
        drop_kind = "branch"

        [tasks.again]
        data = "{root / "reds"}"
        epochs = 3
        select_by = "macro_f1"
        weight_decay = 0.1
        """
    )
    command, killed = ["finetune-many", "--tasks", str(tmp_path / "tasks.toml")], tmp_path / "killed"

    def reached():
        begun = all((killed / name / checkpoint.NAME).exists() for name in trained)
        return begun and checkpoint.load_checkpoint(killed / "again")["batch"] == 2

    run_and_kill([sys.executable, "-m", "rlrr_kernels.cli", *command], reached)
    assert not list(killed.glob("*/adapter"))
    done = CliRunner().invoke(app, [*command, "--resume"])
    assert done.exit_code == 0, done.output
    for name in trained:
        assert_close(killed / name, root / "together" / name)
        sessions = json.loads((killed / name / "environment.json").read_text())["sessions"]
        assert len(sessions) == 2
        configs = [json.loads((folder / name / "config.json").read_text()) for folder in (killed, root / "together")]
        for config in configs:
            config["out"] = config["train"]["checkpoint_minutes"] = None
        assert configs[0] == configs[1]


def test_the_other_tasks_go_on_where_one_fails(root, tmp_path):
    configs = {
        "good": task(root, "shades", tmp_path / "good"),
        "bad": task(root, "reds", tmp_path / "bad", {"epochs": 4}, lr=1e18),
    }
    with pytest.raises(FloatingPointError, match="1 of 2 tasks failed, the others were trained to their end: bad: the"):
        finetune_many(configs, quiet=True)
    finetune(task(root, "shades", tmp_path / "alone"), quiet=True)
    assert_close(tmp_path / "good", tmp_path / "alone")
    assert not (tmp_path / "bad" / "adapter").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_other_tasks_go_on_where_an_image_is_lost(root, trained, tmp_path, monkeypatch, split):
    """While it trains, where its epochs are compared, and in the test at the end."""
    shutil.copytree(root / "shades", tmp_path / "data")
    lost = next((tmp_path / "data" / split).rglob("*.png"))
    begin = many._Training.run
    monkeypatch.setattr(many._Training, "run", lambda training: (lost.write_bytes(b"no"), begin(training))[1])
    configs = {
        "reds": three(root, tmp_path)["reds"],
        "bad": dataclasses.replace(task(root, "shades", tmp_path / "bad"), data=tmp_path / "data"),
    }
    with pytest.raises(OSError, match=f"1 of 2 tasks failed, .* end: bad: cannot read the image .*{lost.name}"):
        finetune_many(configs, quiet=True)
    assert_close(tmp_path / "reds", root / "alone" / "reds")
    assert not (tmp_path / "bad" / "result.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bias"}, "task b: method must be rlrr in finetune-many"),
        ({"form": "additive"}, "task b: form must be rescaled in finetune-many"),
        ({"scale_grad_rows": 0.5}, "task b: scale_grad_rows must be 1.0 in finetune-many"),
        ({"recompute": True}, "task b: recompute must be False in finetune-many"),
        ({"training": {"compile": True}}, "task b: compile must be False in finetune-many"),
        ({"training": {"fsdp": True}}, "task b: fsdp must be False in finetune-many"),
        ({"training": {"activation_checkpointing": True}}, "task b: activation_checkpointing must be False"),
        ({"model": "test_vit2"}, "model must be the same for all tasks; a has test_vit, b has test_vit2"),
        ({"image_size": 48}, "image_size must be the same for all tasks; a has 32, b has 48"),
        ({"training": {"mixed_precision": "bf16"}}, "mixed_precision must be the same for all tasks"),
    ],
)
def test_what_does_not_go_together_is_told_at_once(root, tmp_path, settings, message):
    configs = {"a": task(root, "shades", tmp_path / "a"), "b": task(root, "reds", tmp_path / "b", **settings)}
    with pytest.raises(ValueError, match=message):
        finetune_many(configs, quiet=True)
    assert not list(tmp_path.iterdir())


def test_no_task_trains_where_another_cannot(root, tmp_path):
    good = task(root, "shades", tmp_path / "a")
    for bad, message in (
        (task(root, "nowhere", tmp_path / "b"), "task b: .*nowhere"),
        (dataclasses.replace(good, data=root / "reds", out=tmp_path / "a"), "out must be another folder for each task"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            finetune_many({"a": good, "b": bad}, quiet=True)
    random = {
        name: dataclasses.replace(task(root, data, tmp_path / name), weights="none")
        for name, data in (("a", "shades"), ("b", "reds"))
    }
    with pytest.raises(ValueError, match=r"task b: its backbone has other weights .* depends on the number of classes"):
        finetune_many(random, quiet=True)
    with pytest.raises(ValueError, match="at least one task"):
        finetune_many({})
    with pytest.raises(ValueError, match="largest_batch must be at least 1; got 0"):
        finetune_many({"a": good}, largest_batch=0)
    assert not list(tmp_path.iterdir())


def test_a_model_that_draws_elsewhere_is_refused(root, tmp_path, monkeypatch):
    forward = type(timm.create_model("test_vit")).forward_head
    monkeypatch.setattr(
        "timm.models.VisionTransformer.forward_head",
        lambda self, x, **options: forward(self, nn.functional.dropout(x, 0.1, self.training), **options),
    )
    with pytest.raises(ValueError, match="VisionTransformer draws random numbers for all tasks at once"):
        finetune_many({"a": task(root, "shades", tmp_path / "a")}, quiet=True)


def test_drops_take_the_rate_and_the_stream_of_each_task():
    def block(drop: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Identity(), drop).train()

    models = {"a": block(nn.Dropout(0.5)), "b": block(nn.Identity()), "c": block(nn.Dropout(0.2))}
    streams = {}
    for seed, name in enumerate(models):
        torch.manual_seed(seed)
        streams[name] = RandomStream()
    shared = block(nn.Identity())
    drops = TaskDrops(shared, models, streams)
    drops.segments = [("a", 3), ("b", 1), ("c", 2)]
    x = torch.ones(12, 50)  # two rows a sample
    torch.manual_seed(99)
    before = torch.get_rng_state()
    results = [shared(x), shared(x)]
    assert torch.equal(torch.get_rng_state(), before)
    for seed, (name, rows) in enumerate({"a": slice(0, 6), "b": slice(6, 8), "c": slice(8, 12)}.items()):
        torch.manual_seed(seed)
        for result in results:
            assert torch.equal(result[rows], models[name](x[rows]))
    assert (results[0][:6] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
