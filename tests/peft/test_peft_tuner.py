"""RLRR as a method of PEFT: a model wrapped by ``get_peft_model`` computes, trains, merges, saves and loads right."""

from __future__ import annotations

import copy
import pickle
import runpy
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft, of the extra [peft]")

import peft
from peft import PeftModel, PeftType, get_peft_model

import rlrr_kernels.peft
from rlrr_kernels import RLRRLinear
from rlrr_kernels.peft import RLRRPeftConfig, RLRRPeftLinear
from rlrr_kernels.peft.registry import IMPORT, RLRR, add_member
from rlrr_kernels.peft.targets import end_of_name
from rlrr_kernels.reference import rlrr_linear_reference
from tests.support.paths import ROOT


class Net(nn.Module):
    """Two blocks of two layers, with and without bias, and a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(6, 12, dtype=dtype), "fc2": nn.Linear(12, 6, bias=False, dtype=dtype)})
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["fc2"](block["fc1"](x).tanh())
        return self.head(x)


def nested():
    """Layers whose names are ends of others' names: ``0`` of ``2.0``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def wrapped(model=None, **config):
    torch.manual_seed(2)
    config = {"target_modules": ["fc1", "fc2"], "init_weights": False, **config}
    return get_peft_model(Net() if model is None else model, RLRRPeftConfig(**config))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RLRRPeftLinear)}


def base_state(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "rlrr_" not in name}


@pytest.mark.parametrize("config", [{}, {"r": 3, "groups": 2}, {"sides": "left"}, {"sides": "right", "shift": True}])
@pytest.mark.parametrize("residual", [True, False])
def test_a_layer_computes_the_formula_and_trains_its_vectors_alone(config, residual):
    model = wrapped(residual=residual, **config)
    layer = layers(model)["base_model.model.blocks.0.fc1"]
    by = layer.rescaling("default")
    bias = layer.base_layer.bias + by.shift
    y = rlrr_linear_reference(X, layer.base_layer.weight, by.scale_row, by.scale_col, bias, residual=residual)
    torch.testing.assert_close(layer(X), y)
    model(X).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if "rlrr_" in name}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [{"r": 3, "groups": 2}, {"sides": "left", "residual": False, "shift": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_and_a_replaced_forward_of_a_base_layer_see_its_calls(config, dtype):
    model, x = wrapped(Net(dtype), **config), X.to(dtype).requires_grad_()
    y, fc2 = model(x), layers(model)["base_model.model.blocks.1.fc2"]
    y.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = []
    handles = [
        fc2.base_layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
        fc2.base_layer.register_forward_hook(lambda module, args, y: seen.append("after")),
        fc2.base_layer.register_full_backward_hook(lambda module, *grads: seen.append("backward")),
    ]
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {}
    hooked = model(x)
    torch.testing.assert_close(hooked, y, **tolerance)
    hooked.float().square().sum().backward()
    assert seen == ["before", "after", "backward"]
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], **tolerance)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), y)
    fc2.base_layer.register_forward_hook(lambda module, args, y: y + 100)
    inner, forward = fc2(torch.ones(2, 12, dtype=dtype)), fc2.base_layer.forward
    fc2.base_layer.forward = lambda x: forward(x) + 100
    torch.testing.assert_close(fc2(torch.ones(2, 12, dtype=dtype)), inner + 100, **tolerance)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_traced_model_is_saved_and_follows_its_parameters(enabled, tmp_path):
    model = wrapped(r=2, groups=2)
    if not enabled:
        model.disable_adapter_layers()
    traced = torch.jit.trace(model, (X,))
    traced.save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(X[:2]), model(X[:2]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(traced(X), model(X))


def test_layers_that_share_a_weight_are_merged_each_with_its_own_adapter():
    net = nested()
    net[2][0].weight = net[0].weight
    model = wrapped(net, target_modules=["0"], shift=True)
    y, weight = model(X), net[0].base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    assert net[0].base_layer.weight is net[2][0].base_layer.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(model(X), y)
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert {t.dtype for name, t in base_state(model).items()} == {torch.bfloat16}
    assert net[2][0].base_layer.weight is weight


@pytest.mark.parametrize("bias", [True, False])
def test_merging_in_inference_mode_leaves_no_inference_tensors(bias):
    model = wrapped(nn.ModuleDict({"fc1": nn.Linear(6, 6, bias=bias)}), target_modules=["fc1"], shift=True)
    layer = layers(model)["base_model.model.fc1"]
    y = layer(X)
    with torch.inference_mode():
        model.add_weighted_adapter(["default"], [1], "sum")
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(layer(X), y)
        model.merge_adapter()
        plain = model.merge_and_unload()["fc1"]
    assert not any(t.is_inference() for t in [*model.parameters(), *plain.parameters()])
    plain.requires_grad_(True)(X).sum().backward()
    torch.testing.assert_close(plain(X), y)


def test_an_adapter_added_to_a_merged_layer_gets_no_shift_for_the_bias_of_the_merge(tmp_path):
    model = wrapped(shift=True)
    model.merge_adapter()
    model.add_adapter("with_bias", RLRRPeftConfig(target_modules=["fc1", "fc2"], init_weights=False))
    model.unmerge_adapter()
    model.set_adapter("with_bias")
    shifted = {name for name, layer in layers(model).items() if "with_bias" in layer.rlrr_shift}
    assert {name.rpartition(".")[2] for name in shifted} == {"fc1"}
    y = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["with_bias"])
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / "with_bias")(X), y)


def test_a_layer_on_the_meta_device_gives_shapes():
    assert wrapped(Net().to("meta"))(X.to("meta")).shape == (5, 3)


def test_layers_whose_names_end_in_numbers_are_named_with_the_word_before():
    names = {"blocks.0.mlp.0.2": "mlp.0.2", "a.1.attn.qkv": "attn.qkv", "stem.proj": "stem.proj", "2.0": "2.0"}
    assert {name: end_of_name(name) for name in names} == names
    with pytest.raises(ValueError, match=r"exclude_modules=\['1'\] leaves them alone"):
        wrapped(nested(), target_modules=["0", "1"], exclude_modules=["2.1"])


def test_all_linear_leaves_a_head_alone_whose_layer_is_named_as_another():
    model = nn.ModuleDict({"fc1": nn.Linear(6, 6), "head": nn.ModuleDict({"fc1": nn.Linear(6, 6)})})
    assert list(layers(wrapped(model, target_modules="all-linear"))) == ["base_model.model.fc1"]


def test_the_default_start_is_the_base_model_and_others_start_as_the_layers_of_this_package():
    torch.testing.assert_close(wrapped(init_weights=True)(X), Net()(X))
    torch.manual_seed(3)
    own = RLRRLinear.from_linear(nn.Linear(6, 12), rank=2, groups=3, init="paper")
    torch.manual_seed(3)
    layer = RLRRPeftLinear(nn.Linear(6, 12), "a", RLRRPeftConfig(r=2, groups=3, init_weights="paper").adaptation())
    assert {name: tensor.tolist() for name, tensor in layer.tensors("a").items()} == {
        name: getattr(own, name).tolist() for name in ("scale_row", "scale_col", "shift")
    }


def test_a_shift_is_trained_where_there_is_a_bias_unless_told_otherwise():
    def shifted(**config):
        return [name[-3:] for name, layer in layers(wrapped(**config)).items() if "default" in layer.rlrr_shift]

    assert shifted() == ["fc1", "fc1"]
    assert shifted(shift=True) == ["fc1", "fc2", "fc1", "fc2"]
    assert shifted(shift=False) == []


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"target_modules": ["fc1"]}, ["blocks.0.fc1", "blocks.1.fc1"]),
        ({"target_modules": r".*\.1\.fc[12]"}, ["blocks.1.fc1", "blocks.1.fc2"]),
        ({"target_modules": "all-linear"}, ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
        ({"exclude_modules": ["fc2"]}, ["blocks.0.fc1", "blocks.1.fc1"]),
        ({"exclude_modules": r".*blocks\.0.*"}, ["blocks.1.fc1", "blocks.1.fc2"]),
        ({"layers_to_transform": 1, "layers_pattern": "blocks"}, ["blocks.1.fc1", "blocks.1.fc2"]),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks"]}, ["blocks.0.fc1", "blocks.0.fc2"]),
    ],
)
def test_layers_are_named_as_for_lora(config, found):
    model = Net()
    if "layers_pattern" in config:  # PEFT before 0.21 knows no list of blocks at the top
        model = nn.Sequential(OrderedDict(body=model))
    names = layers(wrapped(model, **config))
    assert [name.removeprefix("base_model.model.").removeprefix("body.") for name in names] == found


def test_rank_and_groups_patterns():
    model = wrapped(r=2, rank_pattern={"fc2": 3}, groups=2, groups_pattern={r"blocks\.1\.fc1": 4})
    sizes = {name[-5:]: tuple(layer.rlrr_scale_col["default"].shape[:2]) for name, layer in layers(model).items()}
    assert sizes == {"0.fc1": (2, 2), "0.fc2": (2, 3), "1.fc1": (4, 2), "1.fc2": (2, 3)}


def test_several_active_adapters_are_summed_and_merged_in_any_number():
    model = wrapped(r=2, groups=2)
    model.add_adapter("other", RLRRPeftConfig(target_modules=["fc1"], groups=3, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = layers(model)["base_model.model.blocks.0.fc1"]
    weight = layer.base_layer.weight
    deltas = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    shift = sum(layer.rlrr_shift[name] for name in ("default", "other"))
    expected = torch.nn.functional.linear(X, weight + deltas, layer.base_layer.bias + shift)
    torch.testing.assert_close(layer(X), expected)
    y, before = model(X), base_state(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in base_state(model).items())


def test_adapters_are_added_set_deleted_and_disabled():
    model = wrapped()
    first = model(X)
    model.add_adapter("second", RLRRPeftConfig(target_modules=["fc1"], init_weights=False))
    assert torch.equal(model(X), first)
    model.set_adapter("second")
    second = model(X)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X))
    model.delete_adapter("default")
    assert torch.equal(model(X), second)
    assert all(list(layer.residual) in (["second"], []) for layer in layers(model).values())
    with pytest.raises(ValueError, match="default"):
        model.set_adapter("default")


def test_only_one_active_adapter_may_be_without_the_one():
    model = wrapped(residual=False)
    model.add_adapter("with", RLRRPeftConfig(target_modules=["fc1"], init_weights=False))
    model.base_model.set_adapter(["default", "with"])
    layer = layers(model)["base_model.model.blocks.0.fc1"]
    total = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("with")
    bias = layer.base_layer.bias + layer.rlrr_shift["default"] + layer.rlrr_shift["with"]
    torch.testing.assert_close(layer(X), torch.nn.functional.linear(X, total, bias))
    model.add_adapter("without", RLRRPeftConfig(target_modules=["fc1"], init_weights=False, residual=False))
    model.base_model.set_adapter(["default", "without"])
    with pytest.raises(ValueError, match="only one adapter with residual=False"):
        model(X)


def test_every_element_of_a_batch_under_its_own_adapter():
    model = wrapped()
    model.add_adapter("b", RLRRPeftConfig(target_modules=["fc1"], init_weights=False, r=4))
    model.eval()
    names = ["b", "__base__", "default", "b", "default"]
    y = model(X, adapter_names=names)
    with model.disable_adapter():
        plain = model(X)
    for name in ("default", "b"):
        model.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        torch.testing.assert_close(y[rows], model(X)[rows])
    torch.testing.assert_close(y[1], plain[1])
    with pytest.raises(ValueError, match=r"non-existing adapter.*: c"):
        model(X, adapter_names=["c"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(X, adapter_names=["b"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(X, adapter_names=names)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [True, "with_bias"])
def test_merge_and_unload_leaves_the_plain_model_and_unmerge_every_bit(dtype, shift):
    model = wrapped(Net(dtype), shift=shift, r=2)
    x = X.to(dtype)
    y, before = model(x), base_state(model)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in base_state(model).items())
    plain = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, RLRRPeftLinear) for m in plain.modules())
    torch.testing.assert_close(plain(x), y, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))
    missing = Net().load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert missing == (["blocks.0.fc2.bias", "blocks.1.fc2.bias"] if shift is True else [])


def test_unload_gives_the_base_model_back():
    model = wrapped()
    model(X)
    assert torch.equal(model.unload()(X), Net()(X))


def test_a_saved_module_of_several_layers_is_unloaded_with_what_it_learned():
    net = Net()
    net.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model = wrapped(net, modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"][0].weight.mul_(2)
    y = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), y)


def test_unmerging_after_the_model_was_cast():
    model = wrapped()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(
        layers(model)["base_model.model.blocks.0.fc1"].base_layer.weight, Net().double().blocks[0].fc1.weight
    )


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = wrapped()
    layers(model)["base_model.model.blocks.0.fc1"].rlrr_scale_row["default"].data[0] = torch.nan
    before = base_state(model)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_state(model).items())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    model = wrapped(r=2, groups=2, modules_to_save=["head"])
    model.base_model.model.head.modules_to_save.default.weight.data.add_(1)
    y = model(X)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(y, Net()(X))
    loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(X), y)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), RLRRPeftConfig)
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(loaded(X), y)


def test_the_card_says_what_to_import_once(tmp_path):
    model = wrapped()
    model.add_adapter("named", RLRRPeftConfig(target_modules=["fc1"]))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text().count(IMPORT) == 1


def test_a_readme_that_is_no_card_of_peft_s_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n\nIt uses PEFT.\n---\nlibrary_name: peft\n")
    before = (tmp_path / "README.md").read_bytes()
    RLRRPeftConfig().save_pretrained(str(tmp_path / "adapter"))
    RLRRPeftConfig().save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == before


def test_injected_without_a_peft_model_and_back_through_a_state_dict():
    config = {"target_modules": ["fc1", "fc2"], "init_weights": False}
    model = peft.inject_adapter_in_model(RLRRPeftConfig(**config), Net())
    state = peft.get_peft_model_state_dict(model)
    assert set(state) == {
        f"blocks.{i}.{name}"
        for i in (0, 1)
        for name in (
            "fc1.rlrr_shift",
            "fc1.rlrr_scale_row",
            "fc1.rlrr_scale_col",
            "fc2.rlrr_scale_row",
            "fc2.rlrr_scale_col",
        )
    }
    twin = Net()
    torch.manual_seed(5)
    twin = peft.inject_adapter_in_model(RLRRPeftConfig(**config), twin, state_dict=state)
    assert not torch.allclose(twin(X), model(X))
    peft.set_peft_model_state_dict(twin, state)
    assert torch.equal(twin(X), model(X))


def test_the_adapter_s_dtype_is_float32_over_a_16_bit_base_unless_told_otherwise():
    assert (
        layers(wrapped(Net(torch.bfloat16)))["base_model.model.blocks.0.fc1"].rlrr_shift["default"].dtype
        == torch.float32
    )
    model = get_peft_model(Net(torch.bfloat16), RLRRPeftConfig(target_modules=["fc1"]), autocast_adapter_dtype=False)
    layer = layers(model)["base_model.model.blocks.0.fc1"]
    assert layer.rlrr_scale_row["default"].dtype == torch.bfloat16
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert layer(X).dtype == torch.bfloat16  # the input is cast as for LoRA


def test_pickled_and_copied():
    model = wrapped()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))


# ---------------------------------------------------------------- PEFT's internals


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"rlrr_kernels\.peft needs the package peft: pip install"):
        runpy.run_path(rlrr_kernels.peft.__file__)


def test_the_enum_s_member_is_one_in_every_way():
    assert RLRR in PeftType
    assert "RLRR" in list(PeftType)
    assert PeftType("RLRR") is PeftType["RLRR"] is PeftType.RLRR is RLRR
    assert pickle.loads(pickle.dumps(RLRR)) is copy.deepcopy(RLRR) is RLRR
    assert (RLRR.name, RLRR.value, RLRR == "RLRR") == ("RLRR", "RLRR", True)
    assert add_member(PeftType, "RLRR") is RLRR


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an integer from 1 to 64; got 0"),
        ({"r": 65}, ValueError, "r must be an integer from 1 to 64; got 65"),
        ({"groups": 0}, ValueError, "groups must be at least 1; got 0"),
        ({"sides": "top"}, ValueError, "sides must be one of"),
        ({"sides": "left", "r": 2}, ValueError, "rank must be 1 for sides='left'"),
        ({"init_weights": "pissa"}, ValueError, "init_weights must be True, False or one of paper, identity, normal"),
        ({"shift": "yes"}, TypeError, "shift must be"),
        ({"rank_pattern": {"fc1": 99}}, ValueError, r"rank_pattern\['fc1'\] must be an integer from 1 to 64; got 99"),
        ({"groups_pattern": {"fc1": 0}}, ValueError, r"groups\['fc1'\] must be at least 1; got 0"),
        ({"target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform must be None"),
        ({"layers_pattern": "blocks"}, ValueError, "layers_pattern needs layers_to_transform"),
    ],
)
def test_a_configuration_that_is_not_allowed(config, error, message):
    with pytest.raises(error, match=message):
        RLRRPeftConfig(**config)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(1, 1, 1)
        self.other = nn.Linear(8, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["fc", "conv"]},
            "conv: Target module Conv2d is not supported: RLRR adapts torch.nn.Linear",
        ),
        (
            {"target_modules": ["fc", "out_proj"]},
            r"attn\.out_proj: nn\.MultiheadAttention takes its weight as an argument",
        ),
        ({"target_modules": "all-linear"}, r"exclude_modules=\['attn\.out_proj'\] leaves them alone"),
        ({"target_modules": ["fc", "other"], "groups": 4}, "other: groups must divide out_features = 6; got 4"),
        ({}, "specify `target_modules`"),
        ({"target_modules": ["none"]}, "not found in the base model"),
    ],
)
def test_a_layer_that_cannot_be_adapted_leaves_the_model_as_it_was(config, message):
    model = Attention()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RLRRPeftConfig(**config))
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_weight_that_requires_a_gradient_is_read_but_not_trained_in_silence():
    model = wrapped()
    layers(model)["base_model.model.blocks.0.fc1"].base_layer.weight.requires_grad_(True)
    with torch.no_grad():
        model(X)
    with pytest.raises(ValueError, match="weight must be frozen"):
        model(X)


def test_needs_no_timm():
    """The extra [peft] does not bring it."""
    code = "import sys; sys.modules['timm'] = None; import rlrr_kernels.peft"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
