"""RLRR's ablations: one side, no residual, ΔW without ⊙ W; on layers, models, files and merging."""

import copy
import json

import pytest
import torch
from torch import nn

from rlrr_kernels import (
    AdditiveLinear,
    RLRRConfig,
    RLRRConv2d,
    RLRRLinear,
    adapt_model,
    adapter_info,
    load_adapter,
    merge_adapter,
    parameter_groups,
    save_adapter,
)

SIDES = ("both", "left", "right")


def dense(layer: nn.Module) -> torch.Tensor:
    """W' of a linear layer by the formula, differentiable in what is trained."""
    rows, cols, groups = layer.out_features, layer.in_features, layer.groups
    dtype = layer.weight.dtype
    scale_row = torch.ones(rows, 1, dtype=dtype) if layer.scale_row is None else layer.scale_row
    scale_col = torch.ones(1, 1, cols, dtype=dtype) if layer.scale_col is None else layer.scale_col
    groups = scale_col.shape[0]
    product = torch.cat(
        [scale_row[i * rows // groups : (i + 1) * rows // groups] @ scale_col[i] for i in range(groups)]
    )
    if isinstance(layer, AdditiveLinear):
        return layer.weight + product
    return layer.weight * (product + float(layer.residual))


def make(form: str, sides: str, residual: bool = True, **options) -> nn.Module:
    linear = nn.Linear(10, 12, dtype=torch.float64)
    options |= {"sides": sides, "scale_dtype": torch.float64}
    if form == "additive":
        return AdditiveLinear(linear, **options)
    return RLRRLinear.from_linear(linear, residual=residual, **options)


VARIANTS = [("rescaled", sides, residual) for sides in SIDES for residual in (True, False)]
VARIANTS += [("additive", sides, True) for sides in SIDES]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("form", "sides", "residual"), VARIANTS)
def test_forward_gradients_and_merging_are_the_formula(form, sides, residual, groups):
    layer = make(form, sides, residual, groups=groups)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == {"shift"} | {"both": {"scale_row", "scale_col"}, "left": {"scale_row"}}.get(
        sides, {"scale_col"}
    )
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, dense(layer), layer.bias + layer.shift)
    torch.testing.assert_close(y, expected)
    leaves, grad = [x, *trained.values()], torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for name, a, b in zip(["x", *trained], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(layer.merged_weight(), dense(layer).detach())
    torch.testing.assert_close(layer.to_linear()(x), y)
    layer.eval().merge()
    torch.testing.assert_close(layer(x), y)
    assert torch.equal(layer.unmerge()(x), y)


@pytest.mark.parametrize("rank", [1, 4])
def test_additive_rank_and_dtypes(rank):
    linear = nn.Linear(10, 12)
    layer = AdditiveLinear(linear, rank=rank, groups=2)
    assert layer.weight is linear.weight
    x = torch.randn(7, 10)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    meta = AdditiveLinear(nn.Linear(10, 12, device="meta"), rank=rank)
    assert meta(torch.empty(3, 10, device="meta")).shape == (3, 12)


def test_additive_keeps_nothing_of_the_size_of_the_weight():
    layer, kept = AdditiveLinear(nn.Linear(64, 96), rank=2), []
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(4, 64, requires_grad=True)).sum()
    assert max(kept) < 64 * 96


@pytest.mark.parametrize("sides", ["left", "right"])
def test_one_side_of_a_convolution(sides):
    layer = RLRRConv2d(3, 4, 3, sides=sides, dtype=torch.float64, scale_dtype=torch.float64)
    scale = layer.scale_row if sides == "left" else layer.scale_col
    assert (layer.scale_row is None, layer.scale_col is None) == (sides == "right", sides == "left")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    weight = layer.weight * (1 + (scale.view(4, 1, 1, 1) if sides == "left" else scale.view(1, 3, 3, 3)))
    expected = nn.functional.conv2d(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    (ours,) = torch.autograd.grad(layer(x).square().sum(), [scale])
    (theirs,) = torch.autograd.grad(expected.square().sum(), [scale])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.to_conv()(x), expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("init", "spread"), [("paper", (2 / 300) ** 0.5), ("identity", 0.0), ("normal", 0.02)])
@pytest.mark.parametrize("sides", ["left", "right"])
def test_one_side_starts_at_the_backbone_with_the_documented_spread(sides, init, spread, residual):
    layer = RLRRLinear(300, 400, sides=sides, init=init, residual=residual)
    factor = (layer.merged_weight() / layer.weight).detach()
    assert factor.mean().item() == pytest.approx(1, abs=0.02)
    assert factor.std().item() == pytest.approx(spread, rel=0.15, abs=1e-6)
    layer(torch.randn(5, 300)).square().sum().backward()
    scale = layer.scale_row if sides == "left" else layer.scale_col
    assert scale.grad.abs().min() > 0


@pytest.mark.parametrize("sides", SIDES)
def test_additive_starts_as_far_from_the_weight_as_rlrr(sides):
    linear = nn.Linear(300, 400)
    size = linear.weight.std().item()
    additive = AdditiveLinear(copy.deepcopy(linear), sides=sides)
    difference = (additive.merged_weight() - linear.weight).std().item() / size
    rescaled = RLRRLinear.from_linear(linear, sides=sides)
    factor = (rescaled.merged_weight() / linear.weight).std().item()
    assert difference == pytest.approx(factor, rel=0.15)
    same = AdditiveLinear(copy.deepcopy(linear), sides=sides, init="identity")
    assert torch.equal(same.merged_weight(), linear.weight)


COUNTS = {  # a ViT of depth 2 and width 48; rows and columns of a block's four layers, qkv's columns three times
    "rows": 2 * (144 + 48 + 192 + 48),
    "cols": 2 * (3 * 48 + 48 + 48 + 192),
    "ssf": 2 * 48 * (2 * 2 + 1 + 1),
}


@pytest.mark.parametrize(("form", "sides", "residual"), VARIANTS)
def test_adapted_counted_saved_loaded_and_merged(form, sides, residual, tmp_path):
    from tests.support.tiny_models import backward, disturb, tiny_images, tiny_model

    config = RLRRConfig(recipe="paper", sides=sides, residual=residual, form=form)
    model, images = tiny_model("vit"), tiny_images("vit")
    report = adapt_model(model, config)
    scales = (COUNTS["rows"] if sides != "right" else 0) + (COUNTS["cols"] if sides != "left" else 0)
    assert report.adapter == scales + COUNTS["rows"] + COUNTS["ssf"]
    assert sum(layer.trained for layer in report.layers) == scales + COUNTS["rows"]
    assert f"W' = {config.formula}" in str(report)
    disturb(model)
    backward(model, images)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for p in parameter_groups(model, 1e-3, 0.1)[0]["params"]}
    qkv = model.blocks[0].attn.qkv
    assert all(id(p) in decayed for p in (qkv.scale_row, qkv.scale_col) if p is not None)

    model.eval()
    save_adapter(model, tmp_path)
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path)
    assert type(fresh.blocks[0].attn.qkv) is (AdditiveLinear if form == "additive" else RLRRLinear)
    assert torch.equal(fresh(images), model(images))
    assert adapter_info(tmp_path).config == config
    before = model(images).detach()
    merge_adapter(model)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    tiny_model("vit").load_state_dict(model.state_dict())
    other = tiny_model("vit")
    adapt_model(other, RLRRConfig(recipe="paper", sides="left" if sides == "right" else "right"))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(other, tmp_path)


def test_adapters_from_before_the_switches_load(tmp_path):
    from tests.support.tiny_models import tiny_images, tiny_model

    model, images = tiny_model("vit"), tiny_images("vit")
    adapt_model(model, RLRRConfig())
    save_adapter(model, tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    for name in ("sides", "form"):
        del document["adaptation"][name]
    del document["digest"], document["tensor_digests"]
    path.write_text(json.dumps(document))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter.safetensors")
    save_file(tensors, tmp_path / "adapter.safetensors", {"rlrr_config": json.dumps(document)})
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), model.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sides": "top"}, "sides must be one of both, left, right; got 'top'"),
        ({"sides": "left", "rank": 2}, "rank must be 1 for sides='left'"),
        ({"form": "sum"}, "form must be one of rescaled, additive; got 'sum'"),
        ({"form": "additive", "residual": False}, "residual must be True for form='additive'"),
        ({"form": "additive", "convs": ("stem",)}, "convs must be empty for form='additive'"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RLRRConfig(**arguments)
    if "sides" in arguments:
        with pytest.raises(ValueError, match=message):
            RLRRLinear(4, 4, **arguments)


def test_additive_refuses_other_layers_and_groups():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear; got Conv2d"):
        AdditiveLinear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="groups must divide out_features = 4; got 3"):
        AdditiveLinear(nn.Linear(4, 4), groups=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.to_sparse, r"a dense tensor; got layout torch\.sparse_coo"),
        (torch.Tensor.long, r"float32, float16, bfloat16 or float64; got torch\.int64"),
        (torch.Tensor.numpy, "a Tensor; got ndarray"),
    ],
)
@pytest.mark.parametrize("kind", [RLRRLinear.from_linear, AdditiveLinear])
def test_both_forms_refuse_the_same_inputs_by_name(kind, change, message):
    with pytest.raises(TypeError, match=f"^x must be {message}"):
        kind(nn.Linear(4, 6))(change(torch.ones(2, 4)))


@pytest.mark.parametrize("sides", ["left", "right"])
def test_one_side_compiles(sides):
    layer, x = RLRRLinear(10, 12, sides=sides), torch.randn(3, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
