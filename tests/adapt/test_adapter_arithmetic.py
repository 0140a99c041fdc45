"""Sums, interpolations and the negative of adapter folders, held to the sums of their changes of the weights."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels import RLRRConfig, adapt_model, adapter_info, load_adapter, save_adapter
from rlrr_kernels.adapt import combine_adapters
from rlrr_kernels.adapt.modules import find_module
from rlrr_kernels.nn.rescaled import Rescaled
from tests.support.tiny_models import disturb, tiny_model

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")


@pytest.fixture
def saved(tmp_path):
    def save(name, seed=0, family="vit", metadata=None, **config):
        model = tiny_model(family)
        adapt_model(model, RLRRConfig(**config))
        torch.manual_seed(seed)
        disturb(model)
        save_adapter(model, tmp_path / name, metadata=metadata)
        return model

    return save


def effect(model):
    """What an adapter changes: W' and b + f of every layer, γ and β of norms, all else that is trained."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Rescaled):
            found[name], found[f"{name}.b"] = module.merged_weight(), module.merged_bias()
    layers = tuple(name for name in found if not name.endswith(".b"))
    return found | {n: p.data for n, p in model.named_parameters() if p.requires_grad and not n.startswith(layers)}


def backbone(model, config):
    """The same of the untrained backbone."""
    found = effect(model)
    plain = tiny_model("vit").state_dict()
    return {
        name: plain[f"{name}.weight"]
        if f"{name}.weight" in plain
        else plain.get(f"{name[:-2]}.bias")
        if name.endswith(".b")
        else torch.ones_like(tensor)
        if name.endswith(".scale")
        else torch.zeros_like(tensor)
        for name, tensor in found.items()
    }


def expected(models, weights, config):
    base = backbone(models[0], config)
    effects = [effect(model) for model in models]
    return {
        name: zero + sum(w * (e[name] - zero) for w, e in zip(weights, effects, strict=True))
        for name, zero in base.items()
    }


def check(folder, wanted, **tolerances):
    fresh = tiny_model("vit")
    load_adapter(fresh, folder)
    found = effect(fresh)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "config",
    [
        {"recipe": "paper"},
        {"rank": 3, "groups": {"qkv": 3}, "shift": "with_bias"},
        {"sides": "right"},
        {"sides": "left", "residual": False},
        {"residual": False, "rank": 2},
        {"form": "additive", "rank": 2},
    ],
)
def test_interpolation(config, saved, tmp_path):
    models = [saved("a", 1, **config), saved("b", 2, **config)]
    assert combine_adapters([tmp_path / "a", tmp_path / "b"], [0.3, 0.7], tmp_path / "c") == tmp_path / "c"
    check(tmp_path / "c", expected(models, [0.3, 0.7], config))
    rank = config.get("rank", 1) * (1 if "sides" in config else 2)
    assert adapter_info(tmp_path / "c").config.rank == rank
    assert adapter_info(tmp_path / "c").metadata["sum"] == "0.3 * a + 0.7 * b"


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_sums_with_one_adapter_s_head(weights, saved, tmp_path):
    config = {"recipe": "paper"}
    models = [saved("a", 1, **config), saved("b", 2, **config)]
    combine_adapters([tmp_path / "a", tmp_path / "b"], weights, tmp_path / "c", head_of=1)
    wanted = expected(models, weights, config)
    for name in ("head.weight", "head.bias"):
        wanted[name] = models[1].state_dict()[name]
    check(tmp_path / "c", wanted)


def test_the_negative_undoes_an_adapter(saved, tmp_path):
    model = saved("a", 1, heads=())
    combine_adapters([tmp_path / "a"], [-1], tmp_path / "b")
    check(tmp_path / "b", expected([model], [-1], {}))
    combine_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "nothing")
    check(tmp_path / "nothing", backbone(model, {}))
    assert adapter_info(tmp_path / "b").config.rank == 1


def test_ranks_may_differ(saved, tmp_path):
    models = [saved("a", 1, heads=()), saved("b", 2, heads=(), rank=4)]
    combine_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "c")
    check(tmp_path / "c", expected(models, [1, 1], {}))
    assert find_module(models[0], "blocks.0.attn.qkv").rank == 1
    assert adapter_info(tmp_path / "c").config.rank == 5


@pytest.mark.parametrize(
    ("configs", "weights", "message"),
    [
        (({}, {"groups": 3}), [1, 1], "b and .*a differ in groups: they have no sum"),
        (({}, {"shift": False}), [1, 1], "differ in shift"),
        (({}, {"family": "dinov2"}), [1, 1], "differ in base_model"),
        (({}, {}), [1, 1], r"only where the weights sum to 1: head\.bias, head\.weight; head_of says whose"),
        (({}, {}), [1], "one weight for each folder; got 2 folders, 1 weights"),
        (({}, {}), [1, float("nan")], "weights must be finite"),
        (({"residual": False}, {"residual": False}), [1, 1], "residual=False must sum to 1"),
        (({"rank": 40}, {"rank": 40}), [0.5, 0.5], "rank must be from 1 to 64; got 80"),
    ],
)
def test_what_has_no_sum(configs, weights, message, saved, tmp_path):
    for seed, (name, config) in enumerate(zip("ab", configs, strict=True)):
        saved(name, seed, **config)
    with pytest.raises(ValueError, match=message):
        combine_adapters([tmp_path / "a", tmp_path / "b"], weights, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="head_of must be from 0 to 1; got 2"):
        combine_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "c", head_of=2)


def test_adapters_of_other_weights_have_no_sum(saved, tmp_path):
    saved("a", 1)
    model = tiny_model("vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.5)
    adapt_model(model, RLRRConfig())
    save_adapter(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"b and .*a were trained on different weights .*first is blocks\.1\.mlp\.fc2"):
        combine_adapters([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_heads_of_other_classes_have_no_sum_and_the_head_brings_its_classes(saved, tmp_path):
    tasks = [{"task": {"classes": classes}} for classes in (["cat", "dog"], ["dog", "cat"])]
    for name, task in zip("ab", tasks, strict=True):
        saved(name, metadata=task)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"b and .*a are of different classes, or of the same in another order"):
        combine_adapters(folders, [0.5, 0.5], tmp_path / "c")
    for index, task in enumerate(tasks):
        combine_adapters(folders, [0.5, 0.5], tmp_path / "c", head_of=index)
        assert adapter_info(tmp_path / "c").metadata["task"] == task["task"]


def test_the_sum_of_two_dtypes_keeps_the_digits_of_both(saved, tmp_path):
    models = [saved("a", 1, scale_dtype=torch.bfloat16, heads=()), saved("b", 2, heads=())]
    combine_adapters([tmp_path / "a", tmp_path / "b"], [0.0, 1.0], tmp_path / "c")
    assert adapter_info(tmp_path / "c").config.scale_dtype is torch.float32
    check(tmp_path / "c", expected(models, [0.0, 1.0], {}))
