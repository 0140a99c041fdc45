"""``set_drop``: where it puts what, with which rate, and that it is gone after training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rlrr_kernels import RLRRConfig, adapt_model, load_adapter, merge_adapter, save_adapter
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop.fit import TrainConfig
from rlrr_kernels.train.models.drop import set_drop
from rlrr_kernels.train.run.config import FinetuneConfig
from tests.support.image_folders import make_splits
from tests.support.tiny_models import disturb, tiny_images, tiny_model

DEEP = {"vit": {"depth": 4}, "swin": {"depths": (2, 2)}, "convnext": {}}


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("kind", ["branch", "depth"])
def test_rates_rise_linearly_and_training_alone_drops(family, kind):
    from timm.layers import DropPath

    model, images = tiny_model(family, **DEEP[family]), tiny_images(family)
    expected = model(images)
    rates = set_drop(model, 0.3, kind)
    assert sorted(set(rates.values())) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert len(rates) == (4 if family == "convnext" else 8)
    for name, rate in rates.items():
        module = model.get_submodule(name)
        assert type(module) is (nn.Identity if rate == 0 else nn.Dropout if kind == "branch" else DropPath)
        assert not module.training
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert not torch.equal(model.train()(images), expected)
    assert set(set_drop(model, 0.0).values()) == {0.0}
    torch.testing.assert_close(model(images), expected)


def test_rates_are_those_of_timm_s_own_stochastic_depth():
    model, timm_s = tiny_model("vit", depth=5), tiny_model("vit", depth=5, drop_path_rate=0.4)
    for name, rate in set_drop(model, 0.4).items():
        assert rate == pytest.approx(getattr(timm_s.get_submodule(name), "drop_prob", 0.0))
    images = tiny_images("vit")
    outputs = []
    for candidate in (model.train(), timm_s.train()):
        torch.manual_seed(3)
        outputs.append(candidate(images))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["branch", "depth"])
def test_a_kind_drops_what_it_says(kind):
    model = tiny_model("vit", depth=2).train()
    set_drop(model, 0.5, kind)
    x = torch.ones(2000, 3, 4)
    kept = model.blocks[1].drop_path1(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    whole_images = (kept.flatten(1).amin(1) == kept.flatten(1).amax(1)).all()
    assert whole_images == (kind == "depth")
    assert kept.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["branch", "depth"])
def test_saves_loads_and_merges_as_if_it_were_not_there(kind, tmp_path):
    model, images = tiny_model("vit"), tiny_images("vit")
    adapt_model(model, RLRRConfig(recipe="paper"))
    set_drop(model, 0.5, kind)
    disturb(model)
    with torch.no_grad():
        expected = model.eval()(images)
        save_adapter(model, tmp_path / "adapter")
        fresh = tiny_model("vit")
        load_adapter(fresh, tmp_path / "adapter")
        torch.testing.assert_close(fresh(images), expected, rtol=0, atol=0)
        merge_adapter(model)
        torch.testing.assert_close(model(images), expected)
        plain = tiny_model("vit")
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(images), expected)


def test_models_without_a_place_and_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"drop needs residual blocks .* Sequential has none"):
        set_drop(nn.Sequential(nn.Linear(2, 2)), 0.1)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="drop must be at least 0 and less than 1; got"):
            set_drop(tiny_model("vit"), rate)
    with pytest.raises(ValueError, match="drop_kind must be one of branch, depth; got 'path'"):
        set_drop(tiny_model("vit"), 0.1, "path")
    assert set_drop(nn.Linear(2, 2), 0.0) == {}


def test_a_run_drops_and_says_so(tmp_path):
    pytest.importorskip("accelerate", reason="training needs accelerate")
    images = make_splits(tmp_path / "images")

    def run(out, **drop):
        train = TrainConfig(epochs=1, warmup_epochs=0, batch_size=12, mixed_precision="no")
        options = {"model": "test_vit", "data": images, "weights": "none", "image_size": 32, "train": train}
        config = FinetuneConfig(out=tmp_path / out, cpu=True, **options, **drop)
        return finetune(config, quiet=True, resume=(tmp_path / out).exists())

    losses = {kind: run(kind, drop=0.5, drop_kind=kind).fit.history[0]["train_loss"] for kind in ("branch", "depth")}
    losses["none"] = run("none").fit.history[0]["train_loss"]
    assert len(set(losses.values())) == 3
    training = json.loads((tmp_path / "branch" / "result.json").read_text())["training"]
    assert (training["drop"], training["drop_kind"]) == (0.5, "branch")
    with pytest.raises(ValueError, match=r"belongs to a run with other settings: drop was 0\.5, is 0\.1"):
        run("branch", drop=0.1, drop_kind="branch")
