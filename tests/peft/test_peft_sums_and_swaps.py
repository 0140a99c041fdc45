"""``add_weighted_adapter`` and ``hotswap_adapter``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="needs peft, of the extra [peft]")

from peft import LoraConfig, PeftModel, get_peft_model

from rlrr_kernels.peft import RLRRPeftConfig, RLRRPeftLinear, hotswap_adapter
from tests.peft.test_peft_tuner import Net, X, layers, nested, wrapped


@pytest.mark.parametrize(
    "configs",
    [
        ({"r": 2, "groups": 2}, {"target_modules": ["fc1"], "groups": 3, "shift": True}),
        ({"sides": "left"}, {"sides": "left"}),
        ({"sides": "right", "groups": 2}, {"sides": "right", "groups": 2, "shift": False}),
        ({"sides": "left", "residual": False}, {"sides": "left", "residual": False}),
    ],
)
def test_a_weighted_sum_changes_the_weights_by_the_sum_of_the_changes(configs, tmp_path):
    model = wrapped(**configs[0])
    model.add_adapter("b", RLRRPeftConfig(**{"target_modules": ["fc1", "fc2"], "init_weights": False} | configs[1]))
    weights = {"default": 0.7, "b": -1.5}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    for layer in layers(model).values():
        present = {name: weight for name, weight in weights.items() if name in layer.residual}
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in present.items())
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
        shifts = [weight * layer.rlrr_shift[name] for name, weight in present.items() if name in layer.rlrr_shift]
        if shifts:
            torch.testing.assert_close(layer.rlrr_shift["sum"].data, sum(shifts))
    assert model.active_adapter == "default"
    model.set_adapter("sum")
    y = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / "sum")(X), y)


def test_a_sum_has_the_layers_and_ranks_of_its_terms_where_names_are_ends_of_others(tmp_path):
    config = {"r": 2, "rank_pattern": {"^0": 1}, "groups_pattern": {"^0": 2}, "target_modules": r"0|2\.1"}
    model = wrapped(nested(), **config)
    y = model(X)
    model.add_adapter("whole", RLRRPeftConfig(**config | {"target_modules": ["0"]}))
    for name in ("default", "whole"):
        model.add_weighted_adapter([name], [1], f"copy of {name}")
    assert list(layers(model)) == [f"base_model.model.{name}" for name in ("0", "2.0", "2.1")]
    model.set_adapter("copy of default")
    torch.testing.assert_close(model(X), y)
    ranks = {name.rpartition("l.")[2]: layer.tensors("copy of whole") for name, layer in layers(model).items()}
    ranks = {name: (t["scale_row"].shape[1], t["scale_col"].shape[0]) for name, t in ranks.items() if t}
    assert ranks == {"0": (1, 2), "2.0": (2, 1)}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(nested(), tmp_path / "copy of default")(X), y)


def test_a_sum_that_fails_halfway_leaves_nothing(monkeypatch):
    model = wrapped()
    before, update = list(model.state_dict()), RLRRPeftLinear.update_layer

    def fails(layer, *args, **kwargs):
        if layer.in_features == 12:
            raise RuntimeError("out of memory")
        update(layer, *args, **kwargs)

    monkeypatch.setattr(RLRRPeftLinear, "update_layer", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_weighted_adapter(["default"], [1], "sum")
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]
    assert not any("sum" in layer.residual for layer in layers(model).values())


def test_without_the_one_weights_sum_to_one():
    model = wrapped(residual=False)
    model.add_adapter("b", RLRRPeftConfig(target_modules=["fc1", "fc2"], init_weights=False, residual=False))
    model.add_weighted_adapter(["default", "b"], [0.25, 0.75], "mean")
    layer = layers(model)["base_model.model.blocks.1.fc2"]
    expected = 0.25 * layer.get_delta_weight("default") + 0.75 * layer.get_delta_weight("b")
    torch.testing.assert_close(layer.get_delta_weight("mean"), expected)
    with pytest.raises(ValueError, match="residual=False must sum to 1"):
        model.add_weighted_adapter(["default", "b"], [1, 1], "sum")
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1], "c", "svd"), "combination_type must be 'cat'"),
        ((["default", "b"], [1], "c"), "one weight for each adapter"),
        ((["default", "d"], [1, 1], "c"), "Adapter d does not exist; there are default"),
        ((["default"], [1], "b"), "adapter_name must be new; there is an adapter 'b' already"),
        ((["default", "left"], [1, 1], "c"), "different sides have no sum"),
        ((["default", "b"], [1, 1], "c"), "r must be an integer from 1 to 64; got 80"),
        ((["default", "head"], [1, 1], "c"), "modules_to_save have no sum, they replace modules: head"),
    ],
)
def test_sums_without_a_meaning(arguments, message):
    model = wrapped(r=40)
    for name, config in {"b": {"r": 40}, "left": {"sides": "left"}, "head": {"modules_to_save": ["head"]}}.items():
        model.add_adapter(name, RLRRPeftConfig(target_modules=["fc1"], **config))
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.state_dict()) == list(before)
    assert list(model.peft_config) == ["default", "b", "left", "head"]


@pytest.mark.parametrize("rank", [2, 1])
def test_a_swap_replaces_values_and_neither_tensors_nor_compiled_code(rank, tmp_path):
    other = wrapped(r=rank, groups=2, modules_to_save=["head"])
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    other.save_pretrained(tmp_path)
    model = wrapped(r=2, groups=2, modules_to_save=["head"])
    expected = PeftModel.from_pretrained(Net(), tmp_path)(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hotswap_adapter(compiled, str(tmp_path))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(X), expected)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_swap_under_compiled_blocks(tmp_path):
    other = wrapped()
    layers(other)["base_model.model.blocks.0.fc1"].rlrr_shift["default"].data.add_(1)
    other.save_pretrained(tmp_path)
    model = wrapped()
    inner = model.base_model.model.blocks
    inner[0]["fc1"] = torch.compile(inner[0]["fc1"], backend="eager")
    assert not torch.allclose(model(X), other(X))
    hotswap_adapter(model, str(tmp_path))
    torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 3, "groups": 2}, r"rlrr_scale_row has the shape \[12, 3\], the loaded adapter room for \[12, 2\]"),
        ({"groups": 3}, r"rlrr_scale_col has the shape \[3, 1, 6\], the loaded adapter room for \[2, 2, 6\]"),
        ({"sides": "left"}, "sides is 'left', of the loaded adapter 'both'"),
        ({"target_modules": ["fc1"], "groups": 2}, r"blocks\.0\.fc2\.rlrr_scale_row is not in"),
        ({"shift": True, "groups": 2}, r"blocks\.0\.fc2\.rlrr_shift is not in the loaded adapter"),
    ],
)
def test_a_swap_that_does_not_fit_changes_nothing(config, message, tmp_path):
    wrapped(**config).save_pretrained(tmp_path)
    model = wrapped(r=2, groups=2)
    y = model(X)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path))
    assert torch.equal(model(X), y)


def test_swaps_of_what_is_not_there_or_another_method_s(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path / "rlrr")
    get_peft_model(Net(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="Adapter b does not exist; there are default"):
        hotswap_adapter(model, str(tmp_path / "rlrr"), "b")
    with pytest.raises(ValueError, match="must hold an adapter of RLRR"):
        hotswap_adapter(model, str(tmp_path / "lora"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="default is merged; unmerge_adapter"):
        hotswap_adapter(model, str(tmp_path / "rlrr"))
