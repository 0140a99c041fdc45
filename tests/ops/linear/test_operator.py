"""``rlrr_linear`` as a citizen of PyTorch: compile, export, autocast, checkpointing, torch.func, and what it keeps."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import RLRRLinear, backends, rlrr_linear, use_backend
from rlrr_kernels.numerics import Case, outputs
from rlrr_kernels.reference import rlrr_linear_reference
from tests.support.implementations import BACKENDS

pytestmark = pytest.mark.interpreted

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
LEAVES = ("x", "scale_row", "scale_col", "bias")


def problem(**changes) -> dict[str, torch.Tensor]:
    return Case(**{"rows": 6, "out_features": 12, "in_features": 10, "rank": 2, "groups": 3} | changes).draw(0)


def leaves_of(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name].detach().requires_grad_() for name in LEAVES]


# ---------------------------------------------------------------- the registered operator


@on_every_backend
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=2)), ids=str)
def test_opcheck(backend: str, wanted: tuple[bool, bool]):
    tensors = problem()
    x, row, col, bias = leaves_of(tensors)
    x.requires_grad_(wanted[0])
    row.requires_grad_(wanted[1])
    args = (x, tensors["weight"], row, col, bias if wanted[0] else None, True, backend)
    torch.library.opcheck(torch.ops.rlrr_kernels.linear.default, args)
    needs = [*wanted, True, True]
    args = (tensors["grad_y"], x.detach(), tensors["weight"], row.detach(), col.detach(), True, backend, needs)
    # Its autograd is an error by design, so there is nothing to trace through the backward.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rlrr_kernels.linear_backward.default, args, test_utils=tests)


def test_the_operator_takes_canonical_shapes_only():
    tensors = problem(rank=1, groups=1)
    with pytest.raises(ValueError, match=r"scale_row \[N, r\]"):
        torch.ops.rlrr_kernels.linear(tensors["x"], tensors["weight"], tensors["scale_row"][:, 0], tensors["scale_col"])


@on_every_backend
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(backend: str, compiler: str, dynamic: bool):
    tensors = problem()

    def step(x, row, col, bias):
        y = rlrr_linear(x.relu(), tensors["weight"], row, col, bias, backend=backend)
        return (F.gelu(y) * tensors["grad_y"][0]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for count in (6, 9):
        x = torch.randn(count, 10)
        results = []
        for function in (step, compiled):
            leaves = leaves_of(tensors | {"x": x})
            results.append([function(*leaves), *torch.autograd.grad(function(*leaves), leaves)])
        torch.testing.assert_close(*results)


@pytest.mark.skipif(backends.INTERPRETING, reason="seen by an error that the interpreter's presence removes")
def test_compiled_code_follows_use_backend():
    tensors = problem()
    function = torch.compile(
        lambda x: rlrr_linear(x, tensors["weight"], tensors["scale_row"], tensors["scale_col"]),
        fullgraph=True,
        backend="aot_eager",
    )
    function(tensors["x"])
    with use_backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET"):
        function(tensors["x"])


def test_eager_calls_of_other_layouts_compile_nothing_again():
    """What eager calls keep is no part of a compiled function: guards on it would grow with it."""
    tensors = problem()
    layer = RLRRLinear(10, 12, groups=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = compiled(tensors["x"])
    for rows in range(7, 20):
        layer(torch.randn(rows, 10))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(tensors["x"]), expected)


@on_every_backend
def test_export(backend: str):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = RLRRLinear(10, 12, groups=3)

        def forward(self, x):
            return self.layer(x).relu()

    model, x = Model().eval(), torch.randn(4, 10)
    with use_backend(backend):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        larger = torch.randn(7, 10)
        torch.testing.assert_close(program.module()(larger), model(larger))
    assert "rlrr_kernels.linear.default" in program.graph_module.code


# ---------------------------------------------------------------- autograd and its neighbours


@on_every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend: str, reentrant: bool):
    tensors = problem()
    plain, again = leaves_of(tensors), leaves_of(tensors)

    def function(x, row, col, bias):
        return rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend).square().sum()

    function(*plain).backward()
    checkpoint(function, *again, use_reentrant=reentrant).backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


@on_every_backend
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, context):
    tensors = problem()
    x, row, col, bias = leaves_of(tensors)
    with context():
        y = rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend)
    assert not y.requires_grad
    torch.testing.assert_close(y, rlrr_linear_reference(x, tensors["weight"], row, col, bias).detach())


@on_every_backend
def test_func_grad_and_vmap(backend: str):
    layer = RLRRLinear(10, 12, rank=2, groups=3)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(5, 4, 10)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with use_backend(backend):
        per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(parameters, x)
        for index in range(5):
            layer.zero_grad()
            sample = x[index].clone().requires_grad_()
            layer(sample).square().sum().backward()
            for name in parameters:
                torch.testing.assert_close(per_sample[0][name][index], layer.get_parameter(name).grad)
            torch.testing.assert_close(per_sample[1][index], sample.grad)
        ensemble = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
        batched = torch.func.vmap(torch.func.functional_call, (None, 0, None))(layer, ensemble, (x,))
        doubled = torch.func.functional_call(layer, {name: 2 * p for name, p in parameters.items()}, (x,))
        torch.testing.assert_close(batched[1], doubled)
        torch.testing.assert_close(torch.func.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))


@on_every_backend
def test_what_cannot_be_differentiated_says_so(backend: str):
    tensors = problem()
    x, row, col, bias = leaves_of(tensors)

    def public(x):
        return rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend).square().sum()

    def operator(x):
        return torch.ops.rlrr_kernels.linear(x, tensors["weight"], row, col, bias, True, backend).square().sum()

    with pytest.raises(NotImplementedError, match="differentiated only once"):
        torch.autograd.grad(operator(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        torch.func.grad(lambda x: torch.func.grad(public)(x).sum())(x.detach())
    for function in (public, operator):
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(function, (x.detach(),), (x.detach(),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
            words = "no forward-mode derivative" if function is public else "forward"
            with pytest.raises((NotImplementedError, RuntimeError), match=words):
                function(dual)


@on_every_backend
def test_a_tensor_left_over_from_a_transform(backend: str):
    """What escaped from ``torch.func.grad`` is an ordinary tensor again, in every call."""
    tensors, kept = problem(), []
    torch.func.grad(lambda x: kept.append(x * 2) or x.sum())(tensors["x"])
    scale = tensors["scale_row"].clone().requires_grad_()
    results = []
    for x in (tensors["x"] * 2, kept[0], kept[0]):
        y = rlrr_linear(x, tensors["weight"], scale, tensors["scale_col"], tensors["bias"], backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), scale)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@on_every_backend
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10)])
def test_the_output_may_be_modified_in_place(backend: str, shape: tuple[int, ...]):
    tensors = problem()
    row = tensors["scale_row"].requires_grad_()
    y = rlrr_linear(torch.randn(shape), tensors["weight"], row, tensors["scale_col"], backend=backend)
    y.add_(1).sum().backward()
    assert row.grad is not None


# ---------------------------------------------------------------- autocast and precision


@on_every_backend
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_autocast_does_what_linear_does(backend: str, weight_dtype: torch.dtype):
    tensors = problem(rows=20, weight_dtype=weight_dtype)
    low = torch.float16
    plain, operator = [leaves_of(tensors) for _ in range(2)]
    with torch.autocast("cpu", low):
        x, row, col, bias = plain
        y = rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend)
        assert y.dtype == F.linear(x, tensors["weight"]).dtype == low
        x, row, col, bias = operator
        again = torch.ops.rlrr_kernels.linear(x, tensors["weight"], row, col, bias, True, backend)
        # Backward inside the block too: the products in it must not be cast.
        for result in (y, again):
            result.backward(tensors["grad_y"].to(low))
    assert torch.equal(y, again)
    cast = tensors | {"x": tensors["x"].to(low), "grad_y": tensors["grad_y"].to(low)}
    exact = outputs(partial(rlrr_linear, backend=backend), cast, True)
    assert torch.equal(y, exact["y"])
    for name, leaf, other in zip(LEAVES, plain, operator, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert torch.equal(leaf.grad, exact[name].to(leaf.dtype)), name
        assert torch.equal(leaf.grad, other.grad), name


def test_autocast_leaves_float64_alone():
    tensors = problem(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = rlrr_linear(tensors["x"], tensors["weight"], tensors["scale_row"], tensors["scale_col"])
    assert y.dtype == torch.float64


# ---------------------------------------------------------------- memory


def resident_bytes() -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # a block of scratch that was given back may stay with glibc
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(backends.INTERPRETING, reason="the interpreter's own copies are not the kernels'")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "." not in name])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_nothing_the_size_of_the_weight_is_alive_after_the_forward(backend: str, low: torch.dtype | None):
    size = 3072  # a weight of 38 MB, so that allocator noise does not count
    layer = RLRRLinear(size, size, bias=False)
    x = torch.randn(4, size, requires_grad=True)  # without its gradient nothing would need W' again

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None), use_backend(backend):
            return layer(x)

    def kept() -> int:
        before = resident_bytes()
        y = forward()
        assert y.requires_grad
        return resident_bytes() - before

    forward().sum().backward()  # thread pools, packed buffers and gradients exist from here on
    layer.zero_grad(set_to_none=False)
    # The least of a few: the allocator takes pages at times of its own, the layer would keep something at every call.
    least = min(kept() for _ in range(3))
    assert least < layer.weight.nbytes / 10, f"{least / 1e6:.0f} MB"


@on_every_backend
def test_saved_for_backward(backend: str):
    tensors = problem(rows=300)
    x, row, col, bias = leaves_of(tensors)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = rlrr_linear(x, tensors["weight"], row, col, bias, backend=backend)
        storages = {t.untyped_storage().data_ptr() for t in packed}
        assert storages == {t.untyped_storage().data_ptr() for t in (x, tensors["weight"], row, col)}
        packed.clear()
        y = rlrr_linear(x, tensors["weight"], row.detach(), col.detach(), backend=backend)
        assert x.data_ptr() not in {t.data_ptr() for t in packed}, "x is kept without a scale to train"
    assert y.requires_grad


# ---------------------------------------------------------------- copies, choices, bad input


def test_deepcopy_and_pickle():
    layer = RLRRLinear(10, 12, rank=2, groups=3)
    x = torch.randn(4, 10)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert [n for n, p in twin.named_parameters() if p.requires_grad] == ["scale_row", "scale_col", "shift"]


def test_backend_names(monkeypatch: pytest.MonkeyPatch):
    tensors = problem()
    call = partial(rlrr_linear, tensors["x"], tensors["weight"], tensors["scale_row"], tensors["scale_col"])
    with pytest.raises(ValueError, match="backend must be one of auto, triton"):
        call(backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("cuda"):
        pass
    monkeypatch.setattr(backends, "_default", "torch")
    assert backends.resolve("auto", "cpu", torch.float32) == "torch"
    monkeypatch.setattr(backends, "_default", "nonsense")
    with pytest.raises(ValueError, match="RLRR_BACKEND must be one of"):
        call()
    monkeypatch.setattr(backends, "_default", "auto")
    assert backends.resolve("auto", "mps", torch.float32) == "torch"
    if not backends.INTERPRETING:
        with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
            call(backend="triton")


@pytest.mark.skipif(not backends.INTERPRETING, reason="needs TRITON_INTERPRET=1")
def test_bfloat16_is_refused_under_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "rlrr_kernels.ops.host.launch.REFUSED_BY_INTERPRETER", frozenset((torch.bfloat16,))
    )  # lifted for the tests
    tensors = problem(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes wrongly"):
        rlrr_linear(tensors["x"], tensors["weight"], tensors["scale_row"], tensors["scale_col"], backend="triton")


def bad(**changes):
    tensors = problem()
    tensors.pop("grad_y")
    return tensors | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(x=[1.0]), TypeError, "x must be a Tensor; got list"),
        (bad(weight=1.0), TypeError, "weight must be a Tensor; got float"),
        (bad(scale_row=1.0), TypeError, "scale_row must be a Tensor; got float"),
        (bad(x=torch.ones(6, 10, dtype=torch.int64)), TypeError, "x must be float32, .*; got torch.int64"),
        (bad(x=torch.ones(6, 10, dtype=torch.complex64)), TypeError, "x must be float32, .*; got torch.complex64"),
        (bad(x=torch.ones(6, 11)), ValueError, r"x must be \[..., K\] with K = 10 .*; got shape \(6, 11\)"),
        (bad(x=torch.ones(())), ValueError, r"x must be \[..., K\]"),
        (bad(weight=torch.ones(12)), ValueError, r"weight must be \[N, K\]; got shape \(12,\)"),
        (bad(weight=torch.ones(12, 10, dtype=torch.float64)), TypeError, "weight must be torch.float32 for x of"),
        (bad(weight=torch.ones(12, 10, requires_grad=True)), ValueError, "weight must be frozen"),
        (bad(scale_row=torch.ones(11, 2)), ValueError, r"scale_row must be \[N\] or \[N, r\] with N = 12"),
        (bad(scale_row=torch.ones(12, 65), scale_col=torch.ones(65, 10)), ValueError, "rank r from 1 to 64"),
        (bad(scale_row=torch.ones(12, 0), scale_col=torch.ones(0, 10)), ValueError, "rank r from 1 to 64"),
        (bad(scale_row=torch.ones(12, 2).int()), TypeError, "scale_row must be torch.float32"),
        (bad(scale_col=torch.ones(3, 2, 11)), ValueError, r"scale_col must be .* with K = 10; got shape \(3, 2, 11\)"),
        (bad(scale_col=torch.ones(3, 4, 10)), ValueError, r"with r = 2 with K = 10"),
        (bad(scale_col=torch.ones(5, 2, 10)), ValueError, "G = 5 groups, which must divide N = 12"),
        (bad(scale_col=torch.ones(2, 10).half()), TypeError, "scale_col must be torch.float32"),
        (bad(bias=torch.ones(10)), ValueError, r"bias must be \[N\] with N = 12; got shape \(10,\)"),
        (bad(bias=torch.ones(12, device="meta")), ValueError, "bias must be on the device of x, cpu; got meta"),
        (bad(weight=torch.ones(12, 10, device="meta")), ValueError, "weight must be on the device of x, cpu; got meta"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        rlrr_linear(**arguments)


def test_tracing_with_symbolic_sizes():
    layer = RLRRLinear(16, 8)
    graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(4, 16))
    assert "rlrr_kernels.linear" in graph.code
    x = torch.randn(7, 16)
    torch.testing.assert_close(graph(x), layer(x))


def test_a_former_name_of_a_backend_still_chooses_it():
    assert backends.check_name("triton.one_pass", "backend") == "triton.fused"
    with use_backend("triton.one_pass"):
        assert backends.default_backend() == "triton.fused"
    with pytest.raises(ValueError, match=r"must be one of auto, triton, triton\.fused, "):
        backends.check_name("triton.two_pass", "backend")
