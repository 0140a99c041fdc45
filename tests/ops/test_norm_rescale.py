"""``norm_rescale`` and its modules: the formula, gradients, dtypes, autocast, folding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlrr_kernels import NormRescale, backends, norm_rescale, use_backend
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.numerics import RATIO, SEEDS, relative_error
from rlrr_kernels.reference import norm_rescale_reference

pytestmark = pytest.mark.interpreted

D = 48


@pytest.fixture(autouse=True)
def backend(poisoned_memory):
    """Triton's kernels in a process with its interpreter on, plain torch in all others."""
    with use_backend("triton" if backends.INTERPRETING else "torch"):
        yield


HALF = (torch.float16, torch.bfloat16)


def arguments(dtype=torch.float32, scale_dtype=torch.float32, generator=None, rows=35):
    x = torch.randn(rows // 5, 5, D, generator=generator, dtype=torch.float64).to(dtype)
    weight, bias = (torch.randn(D, generator=generator).to(dtype) for _ in range(2))
    scale = (1 + 0.1 * torch.randn(D, generator=generator)).to(scale_dtype)
    shift = torch.randn(D, generator=generator).to(scale_dtype)
    return x, weight, bias, scale, shift


def test_equals_the_formula_with_gradients():
    x, weight, bias, scale, shift = arguments(torch.float64, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift)]
    upstream = torch.randn_like(x)
    results = []
    for function in (norm_rescale_reference, norm_rescale):
        y = function(x, weight, bias, scale, shift, 1e-3)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strided", range(5))
def test_takes_tensors_of_any_strides(strided: int):
    given = list(arguments())
    apart = torch.stack([given[strided], given[strided]], -1)[..., 0]
    assert not apart.is_contiguous()
    results = []
    for tensors in (given, [*given[:strided], apart, *given[strided + 1 :]]):
        leaves = [tensors[i].detach().requires_grad_() for i in (0, 3, 4)]
        y = norm_rescale(leaves[0], *tensors[1:3], *leaves[1:], 1e-6)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        pytest.param(dtype, rows, marks=[pytest.mark.slow_interpreted] if rows > 35 else [])
        for dtype in (torch.float32, *HALF)
        for rows in (35, 400 if backends.INTERPRETING else 3000)
    ],
)
def test_is_no_less_exact_than_the_eager_norm_rescale_reference(dtype, rows):
    ours, eager = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        x, weight, bias, scale, shift = arguments(dtype, dtype, generator, rows)
        upstream = torch.randn(x.shape, generator=generator).to(dtype)
        results = []
        for function, compute in (
            (norm_rescale_reference, torch.float64),
            (norm_rescale_reference, dtype),
            (norm_rescale, dtype),
        ):
            leaves = [tensor.to(compute).detach().requires_grad_() for tensor in (x, scale, shift)]
            y = function(leaves[0], weight.to(compute), bias.to(compute), *leaves[1:])
            y.backward(upstream.to(compute))
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        exact, plain, mine = results
        for errors, values in ((eager, plain), (ours, mine)):
            errors.append([relative_error(value, e) for value, e in zip(values, exact, strict=True)])
    ours, eager = (torch.tensor(errors).square().mean(0).sqrt() for errors in (ours, eager))
    assert (ours <= RATIO * eager).all(), f"y, dx, dscale, dshift: {ours.tolist()} against {eager.tolist()}"


@pytest.mark.parametrize("affine", [True, False])
def test_gives_the_gradients_that_are_asked_for(affine):
    x, weight, bias, scale, shift = arguments(torch.float64, torch.float64)
    weight, bias = (weight, bias) if affine else (None, None)
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift)]
    expected = torch.autograd.grad(norm_rescale_reference(x, weight, bias, scale, shift).square().sum(), leaves)
    for asked in range(1, 8):
        wanted = [tensor for i, tensor in enumerate(leaves) if asked >> i & 1]
        for i, tensor in enumerate(leaves):
            tensor.requires_grad_(bool(asked >> i & 1))
        grads = torch.autograd.grad(norm_rescale(x, weight, bias, scale, shift).square().sum(), wanted)
        for grad, right in zip(grads, [e for i, e in enumerate(expected) if asked >> i & 1], strict=True):
            torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("of", range(3))
def test_a_jacobian_by_batches_of_gradients(of: int):
    """No kernel can read the memory of a batch of gradients."""
    x, weight, bias, *parameters = arguments(torch.float64, torch.float64, rows=5)

    def function(value: torch.Tensor) -> torch.Tensor:
        given = [value if i == of else tensor for i, tensor in enumerate((x, *parameters))]
        return norm_rescale(given[0], weight, bias, *given[1:]).flatten()[::7]

    value = (x, *parameters)[of]
    found, one_by_one = (torch.autograd.functional.jacobian(function, value, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, one_by_one)


def test_works_inside_transforms_and_compiled():
    x, weight, bias, scale, shift = arguments(torch.float64, torch.float64)

    def loss(scale, x):
        return norm_rescale(x, weight, bias, scale, shift).square().sum()

    def reference(scale, x):
        return norm_rescale_reference(x, weight, bias, scale, shift).square().sum()

    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), (None, 0))):
        torch.testing.assert_close(transform(loss)(scale, x), transform(reference)(scale, x))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scale, x), reference(scale, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_without_its_checkpoint(strict: bool):
    norm = NormRescale(nn.LayerNorm(D))
    norm.keep_output = False
    x = torch.randn(3, D)
    torch.testing.assert_close(torch.export.export(norm, (x,), strict=strict).module()(x), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_has_the_dtype_of_layer_norm(dtype, autocast):
    x, weight, bias, scale, shift = arguments(dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = norm_rescale(x, weight, bias, scale, shift)
        expected = F.layer_norm(x, (D,), weight, bias)
    assert y.dtype == expected.dtype


def test_keeps_only_the_input_and_row_statistics_for_backward():
    x, weight, bias, scale, shift = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_rescale(x.requires_grad_(), weight, bias, scale.requires_grad_(), shift.requires_grad_())
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {x.data_ptr()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(D + 1)}, r"weight must be \[D\] with D = 48.*\(49,\)"),
        ({"scale": torch.ones(1)}, r"scale must be \[D\]"),
        ({"shift": torch.ones(D, device="meta")}, "shift must be on the device of x, cpu; got meta"),
        ({"weight": torch.ones(D, requires_grad=True)}, "weight must be frozen"),
        ({"bias": torch.ones(D, requires_grad=True)}, "bias must be frozen"),
    ],
)
def test_refuses_wrong_arguments(change, message):
    named = dict(zip(("x", "weight", "bias", "scale", "shift"), arguments(), strict=True))
    with pytest.raises(ValueError, match=message):
        norm_rescale(**{**named, **change})
    if "frozen" in message:
        with torch.no_grad():
            norm_rescale(**{**named, **change})


@pytest.mark.parametrize("name", ["x", "weight", "scale"])
def test_refuses_tensors_that_are_not_dense(name: str):
    named = dict(zip(("x", "weight", "bias", "scale", "shift"), arguments(), strict=True))
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor; got layout torch.sparse_coo"):
        norm_rescale(**{**named, name: named[name].detach().to_sparse()})
    if name == "x":
        with pytest.raises(TypeError, match=r"^x must be a dense tensor; got a nested tensor"):
            norm_rescale(**{**named, "x": torch.nested.nested_tensor([named["x"], named["x"]])})
    with pytest.raises(TypeError, match=rf"^{name} must be a Tensor; got ndarray"):
        norm_rescale(**{**named, name: named[name].detach().numpy()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_refuses_numbers_that_have_no_norm(dtype: torch.dtype):
    """A y of integers was truncated; ``nn.LayerNorm`` refuses them too."""
    x, *parameters = arguments()
    with pytest.raises(TypeError, match=f"^x must be float32, float16, bfloat16 or float64; got {dtype}"):
        norm_rescale(x.detach().to(dtype), *parameters)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(D), nn.LayerNorm(D, bias=False), nn.LayerNorm(D, elementwise_affine=False)]
)
def test_module_folds_into_a_plain_layer_norm(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    module = NormRescale(norm)
    x = torch.randn(4, D)
    assert module.weight is norm.weight
    assert not any(p.requires_grad for p in norm.parameters())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"scale", "shift"}
    torch.testing.assert_close(module(x), norm_rescale_reference(x, norm.weight, norm.bias, module.scale, module.shift))
    torch.testing.assert_close(module.to_layer_norm()(x), module(x))


def test_starts_as_the_paper_or_as_the_norm():
    wide = NormRescale(nn.LayerNorm(20_000))
    assert wide.scale.mean().item() == pytest.approx(1, abs=1e-3)
    assert wide.scale.std().item() == pytest.approx(0.02, rel=0.05)
    assert wide.shift.mean().item() == pytest.approx(0, abs=1e-3)
    assert wide.shift.std().item() == pytest.approx(0.02, rel=0.05)
    norm, x = nn.LayerNorm(D), torch.randn(4, D)
    tolerance = {} if backends.INTERPRETING else {"rtol": 0, "atol": 0}  # the kernels sum in an order of their own
    torch.testing.assert_close(NormRescale(norm, init="identity")(x), norm(x), **tolerance)
    assert torch.equal(ChannelRescale(D, init="identity")(x), x)


def test_module_refuses_what_is_no_layer_norm_of_one_dimension():
    with pytest.raises(TypeError, match=r"norm must be an nn\.LayerNorm; got GroupNorm"):
        NormRescale(nn.GroupNorm(2, D))
    with pytest.raises(ValueError, match=r"one dimension.*\(4, 4\)"):
        NormRescale(nn.LayerNorm((4, 4)))
    with pytest.raises(ValueError, match="init must be one of paper, identity"):
        NormRescale(nn.LayerNorm(D), init="zeros")


def test_channel_rescale_keeps_a_16_bit_dtype():
    module = ChannelRescale(D)
    x = torch.randn(3, D)
    torch.testing.assert_close(module(x), x * module.scale + module.shift)
    assert module(x.half()).dtype == torch.float16
