"""``scale_grad_rows``: the gradients of the scales estimated from a sample of the rows of x."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from implementations import BACKENDS, DTYPES

from rlrr_kernels import RLRRLinear, RowSample, backends, numerics, rlrr_linear, use_backend
from rlrr_kernels.numerics import Case
from rlrr_kernels.reference import rlrr_linear_reference

poisoned = pytest.mark.usefixtures("poisoned_memory")
# Both paths of the Triton backend launch the same kernel here; the interpreter is spared the slower one.
on_every_backend = pytest.mark.parametrize("backend", BACKENDS[-1:] if backends.INTERPRETING else BACKENDS)
LEAVES = ("x", "scale_row", "scale_col", "bias")

SEVENTH = 49 / 6
"""A weight no dtype represents."""


def draw_sample(rows: int, size: int, kept: int, weight: float = SEVENTH) -> RowSample:
    return RowSample(torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:size], kept, weight)


def estimate_reference(x, weight, scale_row, scale_col, bias=None, *, residual=True, sample: RowSample):
    """The literal formula: exact for x and bias, and for the scales a sum over the two parts of the sample."""
    exact = rlrr_linear_reference(x, weight, scale_row.detach(), scale_col.detach(), bias, residual=residual)
    rows, frozen = sample.index, x.detach().reshape(-1, x.shape[-1])

    def part(rows: torch.Tensor, factor: float):
        # Of no value, but with a gradient; the factor multiplies the gradients of the scales, in their own dtype.
        scales = [_Times.apply(scale, factor) for scale in (scale_row, scale_col)]
        return rows, rlrr_linear_reference(frozen[rows], weight, *scales, residual=residual)

    parts = [part(rows[: sample.kept], 1.0), part(rows[sample.kept :], sample.weight)]
    return _AddNothing.apply(exact, *[tensor for pair in parts for tensor in pair])


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _AddNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exact, *parts):
        ctx.save_for_backward(*parts[::2])
        return exact.clone()

    @staticmethod
    def backward(ctx, grad):
        flat = grad.reshape(-1, grad.shape[-1])
        return grad, *[gradient for rows in ctx.saved_tensors for gradient in (None, flat[rows])]


# ---------------------------------------------------------------- numerics


def error_rule_of_estimate(case: Case, sample: RowSample, backend: str, seeds: int) -> dict[str, tuple[float, float]]:
    """Root mean square errors against float64 of the backend's estimate and of eager's, by output."""
    squares: dict[str, list[float]] = {}
    for seed in range(seeds):
        tensors = case.draw(seed)
        reference = partial(estimate_reference, sample=sample)
        exact = numerics.outputs(reference, {name: t.double() for name, t in tensors.items()}, True)
        for index, function in enumerate((partial(rlrr_linear, backend=backend, scale_grad_rows=sample), reference)):
            for name, actual in numerics.outputs(function, tensors, True).items():
                squares.setdefault(name, [0.0, 0.0])[index] += numerics.relative_error(actual, exact[name]) ** 2
    return {name: (math.sqrt(ours / seeds), math.sqrt(eager / seeds)) for name, (ours, eager) in squares.items()}


@poisoned
@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "size", "kept"), [((197, 51, 70, 1, 3), 67, 17), ((130, 66, 67, 4, 1), 33, 0)], ids=str
)
def test_error_rule(backend: str, dtype: torch.dtype, shape: tuple, size: int, kept: int):
    errors = error_rule_of_estimate(
        Case(*shape, dtype=dtype), draw_sample(shape[0], size, kept), backend, numerics.SEEDS
    )
    for name, (ours, eager) in errors.items():
        if dtype == torch.float64:
            assert ours <= numerics.FLOAT64_ROUNDOFFS * torch.finfo(dtype).eps / 2, name
        else:
            assert ours <= numerics.RATIO * eager, (name, ours / eager)


def outputs_of(tensors: dict[str, torch.Tensor], backend: str, sample: RowSample | None = None):
    return numerics.outputs(partial(rlrr_linear, backend=backend, scale_grad_rows=sample), tensors, True)


@poisoned
@on_every_backend
@pytest.mark.parametrize(
    ("rows", "size", "kept"), [(40, 0, 0), (40, 1, 0), (40, 1, 1), (40, 32, 16), (1, 1, 0), (0, 0, 0)]
)
def test_any_size_and_layout(backend: str, rows: int, size: int, kept: int):
    """In float64, where rounding cannot hide a wrong row; y, ∂x and ∂b are those of no sample to the last bit."""
    tensors = Case(rows, 99, 70, 2, 3, dtype=torch.float64).draw(0)
    sample = draw_sample(rows, size, kept)
    exact = numerics.outputs(partial(estimate_reference, sample=sample), tensors, True)
    plain = outputs_of(tensors, backend)
    for layout in ("dense", "transposed"):
        for name in ("x", "grad_y") if layout == "transposed" else ():
            tensors[name] = tensors[name].t().contiguous().t()
        for index in (sample.index, sample.index.int(), sample.index.repeat_interleave(2)[::2]):
            actual = outputs_of(tensors, backend, sample._replace(index=index))
            for name, value in actual.items():
                torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=f"{layout} {name}")
                if name in ("y", "x") and layout == "dense":
                    assert torch.equal(value, plain[name]), name


@poisoned
@on_every_backend
def test_every_row_once_is_the_exact_gradient(backend: str):
    tensors = Case(70, 99, 70, 1, 3).draw(0)
    plain = outputs_of(tensors, backend)
    for kept in (0, 70):
        actual = outputs_of(tensors, backend, RowSample(torch.arange(70), kept))
        for name, value in actual.items():
            if name == "bias":  # on the GPU its sum is cut elsewhere
                torch.testing.assert_close(value, plain[name])
            else:
                assert torch.equal(value, plain[name]), name
    shuffled = outputs_of(tensors, backend, draw_sample(70, 70, 30, 1.0))
    for name, value in shuffled.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-4)


@poisoned
@on_every_backend
def test_every_pattern_of_needed_gradients_and_leading_dimensions(backend: str):
    tensors = Case(24, 99, 70, groups=3, dtype=torch.float64).draw(0)
    sample = draw_sample(24, 9, 2)
    full = outputs_of(tensors, backend, sample)
    for pattern in (1, 3, 6, 12, 15) if backends.INTERPRETING else range(1, 16):
        needs = {name: bool(pattern >> bit & 1) for bit, name in enumerate(LEAVES)}
        leaves = {name: tensors[name].detach().requires_grad_(need) for name, need in needs.items()}
        x = leaves["x"].view(2, 3, 4, 70)
        y = rlrr_linear(x, tensors["weight"], *list(leaves.values())[1:], backend=backend, scale_grad_rows=sample)
        y.backward(tensors["grad_y"].view(2, 3, 4, 99))
        for name, leaf in leaves.items():
            if needs[name]:
                torch.testing.assert_close(leaf.grad, full[name], rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


@poisoned
@on_every_backend
def test_same_sample_same_bits(backend: str):
    tensors = Case(197, 99, 131, 2, 3).draw(0)
    sample = draw_sample(197, 61, 5)
    first, again = outputs_of(tensors, backend, sample), outputs_of(tensors, backend, sample)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


# ---------------------------------------------------------------- the operator and its neighbours


@on_every_backend
def test_opcheck(backend: str):
    tensors = Case(30, 12, 10, 2, 3).draw(0)
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    sample = draw_sample(30, 12, 4)
    args = (leaves[0], tensors["weight"], *leaves[1:], True, backend, None, *sample)
    torch.library.opcheck(torch.ops.rlrr_kernels.linear.default, args)
    x = leaves[0].detach()[sample.index]
    scales = [leaf.detach() for leaf in leaves[1:3]]
    args = (tensors["grad_y"], x, tensors["weight"], *scales, True, backend, [True] * 4, None, *sample)
    # Its autograd is an error by design, so there is nothing to trace through the backward.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rlrr_kernels.linear_backward.default, args, test_utils=tests)


@on_every_backend
def test_the_operator_is_the_function(backend: str):
    tensors = Case(30, 12, 10, 2, 3).draw(0)
    sample = draw_sample(30, 12, 4)

    def operator(x, weight, scale_row, scale_col, bias, residual):
        return torch.ops.rlrr_kernels.linear(x, weight, scale_row, scale_col, bias, residual, backend, None, *sample)

    ours, theirs = outputs_of(tensors, backend, sample), numerics.outputs(operator, tensors, True)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@on_every_backend
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_without_a_graph_break(backend: str, compiler: str, dynamic: bool):
    """Of two rows one is drawn: the estimate is twice the gradient of that row, or g and x are of different rows."""
    layer = RLRRLinear(10, 12, groups=3, scale_grad_rows=0.5, dtype=torch.float64, scale_dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=compiler)

    def gradients(function, x):
        layer.zero_grad()
        function(x).square().sum().backward()
        return layer.scale_row.grad.clone()

    with use_backend(backend):
        for images in (2, 3):
            x = torch.randn(images, 2, 10, dtype=torch.float64)
            layer.eval()
            choices = [[2 * gradients(layer, row[None]) for row in image] for image in x]
            sums = torch.stack([sum(one) for one in itertools.product(*choices)])
            layer.train()
            drawn = set()
            for _ in range(6):
                distances = (sums - gradients(compiled, x)).norm(dim=(1, 2)) / sums.norm()
                assert distances.min() < 1e-12
                drawn.add(distances.argmin().item())
            assert len(drawn) > 1


@on_every_backend
def test_with_an_input_activation(backend: str):
    tensors = Case(24, 12, 10, 2, 3, dtype=torch.float64).draw(0)
    sample = draw_sample(24, 9, 2)
    function = partial(rlrr_linear, backend=backend, input_activation="gelu", scale_grad_rows=sample)
    actual = numerics.outputs(function, tensors, True)

    def reference(x, *arguments, **options):
        return estimate_reference(torch.nn.functional.gelu(x), *arguments, **options, sample=sample)

    for name, exact in numerics.outputs(reference, tensors, True).items():
        torch.testing.assert_close(actual[name], exact, rtol=1e-12, atol=1e-12, msg=name)


@on_every_backend
def test_func_grad_and_vmap(backend: str):
    tensors = Case(24, 12, 10, 2, 3, dtype=torch.float64).draw(0)
    samples = torch.stack([draw_sample(6, 3, 1).index, draw_sample(6, 3, 1).index.flip(0)])
    scales = tensors["scale_row"], tensors["scale_col"]

    def loss(scales, x, index):
        sample = RowSample(index, 1, SEVENTH)
        y = rlrr_linear(x, tensors["weight"], *scales, tensors["bias"], backend=backend, scale_grad_rows=sample)
        return y.square().sum()

    x = tensors["x"].view(4, 6, 10)[:2]
    batched = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(scales, x, samples)
    for entry in range(2):
        leaves = [scale.clone().requires_grad_() for scale in scales]
        expected = torch.autograd.grad(loss(leaves, x[entry], samples[entry]), leaves)
        for ours, theirs in zip(batched, expected, strict=True):
            torch.testing.assert_close(ours[entry], theirs)


@on_every_backend
def test_kept_for_backward(backend: str):
    """Of x only the sample's rows, and with them their numbers; nothing where no scale is trained."""
    tensors = Case(256, 64, 64).draw(0)
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    sample = draw_sample(256, 64, 8)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        rlrr_linear(leaves[0], tensors["weight"], *leaves[1:], backend=backend, scale_grad_rows=sample)
        known = {t.data_ptr() for t in (tensors["weight"], *leaves[1:], sample.index)}
        kept = [t.nbytes for t in packed if t.data_ptr() not in known]
        assert kept == [leaves[0].nbytes / 4]
        packed.clear()
        scales = [leaf.detach() for leaf in leaves[1:3]]
        rlrr_linear(leaves[0], tensors["weight"], *scales, leaves[3], backend=backend, scale_grad_rows=sample)
        assert {t.data_ptr() for t in packed} <= {t.data_ptr() for t in (tensors["weight"], *scales)}


@on_every_backend
def test_autocast(backend: str):
    tensors = Case(40, 33, 20).draw(0)
    sample = draw_sample(40, 12, 4)
    low = {name: t.half() if name in ("x", "grad_y") else t for name, t in tensors.items()}
    expected = outputs_of(low, backend, sample)
    leaves = {name: tensors[name].requires_grad_() for name in LEAVES}
    with torch.autocast("cpu", torch.float16):
        y = rlrr_linear(
            leaves["x"], tensors["weight"], *list(leaves.values())[1:], backend=backend, scale_grad_rows=sample
        )
    y.backward(low["grad_y"])
    for name in ("scale_row", "scale_col", "bias"):
        assert torch.equal(leaves[name].grad, expected[name]), name
