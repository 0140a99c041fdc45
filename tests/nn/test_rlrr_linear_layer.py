"""``RLRRLinear``: state dict, initialisation, merging."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from rlrr_kernels import NormRescale, RLRRConv2d, RLRRLinear
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.output_rescale import OutputRescale
from rlrr_kernels.reference import rescaled_weight_reference, rlrr_linear_reference


def trained(*args, **kwargs) -> RLRRLinear:
    """A layer whose shift is not zero."""
    layer = RLRRLinear(*args, **kwargs)
    if layer.shift is not None:
        nn.init.normal_(layer.shift)
    return layer


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (1, 3), (4, 3)])
def test_forward_is_the_formula(rank: int, groups: int, residual: bool):
    layer = trained(10, 12, rank=rank, groups=groups, residual=residual)
    x = torch.randn(2, 5, 10)
    expected = rlrr_linear_reference(
        x, layer.weight, layer.scale_row, layer.scale_col, layer.bias + layer.shift, residual=residual
    )
    torch.testing.assert_close(layer(x), expected)


def test_a_plain_checkpoint_loads_and_misses_only_the_trained_tensors():
    linear, layer = nn.Linear(10, 12), RLRRLinear(10, 12, groups=2)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["scale_col", "scale_row", "shift"], [])
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_what_is_frozen_and_what_is_trained(bias: bool, shift: bool):
    layer = RLRRLinear(10, 12, bias, groups=3, rank=2, shift=shift)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == ({"weight", "bias"} if bias else {"weight"})
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert shapes == {"scale_row": (12, 2), "scale_col": (3, 2, 10)} | ({"shift": (12,)} if shift else {})
    layer(torch.randn(4, 10)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in layer.parameters())


def test_from_linear_shares_the_tensors():
    linear = nn.Linear(10, 12, dtype=torch.bfloat16).eval()
    layer = RLRRLinear.from_linear(linear, groups=3)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.scale_row.dtype == layer.scale_col.dtype == layer.shift.dtype == torch.float32
    assert layer(torch.randn(3, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device():
    layer = RLRRLinear(10, 12, groups=3, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(4, 10, device="meta")).shape == (4, 12)
    assert RLRRLinear.from_linear(nn.Linear(10, 12, device="meta")).scale_row.is_meta
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real.scale_row.abs().max() <= math.sqrt(6)


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize(
    ("init", "residual", "rank", "spread"),
    [
        ("paper", True, 1, 2 / math.sqrt(768)),
        ("paper", True, 4, 2 / math.sqrt(768)),
        ("identity", True, 1, 0.0),
        ("normal", True, 1, 0.0004),
        ("normal", True, 4, 0.0008),
        ("paper", False, 1, 2 / math.sqrt(768)),
        ("identity", False, 1, 0.0),
        ("identity", False, 4, 0.0),
        ("normal", False, 1, 0.02 * math.sqrt(2)),
    ],
)
def test_the_documented_spread_of_the_factor(init: str, residual: bool, rank: int, spread: float):
    layer = RLRRLinear(768, 1536, rank=rank, groups=3, init=init, residual=residual)
    factor = rescaled_weight_reference(
        torch.ones(1536, 768), layer.scale_row, layer.scale_col, residual=residual
    ).double()
    assert factor.mean().item() == pytest.approx(1, abs=0.01)
    assert factor.std().item() == pytest.approx(spread, rel=0.06, abs=1e-9)
    assert layer.shift.abs().max() == 0


def test_paper_init_has_the_bounds_of_the_authors():
    layer = RLRRLinear(96, 5000, rank=3)
    for tensor, bound in ((layer.scale_col, math.sqrt(6 / 96)), (layer.scale_row, math.sqrt(6 / 3))):
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)


@pytest.mark.parametrize("init", ["paper", "identity", "normal"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_init_learns(init: str, residual: bool):
    layer = RLRRLinear(10, 12, init=init, residual=residual)
    layer(torch.randn(8, 10)).square().sum().backward()
    assert max(layer.scale_row.grad.abs().max(), layer.scale_col.grad.abs().max()) > 0


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("residual", [True, False])
def test_merged_weight_is_rounded_once(dtype: torch.dtype, residual: bool):
    layer = trained(70, 99, rank=2, groups=3, dtype=dtype, residual=residual)
    exact = rescaled_weight_reference(
        layer.weight.double(), layer.scale_row.double(), layer.scale_col.double(), residual=residual
    )
    merged = layer.merged_weight()
    assert merged.dtype == dtype
    if dtype.itemsize == 2:
        # All but the values that fp32 rounding moved across a rounding boundary are the nearest.
        assert (merged != exact.to(dtype)).double().mean() < 1e-3
    error = (merged.double() - exact).abs() / (layer.weight.double().abs() * 4).clamp_min(1e-30)
    assert error.max() <= torch.finfo(dtype).eps


def test_merge_and_unmerge():
    layer = trained(70, 99, rank=2, groups=3).eval()
    before = copy.deepcopy(layer.state_dict())
    weight, x = layer.weight, torch.randn(5, 70)
    y = layer(x)
    assert layer.merge() is layer
    assert layer.merged
    assert "merged" in repr(layer)
    torch.testing.assert_close(layer(x), y)
    assert layer.weight is weight
    for state in (layer.state_dict(), copy.deepcopy(layer).state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert all(torch.equal(value, before[name]) for name, value in torch.load(file).items())
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), y)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_merging_a_shared_weight_leaves_the_other_layer_alone():
    linear = nn.Linear(10, 12)
    first, second = (trained(10, 12, bias=False) for _ in range(2))
    first.weight = second.weight = linear.weight.requires_grad_(False)
    x = torch.randn(3, 10)
    y = second(x)
    first.merge()
    assert torch.equal(second(x), y)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_unmerge_where_division_would_fail(scale: float):
    layer = RLRRLinear(10, 12, residual=scale != 0)
    nn.init.constant_(layer.scale_row, scale)
    nn.init.constant_(layer.scale_col, 1.0)
    weight = layer.weight.clone()
    assert layer.merged_weight().abs().max() == 0
    assert torch.equal(layer.merge().unmerge().weight, weight)


def test_a_merged_layer_refuses_to_train_and_follows_its_tensors():
    layer = trained(10, 12).merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer(torch.randn(3, 10))
    layer.eval().double()
    x = torch.randn(3, 10, dtype=torch.float64)
    expected = copy.deepcopy(layer).unmerge()(x)
    torch.testing.assert_close(layer(x), expected)
    other = trained(10, 12).double()
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("name", ["weight", "bias", "scale_row", "scale_col", "shift"])
def test_a_merged_layer_follows_tensors_that_are_written_or_replaced(name: str):
    layer, x = trained(10, 12).eval().merge(), torch.randn(3, 10)
    before = layer(x)
    weight = layer._merged[0]
    assert torch.equal(layer(x), before)
    assert layer._merged[0] is weight, "merged once"
    for change in (
        lambda tensor: tensor.mul_(2.0),
        lambda tensor: setattr(layer, name, nn.Parameter(tensor * 3.0, requires_grad=tensor.requires_grad)),
    ):
        with torch.no_grad():
            change(getattr(layer, name))
        y = layer(x)
        assert not torch.allclose(y, before)
        torch.testing.assert_close(y, copy.deepcopy(layer).unmerge()(x))
        before = y
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer).merge()(x), before)
    if name in ("bias", "shift"):
        setattr(layer, name, None)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).unmerge()(x))
        assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("name", ["bias", "shift"])
def test_a_merged_layer_notices_a_tensor_that_is_gone(name: str):
    layer, x = trained(10, 12).eval().merge(), torch.randn(3, 10)
    before = layer(x)
    setattr(layer, name, None)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).unmerge()(x))


def copied(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer)


def loaded(layer: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_a_copy_of_a_merged_layer_does_not_take_the_writes_of_the_first_one_for_its_own():
    tensors = torch.randn(12, 10), torch.randn(12)  # never written, as files are read with assign=True
    linear = nn.Linear(10, 12, device="meta")
    linear.weight, linear.bias = map(nn.Parameter, tensors)
    layer, x = RLRRLinear.from_linear(linear).eval().merge(), torch.randn(3, 10)
    twin = copied(layer)
    names = ("weight", "bias", "scale_row", "scale_col", "shift")
    for name in names:
        for _ in range(getattr(layer, name)._version - getattr(twin, name)._version):
            with torch.no_grad():
                getattr(twin, name).add_(1.0)
    assert all(getattr(layer, name)._version == getattr(twin, name)._version for name in names)
    torch.testing.assert_close(twin(x), copied(twin).unmerge()(x))


def test_a_merged_layer_that_an_earlier_version_pickled_still_runs():
    layer, x = trained(10, 12).eval().merge(), torch.randn(3, 10)
    expected = layer(x)
    del layer._merged_from
    assert torch.equal(loaded(layer)(x), expected)


@pytest.mark.parametrize("merge_there", [True, False])
def test_what_is_merged_in_inference_mode_can_be_differentiated_in_its_input(merge_there: bool):
    layer, x = trained(10, 12).eval(), torch.randn(3, 10, requires_grad=True)
    if not merge_there:
        layer.merge()
        with torch.no_grad():
            layer.scale_row.mul_(2.0)
    with torch.inference_mode():
        (layer.merge() if merge_there else layer)(x)
    layer(x).sum().backward()
    expected = torch.autograd.grad(copied(layer).unmerge()(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_transforms_of_a_merged_layer_see_the_tensors_that_they_give_it():
    layer, x = trained(10, 12).eval().merge(), torch.randn(3, 10)
    before, unmerged = layer(x), copied(layer).unmerge()
    scales = {"scale_row": torch.stack([layer.scale_row.detach(), -layer.scale_row.detach()])}

    def call(module: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, given, (x,))

    expected = torch.stack([call(unmerged, {"scale_row": row}) for row in scales["scale_row"]])
    torch.testing.assert_close(torch.func.vmap(lambda given: call(layer, given))(scales), expected)
    one = {"scale_row": layer.scale_row.detach().clone()}
    gradients = [torch.func.grad(lambda given, of=of: call(of, given).sum())(one) for of in (layer, unmerged)]
    torch.testing.assert_close(*gradients)
    assert gradients[0]["scale_row"].any()
    torch.testing.assert_close(loaded(layer)(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_merged_layer_whose_scales_were_written_is_of_what_they_are_now():
    layer, x = trained(10, 12).eval().merge(), torch.randn(3, 10)
    with torch.no_grad():
        layer.scale_row.mul_(3.0)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), copied(layer).unmerge()(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (RLRRLinear(10, 12), (3, 10)),
        (RLRRConv2d(3, 8, 2), (1, 3, 4, 4)),
        (NormRescale(nn.LayerNorm(10)), (3, 10)),
        (OutputRescale(nn.Linear(10, 12)), (3, 10)),
        (ChannelRescale(10), (3, 10)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_input_goes_by_the_name_that_torch_nn_has_for_it(layer: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape)
    assert torch.equal(layer(input=x), layer(x))


def test_a_merged_layer_takes_the_dtypes_that_it_took_before():
    layer = trained(10, 12).eval()
    x = torch.randn(3, 10)
    for dtype in (torch.float32, torch.bfloat16):
        expected = layer(x.to(dtype))
        merged = copy.deepcopy(layer).merge()(x.to(dtype))
        assert merged.dtype == dtype
        torch.testing.assert_close(merged, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.merge()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear(bias: bool):
    layer = trained(70, 99, bias, groups=3).eval()
    linear = layer.to_linear()
    x = torch.randn(5, 70)
    assert type(linear) is nn.Linear
    assert linear.bias is not None
    assert not linear.training
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    assert RLRRLinear(70, 99, bias=False, shift=False).to_linear().bias is None
    own_bias = RLRRLinear(70, 99, shift=False)
    assert own_bias.to_linear().bias.data_ptr() != own_bias.bias.data_ptr()


def test_merge_error_is_a_rounding_error():
    x = torch.randn(64, 256)
    assert trained(256, 256).merge_error(x) <= 1e-6
    for dtype in (torch.bfloat16, torch.float32):
        assert trained(256, 256, dtype=dtype).merge_error(x.bfloat16()) <= torch.finfo(torch.bfloat16).eps
    broken = trained(256, 256)
    broken.merged_weight = lambda: broken.weight.detach().clone()
    assert broken.merge_error(x) > 1e-3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be from 1 to 64; got 0"),
        ({"rank": 65}, "rank must be from 1 to 64; got 65"),
        ({"groups": 5}, "groups must divide out_features = 12; got 5"),
        ({"groups": 0}, "groups must divide out_features = 12; got 0"),
        ({"init": "xavier"}, "init must be one of paper, identity, normal; got 'xavier'"),
    ],
)
def test_bad_input(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RLRRLinear(10, 12, **arguments)


def test_from_linear_refuses_other_layers():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear; got Conv2d"):
        RLRRLinear.from_linear(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match=r"scale_dtype must be a floating-point dtype; got torch\.int32"):
        RLRRLinear(10, 12, scale_dtype=torch.int32)
