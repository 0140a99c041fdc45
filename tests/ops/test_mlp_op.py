"""``rlrr_mlp`` and ``input_activation``: the error rule, what is kept, autograd, compile, bad input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import backends, numerics, rlrr_linear, rlrr_mlp
from rlrr_kernels.numerics import MlpCase
from rlrr_kernels.ops.activation import functions as act_module
from rlrr_kernels.reference import rlrr_mlp_reference
from tests.support.implementations import BACKENDS, DTYPES, HALF

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned_memory")]

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
ACTIVATIONS = ("gelu", "gelu_tanh")

SEEDS = numerics.SEEDS if backends.INTERPRETING else None  # the rule's own number takes the interpreter minutes

# M, N, H, K, rank, groups, bias, residual
SHAPES = (
    ((50, 33, 66, 35, 1, 3, True, True),)
    if backends.INTERPRETING
    else (
        (1, 66, 131, 67, 1, 1, True, True),
        (60, 35, 99, 34, 4, 3, False, False),
        (40, 51, 67, 70, 17, 1, True, True),
        (197, 67, 131, 99, 1, 1, True, True),
    )
)


@on_every_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, marks=[pytest.mark.slow_interpreted] if (i + j) % 2 else [])
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS[:1] if backends.INTERPRETING else ACTIVATIONS)
def test_error_rule(backend: str, dtype: torch.dtype, shape: tuple, activation: str):
    function = partial(rlrr_mlp, activation=activation, backend=backend)
    reference = partial(rlrr_mlp_reference, activation=activation)
    numerics.check_error_rule(function, MlpCase(*shape, dtype=dtype), SEEDS, reference)


@on_every_backend
@pytest.mark.skipif(backends.INTERPRETING, reason="casts are the linear kernels' own, tested there")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scales", ["scales in the compute dtype", "fp32 weight"])
def test_error_rule_of_mixed_dtypes(backend: str, dtype: torch.dtype, scales: str):
    options = {"scale_dtype": dtype} if scales.startswith("scales") else {"weight_dtype": torch.float32}
    case = MlpCase(40, 70, 99, 51, 1, 3, dtype=dtype, **options)
    numerics.check_error_rule(partial(rlrr_mlp, backend=backend), case, SEEDS, rlrr_mlp_reference)


@pytest.mark.skipif(not backends.INTERPRETING, reason="the kernel needs TRITON_INTERPRET=1 here")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_of_the_backward(dtype: torch.dtype, activation: str):
    from rlrr_kernels.ops.activation import triton_backward as activation_triton

    def run(grad: torch.Tensor, h: torch.Tensor, ours: bool) -> list[torch.Tensor]:
        if ours:
            return list(activation_triton.backward(grad.clone(), h, activation, True))
        return [act_module.backward(grad.clone(), h, activation), act_module.forward(h, activation)]

    h, grad = (3 * torch.randn(7007)).to(dtype), torch.randn(7007).to(dtype)
    exact = run(grad.double(), h.double(), ours=False)
    for mine, eager, right in zip(run(grad, h, ours=True), run(grad, h, ours=False), exact, strict=True):
        assert mine.dtype == dtype
        error, limit = (numerics.relative_error(value, right) for value in (mine, eager))
        assert error <= numerics.RATIO * limit
    tails = torch.tensor([0.0, -0.0, 1e-6, -30.0, 30.0, -1000.0, 1000.0]).to(dtype)
    torch.testing.assert_close(run(tails, tails, ours=True), run(tails, tails, ours=False))
    assert activation_triton.backward(grad, h, activation, False)[1] is None


def exact_case(**changes) -> dict[str, torch.Tensor]:
    sizes = {"rows": 24, "out_features": 34, "hidden_features": 66, "in_features": 35}
    return MlpCase(**sizes | {"rank": 2, "groups": 3, "dtype": torch.float64} | changes).draw(0)


def check_exact(backend: str, tensors: dict[str, torch.Tensor], residual: bool = True) -> None:
    exact = numerics.exact_outputs(tensors, residual, rlrr_mlp_reference)
    for name, value in numerics.outputs(partial(rlrr_mlp, backend=backend), tensors, residual).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@on_every_backend
@pytest.mark.parametrize(
    "sizes", [(0, 34, 66, 35), (1, 1, 1, 1), (300, 1, 3, 2), (5, 4, 6, 0), (5, 3, 0, 4), (5, 0, 2, 3)]
)
def test_extreme_shapes(backend: str, sizes: tuple[int, ...]):
    check_exact(backend, MlpCase(*sizes, dtype=torch.float64).draw(0))


@on_every_backend
@pytest.mark.parametrize("residual", [False] if backends.INTERPRETING else [True, False])
def test_strides(backend: str, residual: bool):
    tensors = exact_case()
    for layout in (lambda t: t.repeat_interleave(2, dim=-1)[..., ::2], lambda t: t.mT.contiguous().mT):
        for name in ("x", "grad_y") if backends.INTERPRETING else ("x", "fc1_weight", "fc2_weight", "grad_y"):
            check_exact(backend, tensors | {name: layout(tensors[name])}, residual)


@on_every_backend
def test_strides_and_dimensions_of_the_pre_activation(backend: str):
    tensors = exact_case()
    h = torch.randn(4, 66, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()  # [4, 6, 66], rows not contiguous
    row, col = tensors["fc2_scale_row"].requires_grad_(), tensors["fc2_scale_col"].requires_grad_()
    results = []
    for a, options in ((h, {"input_activation": "gelu", "backend": backend}), (F.gelu(h), {"backend": "torch"})):
        y = rlrr_linear(a, tensors["fc2_weight"], row, col, **options)
        results.append([y, *torch.autograd.grad(y.sum(), [h, row, col])])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@on_every_backend
def test_every_pattern_of_needed_gradients(backend: str):
    tensors = exact_case()
    names = ("x", "fc1_scale_row", "fc2_scale_row", "fc2_scale_col", "fc2_bias")
    full = numerics.outputs(partial(rlrr_mlp, backend=backend), tensors, True)
    for pattern in (1, 6, 24) if backends.INTERPRETING else range(1, 1 << len(names)):
        wanted = {name for index, name in enumerate(names) if pattern >> index & 1}
        given = {
            name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items() if name != "grad_y"
        }
        rlrr_mlp(**given, backend=backend).backward(tensors["grad_y"])
        for name, tensor in given.items():
            if name in wanted:
                torch.testing.assert_close(tensor.grad, full[name], rtol=1e-12, atol=1e-12)
            else:
                assert tensor.grad is None


@on_every_backend
def test_keeps_the_input_and_the_pre_activation_only(backend: str):
    tensors = {name: t.requires_grad_(not name.endswith("weight")) for name, t in exact_case(rows=300).items()}
    grad_y = tensors.pop("grad_y")
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = rlrr_mlp(**tensors, backend=backend)
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    beside = {pointer: size for pointer, size in kept.items() if pointer not in given}
    assert tensors["x"].untyped_storage().data_ptr() in kept
    assert list(beside.values()) == [300 * 66 * 8], "h and nothing else"
    y.backward(grad_y)


@on_every_backend
def test_gradcheck(backend: str):
    tensors = exact_case(rows=3, out_features=5, hidden_features=6, in_features=4)
    weights = tensors["fc1_weight"], tensors["fc2_weight"]
    leaves = [t.requires_grad_() for name, t in tensors.items() if not name.endswith("weight") and name != "grad_y"]

    def function(x, row1, col1, bias1, row2, col2, bias2):
        return rlrr_mlp(x, weights[0], row1, col1, bias1, weights[1], row2, col2, bias2, backend=backend)

    torch.autograd.gradcheck(function, leaves, fast_mode=True)


@on_every_backend
def test_autocast_and_checkpoint(backend: str):
    tensors = exact_case(dtype=torch.float32, weight_dtype=torch.float32)
    low = torch.float16
    grad_y = tensors.pop("grad_y").to(low)
    results = []
    for run in (lambda f: f(), lambda f: checkpoint(f, use_reentrant=False)):
        leaves = {n: t.detach().requires_grad_(not n.endswith("weight")) for n, t in tensors.items()}
        with torch.autocast("cpu", low):
            y = run(partial(rlrr_mlp, **leaves, backend=backend))
            y.backward(grad_y)  # inside the block: its products must not be cast again
        assert y.dtype == low
        results.append([y, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
    cast = numerics.outputs(
        partial(rlrr_mlp, backend=backend), tensors | {"x": tensors["x"].to(low), "grad_y": grad_y}, True
    )
    for plain, again, explicit in zip(*results, cast.values(), strict=True):
        assert torch.equal(plain, again)
        assert torch.equal(plain.to(explicit.dtype), explicit)


@on_every_backend
def test_opcheck_of_the_operator_with_an_activation(backend: str):
    tensors = exact_case(dtype=torch.float32)
    h = torch.randn(6, 66, requires_grad=True)
    layer = [tensors[f"fc2_{name}"] for name in ("weight", "scale_row", "scale_col")]
    args = (h, layer[0], layer[1].requires_grad_(), layer[2].requires_grad_(), None, True, backend, "gelu")
    torch.library.opcheck(torch.ops.rlrr_kernels.linear.default, args)
    detached = [t.detach() for t in layer]
    args = (torch.randn(6, 34), h.detach(), *detached, True, backend, [True, True, True, False], "gelu_tanh")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rlrr_kernels.linear_backward.default, args, test_utils=tests)
    with pytest.raises(ValueError, match="input_activation must be one of gelu, gelu_tanh; got 'swish'"):
        torch.ops.rlrr_kernels.linear(h, *detached, None, True, backend, "swish")


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_a_graph_break(backend: str, compiler: str, activation: str):
    tensors = exact_case(dtype=torch.float32)
    grad_y = tensors.pop("grad_y")

    def step(tensors):
        return (rlrr_mlp(**tensors, activation=activation, backend=backend) * grad_y).sum()

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaves = {n: t.detach().requires_grad_(not n.endswith("weight")) for n, t in tensors.items()}
        loss = function(leaves)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
    torch.testing.assert_close(*results)


@on_every_backend
def test_func_grad_and_vmap(backend: str):
    tensors = exact_case()
    grad_y = tensors.pop("grad_y")

    def loss(x, row, function):
        return (function(**tensors | {"x": x, "fc2_scale_row": row}) * grad_y[:5]).sum()

    x, row = torch.randn(3, 5, 35, dtype=torch.float64), tensors["fc2_scale_row"]
    results = [
        torch.func.vmap(torch.func.grad(partial(loss, function=function), (0, 1)), (0, None))(x, row)
        for function in (partial(rlrr_mlp, backend=backend), rlrr_mlp_reference)
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@on_every_backend
def test_forward_mode_says_that_it_is_missing(backend: str):
    tensors = exact_case()
    tensors.pop("grad_y")
    x = tensors.pop("x").requires_grad_()

    def function(x):
        return rlrr_mlp(x, **tensors, backend=backend).square().sum()

    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


def bad(**changes):
    tensors = exact_case()
    tensors.pop("grad_y")
    return tensors | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(activation="relu"), ValueError, "activation must be one of gelu, gelu_tanh; got 'relu'"),
        (bad(activation=["gelu"]), ValueError, r"activation must be one of .*; got \['gelu'\]"),
        (bad(x=torch.ones(6, 34).double()), ValueError, r"K = 35 as in fc1_weight \[66, 35\]; got shape \(6, 34\)"),
        (bad(fc2_weight=torch.ones(34, 65).double()), ValueError, r"fc2_weight must be \[N, H\] with H = 66"),
        (bad(fc2_weight=torch.ones(34, 66)), TypeError, "fc2_weight must be torch.float64 .*; got torch.float32"),
        (bad(fc2_weight=None), TypeError, "fc2_weight must be a Tensor; got NoneType"),
        (bad(fc1_weight=torch.ones(66, 35, requires_grad=True).double()), ValueError, "fc1_weight must be frozen"),
        (bad(fc2_scale_row=torch.ones(35, 2).double()), ValueError, r"fc2_scale_row must be .* with N = 34"),
        (bad(fc1_scale_col=torch.ones(2, 36).double()), ValueError, "fc1_scale_col must be .* with K = 35"),
        (bad(fc2_bias=torch.ones(66).double()), ValueError, r"fc2_bias must be \[N\] with N = 34; got shape \(66,\)"),
        (bad(fc1_bias=torch.ones(66, device="meta")), ValueError, "fc1_bias must be on the device of x"),
        (bad(fc2_scale_grad_rows=0.5), TypeError, "fc2_scale_grad_rows must be a RowSample or None; got float"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        rlrr_mlp(**arguments)
    with pytest.raises(ValueError, match="input_activation must be one of"):
        rlrr_linear(torch.ones(2, 3), torch.ones(4, 3), None, None, input_activation="relu")
