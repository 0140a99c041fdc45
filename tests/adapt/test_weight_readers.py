"""Code that reads the weight of an adapted layer, or whose weight is no plain tensor: right, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

from rlrr_kernels import (
    AdditiveLinear,
    NormRescale,
    RLRRConfig,
    RLRRConv2d,
    RLRRLinear,
    adapt_model,
    is_adapted,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from rlrr_kernels.adapt.modules import replace_submodules
from rlrr_kernels.nn.output_rescale import OutputRescale
from tests.support.tiny_models import disturb, tiny_images, tiny_model

# ---------------------------------------------------------------- layers that are adapted


class Quantised(nn.Linear):
    """As bitsandbytes has it: a weight of bytes and a forward of its own."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x


class Codes(torch.Tensor):
    """As torchao has it: a class of tensors inside a plain nn.Linear."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0])
        raise NotImplementedError(function)


def torchao_like():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(Codes(torch.zeros(4, 4)), requires_grad=False)
    return linear


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


def pruned_bias():
    return prune.l1_unstructured(nn.Linear(4, 4), "bias", amount=0.5)


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def integers():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


STRANGE = {
    "parametrized": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), r"its weight is computed.*remove_param"),
    "weight-normed": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), r"its weight is computed"),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), r"its weight is computed"),
    "old spectral": (
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        r"its weight is computed from weight_orig",
    ),
    "pruned": (
        pruned,
        r"its weight is computed from weight_orig, weight_mask: .* prune\.remove",
    ),
    "pruned bias": (pruned_bias, r"its bias is computed from bias_orig, bias_mask"),
    "quantised": (Quantised, r"Quantised has a forward of its own"),
    "torchao": (torchao_like, r"its weight is a Codes of torch\.float32, not a plain floating-point tensor"),
    "integers": (
        integers,
        r"its weight is a Parameter of torch\.int8",
    ),
    "lazy": (lambda: nn.LazyLinear(4), r"its weight is a UninitializedParameter of"),
    "patched": (patched, r"its forward was replaced on the module itself.*remove_hook_from_submodules"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_layers_that_are_no_plain_ones_are_refused_with_the_reason(kind):
    make, message = STRANGE[kind]
    for adapt in (RLRRLinear.from_linear, AdditiveLinear):
        linear = make()
        before = {name: p.requires_grad for name, p in linear.named_parameters()}
        with pytest.raises(TypeError, match=rf"linear must be a plain nn\.Linear, but {message}"):
            adapt(linear)
        assert {name: p.requires_grad for name, p in linear.named_parameters()} == before
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"only a plain .*; 1 are of type .*{message}.*exclude=\['1'\]"):
        adapt_model(model)
    assert not is_adapted(model)
    assert not any(isinstance(module, RLRRLinear) for module in model.modules())
    if kind != "lazy":  # nothing can be frozen that is not there yet
        assert len(adapt_model(model, RLRRConfig(exclude=["1"])).layers) == 2


def test_made_plain_they_are_adapted():
    for layer, undo in (
        (pruned(), lambda layer: prune.remove(layer, "weight")),
        (
            parametrizations.weight_norm(nn.Linear(4, 4)),
            lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        ),
    ):
        x = torch.randn(3, 4)
        expected = layer(x)
        undo(layer)
        torch.testing.assert_close(RLRRLinear.from_linear(layer, init="identity")(x), expected)


def test_convolutions_and_norms_too():
    with pytest.raises(TypeError, match=r"conv must be a plain nn\.Conv2d, but its weight is computed"):
        RLRRConv2d.from_conv(parametrizations.weight_norm(nn.Conv2d(1, 1, 1)))
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d; got Linear"):
        RLRRConv2d.from_conv(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="norm must have a weight and bias of its own"):
        NormRescale(prune.random_unstructured(nn.LayerNorm(4), "weight", amount=0.5))


def test_parametrizing_and_pruning_an_adapted_layer_is_seen_in_the_forward_and_the_merge():
    layer, x = RLRRLinear(4, 4), torch.randn(3, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    masked = layer.weight.detach() * (1 + layer.scale_row @ layer.scale_col[0])
    assert (layer.weight_mask == 0).sum() == 8
    torch.testing.assert_close(layer(x), x @ masked.t() + layer.bias + layer.shift)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


# ---------------------------------------------------------------- what reads an adapted layer's weight later


def fusing_model(family: str) -> tuple[nn.Module, torch.Tensor]:
    """A block of timm's that computes new weights from its layers', and what it takes."""
    pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    from timm.models import byobnet, fastvit, levit, repvit

    torch.manual_seed(0)
    images = torch.randn(2, 4, 6, 6)
    block, x = {
        "levit": lambda: (levit.LinearNorm(4, 4), torch.randn(2, 5, 4)),
        "levit convolution": lambda: (levit.ConvNorm(4, 4, 3, padding=1), images),
        "repvit": lambda: (repvit.RepVggDw(4, 3), images),
        "mobileone": lambda: (byobnet.MobileOneBlock(4, 4, 3), images),
        "fastvit": lambda: (fastvit.RepMixer(4, layer_scale_init_value=None), images),
    }[family]()
    model = nn.Sequential(block, nn.Identity()).eval()
    for module in model.modules():  # as training leaves them: fresh ones are near the identity
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model, x


def reparameterized(model: nn.Module) -> nn.Module:
    from timm.utils import reparameterize_model

    return reparameterize_model(model)


@pytest.mark.parametrize("family", ["levit", "levit convolution", "repvit", "mobileone", "fastvit"])
def test_reparameterize_model_never_loses_the_adapter(family):
    model, x = fusing_model(family)
    with torch.no_grad():
        plain = reparameterized(model)(x)
        adapt_model(model, RLRRConfig(convs=() if family == "levit" else "*", shift="with_bias"))
        disturb(model)
        expected = model(x)
        assert (expected - plain).abs().max() > 1e-2
        message = r"0\S*\.\w+\(\) would read the frozen weights and lose the adapter; merge_adapter\(model\) first"
        for twin in (model, copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match=message):
                reparameterized(twin)
        assert torch.equal(model(x), expected)
        assert merge_adapter(model).gained == ()
        torch.testing.assert_close(model(x), expected)
        fused = reparameterized(model)
        assert sum(1 for _ in fused.modules()) < sum(1 for _ in model.modules())
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


def test_a_gained_bias_that_fusing_would_lose_is_refused():
    model, x = fusing_model("levit")
    adapt_model(model)
    disturb(model)
    expected = model(x)
    report = merge_adapter(model)
    assert report.gained == ("0.linear.bias",)
    assert "RLRRConfig(shift='with_bias') trains no shift where a layer has no bias" in str(report)
    torch.testing.assert_close(model(x), expected)
    message = r"0\.fuse\(\) would lose the bias that 0\.linear has gained from a trained shift"
    with pytest.raises(RuntimeError, match=message):
        reparameterized(model)
    adapt_model(model)  # merged models adapt again
    merge_adapter(model)
    with pytest.raises(RuntimeError, match=message):
        reparameterized(model)


def test_scales_and_shifts_of_ssf_are_not_lost_either():
    model, x = fusing_model("mobileone")
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    replace_submodules(model, [name], lambda _, conv: OutputRescale(conv))
    expected = model(x)
    with pytest.raises(RuntimeError, match="would read the frozen weights and lose the adapter"):
        reparameterized(model)
    replace_submodules(model, [name], lambda _, rescaled: rescaled.fold())
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(RuntimeError, match="would lose the bias"):  # SSF's fold always has one
        reparameterized(model)


@pytest.mark.parametrize("kind", [RLRRLinear.from_linear, AdditiveLinear])
def test_another_class_called_linear_is_refused_by_its_full_name(kind):
    other = type("Linear", (nn.Module,), {"__module__": "quantized.dynamic"})  # as torch.ao's is called
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear; got quantized\.dynamic\.Linear$"):
        kind(other())


@pytest.mark.parametrize("shift", [True, False])
def test_fusing_with_a_batch_norm_is_refused_before_the_merge_and_right_after(shift):
    linear, x = RLRRLinear(4, 6, shift=shift).eval(), torch.randn(3, 4)
    conv, images = RLRRConv2d(3, 6, 3, shift=shift).eval(), torch.randn(2, 3, 5, 5)
    disturb(nn.ModuleList([linear, conv]))
    flat, square = nn.BatchNorm1d(6).eval(), nn.BatchNorm2d(6).eval()
    for norm in (flat, square):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    for layer, fuse, norm in (
        (linear, fusion.fuse_linear_bn_eval, flat),
        (conv, fusion.fuse_conv_bn_eval, square),
    ):
        with pytest.raises(TypeError, match="cannot be fused with a batch norm before it is merged"):
            fuse(layer, norm)
    torch.testing.assert_close(fusion.fuse_linear_bn_eval(linear.to_linear(), flat)(x), flat(linear(x)))
    torch.testing.assert_close(fusion.fuse_conv_bn_eval(conv.to_conv(), square)(images), square(conv(images)))


def test_shift_with_bias_leaves_layers_without_one_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    report = adapt_model(model, RLRRConfig(shift="with_bias"))
    assert [layer.shift for layer in report.layers] == [False, True]
    disturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    assert merge_adapter(model).gained == ()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("family", ["swin", "eva02", "beit"])
def test_shift_with_bias_merges_into_what_plain_timm_loads(family, tmp_path):
    model, images = tiny_model(family), tiny_images(family)
    adapt_model(model, RLRRConfig(recipe="paper", shift="with_bias"))
    disturb(model)
    expected = model(images)
    save_adapter(model, tmp_path)
    load_adapter(fresh := tiny_model(family), tmp_path)
    assert torch.equal(fresh(images), expected)
    assert merge_adapter(model).gained == ()
    plain = tiny_model(family, seed=1)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=1e-3, atol=1e-4)
