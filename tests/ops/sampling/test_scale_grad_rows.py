"""``scale_grad_rows``: the gradients of the scales estimated from a sample of the rows of x."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from rlrr_kernels import RLRRLinear, RowSample, backends, numerics, rlrr_linear, use_backend
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.sampling.row_sample import sample_rows
from rlrr_kernels.reference import rlrr_linear_reference
from tests.support.implementations import BACKENDS, DTYPES

pytestmark = pytest.mark.interpreted

poisoned = pytest.mark.usefixtures("poisoned_memory")
# Both paths of the Triton backend launch the same kernel here; the interpreter is spared the slower one.
on_every_backend = pytest.mark.parametrize("backend", BACKENDS[-1:] if backends.INTERPRETING else BACKENDS)
LEAVES = ("x", "scale_row", "scale_col", "bias")

SEVENTH = 49 / 6
"""A weight no dtype represents."""


def draw_sample(rows: int, size: int, kept: int, weight: float = SEVENTH) -> RowSample:
    return RowSample(torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:size], kept, weight)


def draw_images(images: int, tokens: int, prefix: int, drawn: int) -> RowSample:
    """The first ``prefix`` rows of every image and ``drawn`` of its others, with their means."""
    generator, first = torch.Generator().manual_seed(1), torch.arange(0, images * tokens, tokens)
    kept = [start + torch.arange(prefix) for start in first]
    others = tokens - prefix
    picked = [start + prefix + torch.randperm(others, generator=generator)[:drawn] for start in first]
    return RowSample(torch.cat(kept + picked), images * prefix, (others - 1) / (drawn - 1), images)


def estimate_reference(x, weight, scale_row, scale_col, bias=None, *, residual=True, sample: RowSample):
    """The literal formula: exact for x and bias, and for the scales a sum over the two parts of the sample."""
    exact = rlrr_linear_reference(x, weight, scale_row.detach(), scale_col.detach(), bias, residual=residual)
    rows, frozen = sample.index, x.detach().reshape(-1, x.shape[-1])

    def part(rows: torch.Tensor, factor: float):
        # Of no value, but with a gradient; the factor multiplies the gradients of the scales, in their own dtype.
        scales = [_Times.apply(scale, factor) for scale in (scale_row, scale_col)]
        return rows, rlrr_linear_reference(frozen[rows], weight, *scales, residual=residual)

    parts = [part(rows[: sample.kept], 1.0), part(rows[sample.kept :], sample.weight)]
    if sample.images:
        drawn = (len(rows) - sample.kept) // sample.images
        scales = [_Times.apply(scale, drawn) for scale in (scale_row, scale_col)]
        means = frozen[rows[sample.kept :]].unflatten(0, (sample.images, drawn)).mean(1)
        parts.append((sample, rlrr_linear_reference(means, weight, *scales, residual=residual)))
    return _AddNothing.apply(exact, *[item for pair in parts for item in pair])


def missed_means(grad: torch.Tensor, sample: RowSample) -> torch.Tensor:
    """By image, Σ_P g / n - weight · (mean of the drawn g), [B, N], in the accumulation dtype and then rounded."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    kept, drawn = sample.index[: sample.kept], sample.index[sample.kept :].unflatten(0, (sample.images, -1))
    others = wide.index_fill(0, kept.long(), 0).unflatten(0, (sample.images, -1)).sum(1)
    return (others / drawn.shape[1] - sample.weight * wide[drawn].mean(1)).to(grad.dtype)


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
        ctx.rows = parts[::2]
        return exact.clone()

    @staticmethod
    def backward(ctx, grad):
        flat = grad.reshape(-1, grad.shape[-1])
        grads = [missed_means(flat, rows) if isinstance(rows, RowSample) else flat[rows] for rows in ctx.rows]
        return grad, *[gradient for one in grads for gradient in (None, one)]


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
@pytest.mark.parametrize(
    ("dtype", "shape", "sample"),
    [
        pytest.param(
            dtype, shape, sample, id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow_interpreted] if (i + j) % len(DTYPES) or j % 2 else [],
        )
        for i, dtype in enumerate(DTYPES)
        for j, (name, shape, sample) in enumerate((
            ("plain", (197, 51, 70, 1, 3), draw_sample(197, 67, 17)),
            ("plain, nothing kept", (130, 66, 67, 4, 1), draw_sample(130, 33, 0)),
            ("images", (200, 51, 70, 1, 3), draw_images(8, 25, 1, 6)),
            ("images, nothing kept", (130, 66, 67, 4, 1), draw_images(2, 65, 0, 33)),
        ))
    ],
)  # fmt: skip
def test_error_rule(backend: str, dtype: torch.dtype, shape: tuple, sample: RowSample):
    errors = error_rule_of_estimate(Case(*shape, dtype=dtype), sample, backend, numerics.SEEDS)
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
    ("rows", "size", "kept"),
    [
        pytest.param(rows, size, kept, marks=[pytest.mark.slow_interpreted] if (rows == 40) != (kept == 16) else [])
        for rows, size, kept in ((40, 0, 0), (40, 1, 0), (40, 1, 1), (40, 32, 16), (1, 1, 0), (0, 0, 0))
    ],
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
@pytest.mark.parametrize(
    ("images", "tokens", "prefix", "drawn"), [(3, 13, 1, 4), (32, 3, 1, 2), (1, 70, 0, 64), (2, 9, 3, 6)]
)
def test_images_are_estimated_by_their_means_and_a_covariance(
    backend: str, images: int, tokens: int, prefix: int, drawn: int
):
    """Against P ḡ x̄ᵀ + (P - 1) S_gx in float64, the covariance as torch.cov has it; (2, 9, 3, 6) draws every row."""
    tensors = Case(images * tokens, 99, 70, 2, 3, dtype=torch.float64).draw(0)
    sample = draw_images(images, tokens, prefix, drawn)
    x, g = (tensors[name].unflatten(0, (images, tokens)) for name in ("x", "grad_y"))
    picked = sample.index[sample.kept :].unflatten(0, (images, drawn)) - torch.arange(images)[:, None] * tokens
    product = torch.zeros(99, 70, dtype=torch.float64)
    for image in range(images):
        product += g[image, :prefix].t() @ x[image, :prefix]
        others, xs, gs = g[image, prefix:], x[image, picked[image]], g[image, picked[image]]
        covariance = torch.cov(torch.cat([gs, xs], 1).t())[:99, 99:]
        product += len(others) * torch.outer(others.mean(0), xs.mean(0)) + (len(others) - 1) * covariance
    weighted = (product * tensors["weight"]).unflatten(0, (3, 33))
    row, col = tensors["scale_row"].unflatten(0, (3, 33)), tensors["scale_col"]
    expected = {
        "scale_row": torch.einsum("gnk,grk->gnr", weighted, col).flatten(0, 1),
        "scale_col": torch.einsum("gnk,gnr->grk", weighted, row),
        "bias": tensors["grad_y"].sum(0),
    }
    for layout in ("dense", "transposed"):
        if layout == "transposed":
            tensors["grad_y"] = tensors["grad_y"].t().contiguous().t()
        actual = outputs_of(tensors, backend, sample)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=f"{layout} {name}")


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


@poisoned
@on_every_backend
@pytest.mark.parametrize(
    ("images", "tokens", "prefix", "fraction"), [(3, 197, 1, 0.25), (2, 20, 18, 0.5), (1, 9, 0, 0.9), (2, 1030, 2, 0.1)]
)
def test_the_smallest_keys_are_drawn(backend: str, images: int, tokens: int, prefix: int, fraction: float):
    """1028 tokens are more than one program of the kernel sorts."""
    torch.manual_seed(0)
    keys = torch.rand(images, tokens - prefix)
    torch.manual_seed(0)
    with use_backend(backend):
        sample = sample_rows(torch.Size((images, tokens, 8)), fraction, prefix, torch.device("cpu"))
    drawn = round(fraction * (tokens - prefix))
    first = torch.arange(0, images * tokens, tokens).unsqueeze(1)
    expected = [first + torch.arange(prefix), keys.argsort(1)[:, :drawn].sort(1).values + first + prefix]
    assert torch.equal(sample.index, torch.cat([part.flatten() for part in expected]))
    assert sample.kept == images * prefix


# ---------------------------------------------------------------- the operator and its neighbours


PLAIN_AND_IMAGES = pytest.mark.parametrize(
    "sample", [draw_sample(30, 12, 4), draw_images(3, 10, 1, 4)], ids=["plain", "images"]
)


@on_every_backend
@PLAIN_AND_IMAGES
def test_opcheck(backend: str, sample: RowSample):
    tensors = Case(30, 12, 10, 2, 3).draw(0)
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    args = (leaves[0], tensors["weight"], *leaves[1:], True, backend, None, *sample)
    torch.library.opcheck(torch.ops.rlrr_kernels.linear.default, args)
    x = leaves[0].detach()[sample.index]
    scales = [leaf.detach() for leaf in leaves[1:3]]
    args = (tensors["grad_y"], x, tensors["weight"], *scales, True, backend, [True] * 4, None, *sample)
    # Its autograd is an error by design, so there is nothing to trace through the backward.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rlrr_kernels.linear_backward.default, args, test_utils=tests)


@on_every_backend
@PLAIN_AND_IMAGES
def test_the_operator_is_the_function(backend: str, sample: RowSample):
    tensors = Case(30, 12, 10, 2, 3).draw(0)

    def operator(x, weight, scale_row, scale_col, bias, residual):
        return torch.ops.rlrr_kernels.linear(x, weight, scale_row, scale_col, bias, residual, backend, None, *sample)

    ours, theirs = outputs_of(tensors, backend, sample), numerics.outputs(operator, tensors, True)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@on_every_backend
@pytest.mark.slow_interpreted  # what is compiled is around the kernels
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
@PLAIN_AND_IMAGES
def test_with_an_input_activation(backend: str, sample: RowSample):
    tensors = Case(30, 12, 10, 2, 3, dtype=torch.float64).draw(0)
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
