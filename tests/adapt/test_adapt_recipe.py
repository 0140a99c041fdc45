"""``recipe="paper"``: the authors' parameter counts, what surrounds the layers, and how it starts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlrr_kernels import NormRescale, RLRRConfig, adapt_model, check_gradients
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from tests.support.tiny_models import backward, tiny_images, tiny_model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_base_patch16_224", 288_768),
        ("vit_large_patch16_224", 765_952),
        ("vit_huge_patch14_224", 1_274_880),
        ("swin_base_patch4_window7_224", 358_144),
    ],
)
def test_trains_as_many_parameters_as_the_authors_models(name, count):
    timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert adapt_model(model, RLRRConfig(recipe="paper")).adapter == count


def test_vit_keeps_q_k_and_v_apart_and_rescales_norms_and_tokens():
    model = tiny_model("vit")
    report = adapt_model(model, RLRRConfig(recipe="paper"))
    assert {layer.groups for layer in report.layers if layer.name.endswith("qkv")} == {3}
    assert {layer.groups for layer in report.layers if not layer.name.endswith("qkv")} == {1}
    assert report.norms == ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")
    assert report.tokens == "patch_embed.norm"
    assert isinstance(model.patch_embed.norm, ChannelRescale)


def test_swin_has_one_group_and_adapts_the_reduction():
    report = adapt_model(tiny_model("swin"), RLRRConfig(recipe="paper"))
    assert {layer.groups for layer in report.layers} == {1}
    assert "layers.1.downsample.reduction" in [layer.name for layer in report.layers]
    assert report.tokens is None
    assert all(name == "norm" or ".blocks." in name for name in report.norms)


@pytest.mark.parametrize("family", ["vit", "dinov2", "deit", "swin", "beit", "eva02"])
def test_every_parameter_takes_part_and_the_head_starts_at_zero(family):
    model, images = tiny_model(family), tiny_images(family)
    report = adapt_model(model, RLRRConfig(recipe="paper"))
    assert not model(images).any()
    heads = [model.get_submodule(name) for name in report.heads]
    assert heads
    assert not any(p.any() for head in heads for p in head.parameters())
    backward(model, images)
    check_gradients(model)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
def test_identity_init_gives_the_backbone_s_features(family):
    model, images = tiny_model(family), tiny_images(family)
    with torch.no_grad():
        expected = model.forward_features(images)
        adapt_model(model, RLRRConfig(recipe="paper", init="identity"))
        torch.testing.assert_close(model.forward_features(images), expected)


def test_tokens_are_rescaled_before_class_token_and_position():
    model, images = tiny_model("vit"), tiny_images("vit")
    with torch.no_grad():
        plain = model._pos_embed(model.patch_embed(images))
        patches = model.patch_embed(images)
        adapt_model(model, RLRRConfig(recipe="paper", init="identity"))
        model.patch_embed.norm.scale.fill_(2.0)
        rescaled = model._pos_embed(model.patch_embed(images))
    expected = plain.clone()
    expected[:, 1:] += patches
    torch.testing.assert_close(rescaled, expected)


def test_given_groups_and_layers_win_over_the_recipe():
    report = adapt_model(tiny_model("vit"), RLRRConfig(recipe="paper", groups=1, include=["qkv"], heads=()))
    assert {layer.name for layer in report.layers} == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    assert {layer.groups for layer in report.layers} == {1}
    assert report.heads == ()
    assert report.norms


@pytest.mark.parametrize("overrides", [{"dynamic_img_size": True}, {"embed_norm_layer": nn.LayerNorm}])
def test_variants_of_the_patch_embedding(overrides):
    model, images = tiny_model("vit", **overrides), tiny_images("vit")
    with torch.no_grad():
        expected = model.forward_features(images)
        adapt_model(model, RLRRConfig(recipe="paper", init="identity"))
        torch.testing.assert_close(model.forward_features(images), expected)
    kind = NormRescale if "embed_norm_layer" in overrides else ChannelRescale
    assert isinstance(model.patch_embed.norm, kind)


def test_refuses_models_the_paper_says_nothing_about():
    with pytest.raises(ValueError, match=r"recipe='paper' is defined for timm's VisionTransformer.*; got ConvNeXt"):
        adapt_model(tiny_model("convnext"), RLRRConfig(recipe="paper"))
    from timm.layers import RmsNorm

    with pytest.raises(ValueError, match=r"puts scale and shift on LayerNorms; blocks\.0\.norm1 is RmsNorm"):
        adapt_model(tiny_model("vit", norm_layer=RmsNorm), RLRRConfig(recipe="paper"))
