"""``merge_adapter``: equal logits, plain modules, strict loading into plain timm, and what was gained is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlrr_kernels import NormRescale, RLRRConfig, RLRRLinear, adapt_model, is_adapted, merge_adapter
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from tests.support.tiny_models import SIZES, disturb, tiny_images, tiny_model

VITS = {
    "vit": {},
    "vit, dynamic size": {"dynamic_img_size": True},
    "vit, norm in the patch embedding": {"embed_norm_layer": nn.LayerNorm},
    "vit, register tokens": {"reg_tokens": 2, "no_embed_class": True},
    "vit, mean pooling": {"global_pool": "avg"},
    "vit, map pooling": {"global_pool": "map"},
    "dinov2": {},
    "deit": {},
}


def trained(family, dtype=torch.float32, overrides=None, **config):
    model = tiny_model(family, **(overrides or {})).to(dtype)
    adapt_model(model, RLRRConfig(scale_dtype=torch.float64 if dtype == torch.float64 else torch.float32, **config))
    disturb(model)
    return model


def assert_plain(model):
    assert not [n for n, m in model.named_modules() if isinstance(m, RLRRLinear | NormRescale | ChannelRescale)]
    assert not is_adapted(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VITS)
def test_a_vit_loads_strictly_into_plain_timm(variant, dtype):
    family, overrides = variant.partition(",")[0], VITS[variant]
    model = trained(family, dtype, overrides, recipe="paper")
    images = tiny_images(family, dtype)
    expected = model(images)
    report = merge_adapter(model)
    assert_plain(model)
    assert report.gained == ()
    torch.testing.assert_close(model(images), expected)
    plain = tiny_model(family, seed=1, **overrides).to(dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(plain(images), model(images))  # the library's products may go by where tensors lie
    assert [type(m).__name__ for m in plain.modules()] == [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("family", SIZES)
def test_logits_stay_equal(family):
    model = trained(family, torch.float64, rank=2, recipe="paper" if family not in ("convnext", "swinv2") else None)
    images = tiny_images(family, torch.float64)
    expected = model(images)
    report = merge_adapter(model)
    assert_plain(model)
    torch.testing.assert_close(model(images), expected)
    backbone = set(tiny_model(family).state_dict())
    assert set(report.gained) == set(model.state_dict()) - backbone
    assert backbone <= set(model.state_dict())
    assert all(name in str(report) for name in report.gained)


def test_a_layer_without_bias_gains_one_only_for_a_trained_shift():
    model = trained("swin", recipe="paper")
    assert merge_adapter(model).gained == ("layers.1.downsample.reduction.bias",)
    model = trained("swin", recipe="paper")
    with torch.no_grad():
        model.layers[1].downsample.reduction.shift.zero_()
    assert merge_adapter(model).gained == ()
    tiny_model("swin").load_state_dict(model.state_dict(), strict=True)
    assert merge_adapter(trained("swin", shift=False)).gained == ()


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2"])
def test_a_switched_qkv_goes_back_when_it_gained_nothing(family):
    images = tiny_images(family, torch.float64)
    for shift in (True, False):
        model = trained(family, torch.float64, shift=shift)
        expected = model(images)
        gained = merge_adapter(model).gained
        torch.testing.assert_close(model(images), expected)
        switches = {m.qkv_bias_separate for m in model.modules() if hasattr(m, "qkv_bias_separate")}
        assert switches == {shift}
        assert any("qkv" in name for name in gained) is shift
    tiny_model(family).load_state_dict(model.state_dict(), strict=True)


def test_norms_and_projections_gain_what_they_lacked():
    overrides = {"norm_layer": lambda size, **options: nn.LayerNorm(size, bias=False, **options), "pre_norm": True}
    model = trained("vit", torch.float64, overrides, recipe="paper")
    images = tiny_images("vit", torch.float64)
    expected = model(images)
    gained = merge_adapter(model).gained
    torch.testing.assert_close(model(images), expected)
    assert set(gained) == {"patch_embed.proj.bias", "norm.bias"} | {
        f"blocks.{i}.norm{j}.bias" for i in range(2) for j in (1, 2)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype):
    model = trained("vit", recipe="paper")
    model.to(dtype)
    wide = copy.deepcopy(model).double()
    layer, norm = model.blocks[0].attn.qkv, model.blocks[0].norm1
    exact_weight = wide.blocks[0].attn.qkv.merged_weight()
    exact_norm = wide.blocks[0].norm1.to_layer_norm()
    assert layer.weight.dtype == norm.weight.dtype == dtype
    merge_adapter(model)
    for value, exact in (
        (model.blocks[0].attn.qkv.weight, exact_weight),
        (model.blocks[0].norm1.weight, exact_norm.weight),
        (model.blocks[0].norm1.bias, exact_norm.bias),
    ):
        assert value.dtype == dtype
        spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
        assert ((value.double() - exact).abs() <= 0.501 * spacing).all()


def test_merged_models_are_frozen_but_for_the_head_and_adapt_again():
    model = trained("vit", recipe="paper")
    merge_adapter(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    report = adapt_model(model, RLRRConfig(recipe="paper"))
    assert len(report.layers) == 8


def test_a_layer_in_two_places_is_merged_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    adapt_model(model)
    disturb(model)
    x = torch.randn(2, 4)
    expected = model(x)
    merge_adapter(model)
    assert model[2] is model[0]
    torch.testing.assert_close(model(x), expected)


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_model("vit")
        adapt_model(model, RLRRConfig(recipe="paper"))
        merge_adapter(model)
    assert all(p.is_meta for p in model.parameters())
    assert set(model.state_dict()) == set(tiny_model("vit").state_dict())


def test_refuses_what_cannot_be_merged_and_changes_nothing():
    with pytest.raises(ValueError, match="is not adapted"):
        merge_adapter(tiny_model("vit"))
    model = trained("vit", recipe="paper")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.scale_row[3] = float("nan")
    with pytest.raises(ValueError, match=r"not finite cannot be merged: blocks\.1\.mlp\.fc1\.scale_row$"):
        merge_adapter(model)
    assert is_adapted(model)
