"""Where the operators meet PyTorch: second derivatives, lazy negation, batches of gradients, empty and odd tensors.

The yardstick is ``nn.Linear``: the same values as the formula, or a refusal that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlrr_kernels import NormRescale, RLRRConv2d, RLRRLinear, backends, norm_rescale, rlrr_linear, rlrr_mlp, use_backend
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.sampling.row_sample import RowSample
from rlrr_kernels.reference import norm_rescale_reference, rlrr_linear_reference
from tests.support.implementations import BACKENDS

pytestmark = pytest.mark.interpreted
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "scale_row", "scale_col", "bias")


def problem(**changes) -> dict[str, Tensor]:
    sizes = {"rows": 6, "out_features": 12, "in_features": 10, "rank": 2, "groups": 3}
    return Case(**(sizes | changes)).draw(0)


def leaves(tensors: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_(name in names) for name, t in tensors.items() if name != "grad_y"}


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------- second derivatives


def penalty(function: Callable[..., Tensor], tensors: dict[str, Tensor], of: str) -> dict[str, Tensor]:
    """Gradients of a gradient penalty on ``of``."""
    tensors = leaves(tensors)
    (gradient,) = torch.autograd.grad(function(**tensors).sin().sum(), tensors[of], create_graph=True)
    gradient.square().sum().backward()
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


@on_every_backend
@pytest.mark.parametrize("of", NAMES)
def test_a_gradient_penalty_trains(backend: str, of: str):
    tensors = problem()
    expected = penalty(rlrr_linear_reference, tensors, of)
    assert {"x", "scale_row", "scale_col"} <= expected.keys()
    close(penalty(lambda **t: rlrr_linear(**t, backend=backend), tensors, of), expected)


@on_every_backend
@pytest.mark.parametrize("hooked", [None, "x", "scale_row"])
def test_first_gradients_under_create_graph(backend: str, hooked: str | None):
    """Of a layer that is applied twice, and of tensors with hooks, as without ``create_graph``."""
    given = problem(out_features=10, in_features=10, rank=1, groups=1)

    def gradients(function: Callable[..., Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        tensors = leaves(given)
        first = {**tensors, "x": tensors["x"] * 1.0}
        if hooked is not None:
            first[hooked].register_hook(lambda grad: 2 * grad)
        y = function(**{**first, "x": function(**first)})
        return torch.autograd.grad(y.square().sum(), [tensors[name] for name in NAMES], create_graph=create_graph)

    expected = gradients(rlrr_linear_reference, True)
    for create_graph in (False, True):
        found = gradients(lambda **t: rlrr_linear(**t, backend=backend), create_graph)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv", "norm"])
def test_first_gradients_of_other_layers_under_create_graph(layer: str):
    if layer == "conv":
        module = RLRRConv2d.from_conv(torch.nn.Conv2d(4, 4, 3, padding=1), rank=1)
        x = torch.randn(2, 4, 5, 5)
    else:
        module, x = NormRescale(torch.nn.LayerNorm(8)), torch.randn(3, 8)
    trained = [p for p in module.parameters() if p.requires_grad]
    trained[0].register_hook(lambda grad: 2 * grad)
    with use_backend("torch"):
        results = [
            torch.autograd.grad(module(module(x)).square().sum(), trained, create_graph=create_graph)
            for create_graph in (False, True)
        ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@on_every_backend
def test_of_a_gradient_whose_own_gradient_is_constant(backend: str):
    """grad_y requires no gradient: a guard on it alone would let the penalty train nothing."""
    tensors = problem(rank=1, groups=1)
    found = []
    for function in (partial(rlrr_linear, backend=backend), rlrr_linear_reference):
        t = leaves(tensors)
        (gradient,) = torch.autograd.grad(function(**t).sum(), t["x"], create_graph=True)
        gradient.square().sum().backward()
        found.append(t["scale_row"].grad)
    close(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("wanted", [("x",), ("scale_row",), ("x", "scale_row", "scale_col")])
def test_only_what_is_wanted_has_a_second_derivative(wanted: tuple[str, ...]):
    tensors = problem()
    results = []
    for function in (rlrr_linear, rlrr_linear_reference):
        t = leaves(tensors, wanted)
        first = torch.autograd.grad(function(**t).sin().sum(), [t[name] for name in wanted], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [t[name] for name in wanted]))
    close(results[0], results[1])


def test_layers_and_companions_have_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 10, dtype=torch.float64)
    layer, norm = (
        RLRRLinear(10, 6, groups=2, dtype=torch.float64),
        NormRescale(torch.nn.LayerNorm(10), dtype=torch.float64).double(),
    )
    conv = RLRRConv2d(3, 4, 3, dtype=torch.float64)
    image = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    mlp = problem()
    fc = [t.double() for t in (mlp["weight"], mlp["scale_row"], mlp["scale_col"], mlp["bias"])]
    back = [t.double() for t in (mlp["weight"].t().contiguous(), torch.randn(10, 1), torch.randn(1, 1, 12))]
    for function, argument in (
        (layer, x),
        (norm, x),
        (conv, image),
        (lambda x: rlrr_mlp(x, *fc, *back, None), x[0]),
    ):
        assert torch.autograd.gradgradcheck(function, argument.requires_grad_(), raise_exception=True)


def test_an_estimate_refuses_a_second_derivative():
    tensors = leaves(problem())
    y = rlrr_linear(**tensors, scale_grad_rows=RowSample(torch.tensor([0, 2, 4]), weight=2.0))
    with pytest.raises(NotImplementedError, match="scale_grad_rows"):
        torch.autograd.grad(y.sum(), tensors["scale_row"], create_graph=True)


# ---------------------------------------------------------------- lazy negation, and types of tensors


def negated(tensor: Tensor) -> Tensor:
    """Equal to ``tensor``, with the other sign in memory."""
    view = torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag
    assert view.is_neg()
    assert torch.equal(view, tensor)
    return view


@pytest.fixture
def addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on a GPU are handed addresses; Triton's interpreter would see to the signs."""
    if backends.INTERPRETING:
        from rlrr_kernels.ops.host.launch import Launch

        run = Launch.run

        def checked(launch: Launch) -> None:
            assert not any(tensor.is_neg() for tensor in launch.tensors)
            run(launch)

        monkeypatch.setattr(Launch, "run", checked)


@on_every_backend
@pytest.mark.usefixtures("addresses_alone")
@pytest.mark.parametrize("name", [*NAMES, "weight", "grad_y"])
def test_a_lazily_negated_tensor_has_its_own_sign(backend: str, name: str):
    tensors = problem()

    def run(t: dict[str, Tensor]) -> list[Tensor]:
        inputs = {key: t[key].detach().requires_grad_() for key in NAMES}
        y = rlrr_linear(**inputs, weight=t["weight"], backend=backend)
        return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), t["grad_y"])]

    expected = run(tensors)
    for _ in range(3):  # the second and third of a layout may be replayed
        close(run(tensors | {name: negated(tensors[name])}), expected)
        close(run(tensors), expected)


@pytest.mark.usefixtures("addresses_alone")
@pytest.mark.parametrize("name", ["x", "weight", "bias", "scale", "shift", "grad_y"])
def test_norm_rescale_knows_lazy_negation(name: str):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 12), "weight": (12,), "bias": (12,), "scale": (12,), "shift": (12,), "grad_y": (5, 12)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    def run(function, t: dict[str, Tensor]) -> list[Tensor]:
        inputs = {key: t[key].detach().requires_grad_(key in ("x", "scale", "shift")) for key in t if key != "grad_y"}
        y = function(**inputs)
        return [y.detach(), *torch.autograd.grad(y, [inputs[n] for n in ("x", "scale", "shift")], t["grad_y"])]

    with use_backend(BACKENDS[0]):
        found = run(norm_rescale, tensors | {name: negated(tensors[name])})
    close(found, run(norm_rescale_reference, tensors))


class Tagged(Tensor):
    """A subclass without a meaning of its own."""


@on_every_backend
def test_a_weight_of_another_type(backend: str):
    tensors = problem()
    t = leaves(tensors)
    expected = rlrr_linear_reference(**t)
    actual = rlrr_linear(**(t | {"weight": t["weight"].as_subclass(Tagged)}), backend=backend)
    close(actual.as_subclass(Tensor), expected)


@pytest.mark.parametrize("name", ["x", "weight", "scale_row"])
@pytest.mark.parametrize("form", ["to_sparse", "to_mkldnn"])
def test_tensors_that_are_not_dense_are_refused(name: str, form: str):
    tensors = leaves(problem(), ())
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor"):
        rlrr_linear(**(tensors | {name: getattr(tensors[name], form)()}))


def test_a_nested_x_is_refused():
    tensors = leaves(problem(), ())
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(2, 10), torch.randn(3, 10)], layout=layout)
        with pytest.raises(TypeError, match=r"^x must be a dense tensor; got a nested tensor"):
            rlrr_linear(**(tensors | {"x": nested}))


@on_every_backend
@pytest.mark.parametrize("name", ["grad_y", "scale_row", "weight"])
@pytest.mark.parametrize("rows", [1, 3, 6, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_group(backend: str, name: str, rows: int, dtype: torch.dtype):
    """Groups of 5 rows, which no tile divides: an inf in one must not be multiplied by another's padding."""
    if backends.INTERPRETING and dtype == torch.bfloat16:
        pytest.skip("slow, and the same kernels")
    tensors = Case(rows, 15, 33, groups=3, dtype=dtype).draw(0)
    row = 5
    tensors[name][(slice(None), row) if name == "grad_y" else row] = torch.inf
    t = leaves(tensors)
    rlrr_linear(**t, backend=backend).backward(tensors["grad_y"])
    for group in (0, 2):
        assert t["scale_col"].grad[group].isfinite().all()
    others = torch.arange(15) != row
    assert t["scale_row"].grad[others].isfinite().all()


# ---------------------------------------------------------------- shapes, frozen weights, batches of gradients


@on_every_backend
@pytest.mark.parametrize("trained", [("bias",), ("scale_row",), NAMES])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0, 3)])
def test_every_leading_shape(backend: str, trained: tuple[str, ...], lead: tuple[int, ...]):
    tensors = problem() | {"x": torch.randn(*lead, 10)}
    results = []
    for function in (lambda **t: rlrr_linear(**t, backend=backend), rlrr_linear_reference):
        t = leaves(tensors, trained)
        y = function(**t)
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [t[name] for name in trained])))
    close(results[0], results[1])


@on_every_backend
@pytest.mark.parametrize("sizes", [{"out_features": 0, "groups": 1}, {"in_features": 0}])
def test_empty_weights(backend: str, sizes: dict[str, int]):
    tensors = problem(**sizes)
    t = leaves(tensors | {"x": tensors["x"].reshape(2, 3, -1) if tensors["x"].numel() else torch.zeros(2, 3, 0)})
    y = rlrr_linear(**t, backend=backend)
    assert y.shape == (2, 3, t["weight"].shape[0])
    y.sum().backward()
    close(y, t["bias"].detach().expand(y.shape))
    assert all(t[name].grad.shape == t[name].shape for name in NAMES)


def test_a_weight_that_requires_grad_serves_where_no_gradient_is_asked_for():
    tensors = problem()
    weight = torch.nn.Parameter(tensors["weight"])
    arguments = tensors["x"], weight, tensors["scale_row"], tensors["scale_col"]
    for _ in range(2):
        with torch.no_grad():
            close(rlrr_linear(*arguments), rlrr_linear_reference(*arguments).detach())
        with pytest.raises(ValueError, match=r"weight must be frozen: it has requires_grad=True"):
            rlrr_linear(*arguments)
    with torch.inference_mode():
        rlrr_linear(*arguments)


def test_torch_func_over_all_parameters_says_which_one_is_too_many():
    layer = RLRRLinear(10, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (torch.ones(2, 10),)).sum()

    with pytest.raises(ValueError, match=r"weight must be frozen, but torch\.func differentiates with respect to it"):
        torch.func.grad(loss)(parameters)


@on_every_backend
@pytest.mark.slow_interpreted  # what is batched is the formula
def test_a_jacobian_by_batches_of_gradients(backend: str):
    tensors = problem()
    rest = tensors["weight"], tensors["scale_row"], tensors["scale_col"]
    arguments = tuple(tensors[name] for name in NAMES)
    vectorized, in_a_loop = (
        torch.autograd.functional.jacobian(
            lambda x, row, col, bias: rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend),
            arguments,
            vectorize=vectorize,
        )
        for vectorize in (True, False)
    )
    close(vectorized, in_a_loop)
    leaf = tensors["x"].clone().requires_grad_()
    y = rlrr_linear(leaf, *rest, backend=backend)[0]
    (mapped,) = torch.func.vmap(lambda v: torch.autograd.grad(y, leaf, v, retain_graph=True))(torch.eye(len(y)))
    close(mapped, in_a_loop[0][0])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rows", [(), (5,), (2, 5)])
@pytest.mark.parametrize("of", NAMES)
def test_a_jacobian_of_one_argument_alone_by_batches(of: str, rows: tuple[int, ...], create_graph: bool):
    """Where x is not kept, or the bias alone has a gradient."""
    tensors = leaves(problem(), ())
    tensors["x"] = torch.randn(*rows, tensors["weight"].shape[1], dtype=tensors["weight"].dtype)

    def function(value: Tensor) -> Tensor:
        return rlrr_linear(**{**tensors, of: value})

    vectorized, in_a_loop = (
        torch.autograd.functional.jacobian(function, tensors[of], vectorize=vectorize, create_graph=create_graph)
        for vectorize in (True, False)
    )
    close(vectorized, in_a_loop)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_jacobian_in_the_input_of_frozen_layers_by_batches(create_graph: bool):
    x, images = torch.randn(3, 6, dtype=torch.float64), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    options = {"dtype": torch.float64, "scale_dtype": torch.float64}
    for layer, value in (
        (RLRRLinear(6, 4, rank=2, **options), x),
        (RLRRConv2d(2, 3, 3, **options), images),
        (NormRescale(torch.nn.LayerNorm(6, dtype=torch.float64), dtype=torch.float64), x),
    ):
        layer.requires_grad_(False)
        vectorized, in_a_loop = (
            torch.autograd.functional.jacobian(layer, value, vectorize=vectorize, create_graph=create_graph)
            for vectorize in (True, False)
        )
        close(vectorized, in_a_loop)
