"""Convolutions in ``adapt_model``: ResNet, ConvNeXt and patch embeddings, from the report to the merged model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlrr_kernels import (
    RLRRConfig,
    RLRRConv2d,
    adapt_model,
    adapt_report,
    check_gradients,
    load_adapter,
    merge_adapter,
    parameter_groups,
    save_adapter,
)
from rlrr_kernels.ops.conv import CONV_LAYOUTS, matrix_shape
from tests.support.tiny_models import disturb, tiny_images, tiny_model

FAMILIES = ("resnet", "convnext", "vit")


def config_of(family: str, **options) -> RLRRConfig:
    convs = ("patch_embed.proj",) if family == "vit" else ("*",)
    recipe = "paper" if family == "vit" else None
    return RLRRConfig(convs=convs, recipe=recipe, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rank", "layout"), [(1, CONV_LAYOUTS[1]), (10, CONV_LAYOUTS[0])])
def test_trains_saves_loads_and_merges(family: str, rank: int, layout: str, tmp_path):
    model, images = tiny_model(family), tiny_images(family)
    report = adapt_model(model, config_of(family, rank=rank, conv_layout=layout))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, RLRRConv2d)}
    assert convs
    assert not any(type(module) is nn.Conv2d for module in model.modules())
    assert {layer.name for layer in report.layers} >= set(convs)
    for layer in report.layers:
        if layer.name in convs:
            conv = convs[layer.name]
            assert (layer.out_features, layer.in_features) == matrix_shape(conv.weight.shape, layout)
            assert layer.shift == (conv.bias is not None)
            rows, cols = layer.out_features, layer.in_features
            assert layer.trained == rank * (rows + cols) + (conv.out_channels if layer.shift else 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert report.trained == sum(p.numel() for p in trained) == sum(p.numel() for p in set(trained))

    model.eval()  # batch norm statistics stay
    nn.functional.cross_entropy(model(images), torch.arange(3)).backward()
    check_gradients(model)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, 1e-3, 0.1)}
    for conv in convs.values():
        assert {id(conv.scale_row), id(conv.scale_col)} <= groups["decay"]
        assert conv.shift is None or id(conv.shift) in groups["no_decay"]

    disturb(model)
    with torch.no_grad():
        expected = model.eval()(images)
        save_adapter(model, tmp_path / "adapter")
        fresh = tiny_model(family)
        assert load_adapter(fresh, tmp_path / "adapter") == adapt_report(model)
        torch.testing.assert_close(fresh(images), expected, rtol=0, atol=0)
        merged = merge_adapter(model)
        assert merged.gained == ()
        plain = tiny_model(family)
        plain.load_state_dict(model.state_dict())
        assert not any(isinstance(module, RLRRConv2d) for module in model.modules())
        torch.testing.assert_close(plain(images), expected, rtol=1e-3, atol=1e-4)


# The sum of R + C over the kernels, counted from timm's plain model: no convolution of a ResNet has a bias to shift.
@pytest.mark.parametrize(("layout", "count"), list(zip(CONV_LAYOUTS, (79_443, 64_597), strict=True)))
@pytest.mark.parametrize("rank", [1, 10])
def test_resnet_50_at_the_ranks_of_the_paper_s_appendix(layout: str, count: int, rank: int):
    timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=100)
    report = adapt_model(model, RLRRConfig(convs="*", rank=rank, conv_layout=layout))
    assert len(report.layers) == 53
    assert report.adapter == rank * count
    assert "layer3.*.conv2" in str(report)


def test_frozen_weights_of_another_checkpoint_are_noticed(tmp_path):
    model = tiny_model("resnet")
    adapt_model(model, config_of("resnet"))
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the frozen weights of .* layers differ"):
        load_adapter(tiny_model("resnet", seed=1), tmp_path / "adapter")


def test_frozen_batch_norm_keeps_its_statistics_while_convolutions_are_trained(tmp_path):
    pytest.importorskip("accelerate", reason="training needs accelerate")
    from rlrr_kernels.train.data.folders import ImageDataset, find_splits
    from rlrr_kernels.train.loop.fit import TrainConfig, fit
    from rlrr_kernels.train.models.backbones import create_model
    from tests.support.image_folders import make_splits

    splits = find_splits(make_splits(tmp_path / "images"), val_fraction=0.2, seed=0)
    model, preprocessing = create_model("test_resnet", 2, image_size=32, weights="none")
    adapt_model(model, RLRRConfig(convs="*"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    sets = [ImageDataset(splits[split], preprocessing.transform()) for split in ("train", "val")]
    config = TrainConfig(epochs=1, warmup_epochs=0, mixed_precision="no")
    fit(model, parameter_groups(model, 1e-2, 0.0), *sets, config, tmp_path, quiet=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_cannot_be_adapted_is_named():
    with pytest.raises(ValueError, match=r"the model has none beside its head; convs=\['\*'\] adapts its convolutions"):
        adapt_model(tiny_model("resnet"))
    with pytest.raises(ValueError, match=r"convs patterns match no nn\.Conv2d: stem9; these are conv1"):
        adapt_model(tiny_model("resnet"), RLRRConfig(convs=["stem9"]))
    model = tiny_model("resnet")
    from timm.layers import StdConv2d

    model.conv1 = StdConv2d(3, 8, 3)
    with pytest.raises(ValueError, match=r"only a plain floating-point nn\.Conv2d can be adapted; conv1 .* StdConv2d"):
        adapt_model(model, RLRRConfig(convs="*"))
    assert adapt_model(model, RLRRConfig(convs="*", exclude=["conv1"])).layers
    with pytest.raises(ValueError, match=r"conv_layout must be one of .*; got 'rows'"):
        RLRRConfig(conv_layout="rows")
