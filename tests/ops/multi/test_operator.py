"""``rlrr_linear_multi``: every form of its arguments against the formula in float64, errors, and what calls it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rlrr_kernels import TaskIndex, rlrr_linear, rlrr_linear_multi
from rlrr_kernels.numerics import MultiCase, check_bound, check_error_rule
from rlrr_kernels.ops.multi import loop_backend
from rlrr_kernels.reference import rlrr_linear_multi_reference
from tests.support.implementations import BACKENDS, DTYPES

N, K, T = 66, 40, 5
INDICES = {
    "unsorted": [3, -1, 0, 3, 0, -1, 4],
    "grouped": [4, 4, 4, -1, 0, 0, 2],
    "bare": [-1] * 7,
    "one": [2] * 7,
    "all": [0, 1, 2, 3, 4, -1, 0],
    "empty": [],
}
FORMS = [(None, None), (None, 3), (3, None), (17, 2)]


@pytest.fixture(params=BACKENDS)
def backend(request, poisoned_memory):
    return request.param


def draw(index, *shape, rank=None, groups=None, dtype=torch.float64, tasks=T, bias=True, shift=True):
    """Arguments of a call: x [S, *shape, K] and stacks of one of the forms."""
    generator = torch.Generator().manual_seed(len(index) + tasks)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    ranks = () if rank is None else (rank,)
    return {
        "x": normal(len(index), *shape, K),
        "weight": normal(N, K, scale=K**-0.5),
        "scale_row": normal(tasks, N, *ranks),
        "scale_col": normal(tasks, *(() if groups is None else (groups,)), *ranks, K),
        "bias": normal(N) if bias else None,
        "shift": normal(tasks, N) if shift else None,
    }


def run(function, tensors, **options):
    """y and the gradients of all but the weight under a fixed upstream gradient."""
    leaves = {k: None if v is None else v.detach().requires_grad_(k != "weight") for k, v in tensors.items()}
    y = function(*leaves.values(), **options)
    if y.numel() == 0:
        return {"y": y.detach()}
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    wanted = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize(("rank", "groups"), FORMS)
def test_equals_the_formula_with_gradients(backend, name, rank, groups):
    index = torch.tensor(INDICES[name], dtype=torch.int64)
    tensors = draw(index, 3, rank=rank, groups=groups)
    expected = run(rlrr_linear_multi_reference, tensors, index=index)
    for given in (index, index.int(), TaskIndex(index), TaskIndex(INDICES[name])):
        close(run(rlrr_linear_multi, tensors, index=given, backend=backend), expected)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (2, 20)])
def test_samples_of_any_number_of_dimensions_and_strides(backend, shape):
    index = torch.tensor(INDICES["unsorted"])
    tensors = draw(index, *shape, dtype=torch.float32, rank=2, groups=3)
    expected = run(rlrr_linear_multi_reference, {k: v.double() for k, v in tensors.items()}, index=index)
    strided = {
        k: v.movedim(-1, 0).contiguous().movedim(0, -1) if v.dim() > 1 else v.repeat_interleave(2)[::2]
        for k, v in tensors.items()
    }
    for given in (tensors, strided):
        actual = run(rlrr_linear_multi, given, index=index, backend=backend)
        close({k: v.double() for k, v in actual.items()}, expected, 2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "rank", "groups", "residual"), [(1, 1, 3, True), (7, 4, 1, False), (1, 9, 2, True), (40, 1, 1, True)]
)
def test_error_rule(backend, dtype, rows, rank, groups, residual):
    index = (3, -1, 0, 3, 0, -1, 4, 2)
    case = MultiCase(index, rows, N, 131, T, rank, groups, residual=residual, dtype=dtype)
    bind = {"index": torch.tensor(index)}
    function = functools.partial(rlrr_linear_multi, **bind, backend=backend)
    check_error_rule(function, case, reference=functools.partial(rlrr_linear_multi_reference, **bind))


@pytest.mark.parametrize("rank", [1, 64])
def test_float32_weight_beside_bfloat16(backend, rank):
    index = (1, 0, 1, -1)
    case = MultiCase(index, 5, N, 70, 2, rank, dtype=torch.bfloat16, weight_dtype=torch.float32)
    bind = {"index": torch.tensor(index)}
    function = functools.partial(rlrr_linear_multi, **bind, backend=backend)
    check_error_rule(function, case, reference=functools.partial(rlrr_linear_multi_reference, **bind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [1, 40])
def test_weights_that_cancel_stay_within_the_bound(backend, dtype, per_sample):
    tensors = MultiCase((0, 1, 0), per_sample, N, 131, 2, dtype=dtype, bias=False).draw(0)
    tensors["scale_row"].fill_(1.5), tensors["scale_col"].fill_(-1 / 1.5)
    task = {k: v[0] if k in ("scale_row", "scale_col") else v.flatten(0, 1) if k in ("x", "grad_y") else v
            for k, v in tensors.items() if k != "shift"}  # fmt: skip

    def function(x, weight, row, col, bias, *, residual):
        samples = x.unflatten(0, (3, per_sample))
        stacks = (torch.stack([scale, torch.zeros_like(scale)]) for scale in (row, col))
        index = torch.tensor([0, 0, 0])
        return rlrr_linear_multi(samples, weight, *stacks, bias, index=index, backend=backend).flatten(0, 1)

    check_bound(function, task)


def test_each_sample_is_what_rlrr_linear_makes_of_it(backend):
    """Bit by bit where a task's rows take the same path."""
    index = [2, 0, 2, -1]
    tensors = draw(index, 64, dtype=torch.float32)
    y = rlrr_linear_multi(**tensors, index=TaskIndex(index), backend=backend)
    for task in (0, 2):
        samples = [i for i, number in enumerate(index) if number == task]
        row, col, shift = (tensors[name][task] for name in ("scale_row", "scale_col", "shift"))
        alone = rlrr_linear(
            tensors["x"][samples], tensors["weight"], row, col, tensors["bias"] + shift, backend=backend
        )
        assert torch.equal(y[samples], alone)
    close(y[3], torch.nn.functional.linear(tensors["x"][3], tensors["weight"], tensors["bias"]), 1e-5)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("missing", ["scale_row", "scale_col", "both"])
def test_a_missing_side_stands_for_ones(backend, missing, residual):
    index = torch.tensor(INDICES["all"])
    tensors = draw(index, 2, bias=False)
    names = ("scale_row", "scale_col") if missing == "both" else (missing,)
    ones = tensors | {name: torch.ones_like(tensors[name]) for name in names}
    expected = run(rlrr_linear_multi_reference, ones, index=index, residual=residual)
    without = tensors | dict.fromkeys(names)
    actual = run(rlrr_linear_multi, without, index=index, residual=residual, backend=backend)
    close(actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_scales_of_either_dtype_get_gradients_of_theirs(backend, scale_dtype):
    index = (1, 3, 1, -1)
    case = MultiCase(index, 3, N, 70, 4, 2, dtype=torch.bfloat16, scale_dtype=scale_dtype)
    bind = {"index": torch.tensor(index)}
    function = functools.partial(rlrr_linear_multi, **bind, backend=backend)
    check_error_rule(function, case, reference=functools.partial(rlrr_linear_multi_reference, **bind))
    drawn = case.draw(0)
    grads = run(function, {k: drawn[k] for k in ("x", "weight", "scale_row", "scale_col", "bias", "shift")})
    assert grads["scale_row"].dtype == grads["shift"].dtype == scale_dtype
    assert not grads["scale_row"][[0, 2]].any()
    assert not grads["scale_col"][[0, 2]].any()
    assert not grads["shift"][[0, 2]].any()


@pytest.mark.parametrize("wanted", ["x", "scale_row", "scale_col", "bias", "shift"])
def test_only_the_gradient_asked_for(backend, wanted):
    index = torch.tensor(INDICES["unsorted"])
    tensors = draw(index, 2, rank=2)
    expected = run(rlrr_linear_multi_reference, tensors, index=index)[wanted]
    leaf = tensors[wanted].requires_grad_()
    y = rlrr_linear_multi(**tensors, index=index, backend=backend)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    close(torch.autograd.grad(y, leaf, upstream)[0], expected)


def test_the_result_may_be_modified_in_place(backend):
    tensors = draw([0, 1, 0], 2)
    tensors["x"].requires_grad_()
    y = rlrr_linear_multi(**tensors, index=TaskIndex([0, 1, 0]), backend=backend)
    y += 1
    y.sum().backward()
    assert tensors["x"].grad.abs().sum() > 0


# ---------------------------------------------------------------- many adapters


def test_adapters_without_rows_are_never_read(backend):
    index, tasks = torch.tensor([7, 7777, -1, 7]), 10_000
    row, col, shift = (torch.full((tasks, size), float("nan")) for size in (N, K, N))
    small = draw(index, 2, dtype=torch.float32, tasks=2)
    for big, name in ((row, "scale_row"), (col, "scale_col"), (shift, "shift")):
        big[[7, 7777]] = small[name]
    leaves = [tensor.requires_grad_() for tensor in (row, col, shift)]
    y = rlrr_linear_multi(small["x"], small["weight"], row, col, small["bias"], shift, index=index, backend=backend)
    few = torch.tensor([0, 1, -1, 0])
    close(y, rlrr_linear_multi(**small, index=few, backend=backend), 1e-6)
    for grad in torch.autograd.grad(y.sum(), leaves):
        used = torch.zeros(tasks, dtype=torch.bool)
        used[[7, 7777]] = True
        assert grad[used].abs().sum() > 0
        assert not grad[~used].any()


def test_memory_does_not_grow_with_the_adapters(backend):
    """Nothing of the size of the stacks is made in a forward."""
    tasks = 4000
    row, col = torch.zeros(tasks, N), torch.zeros(tasks, K)
    x, weight = torch.randn(3, 4, K), torch.randn(N, K)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        rlrr_linear_multi(x, weight, row, col, index=torch.tensor([0, 3999, 7]), backend=backend)
    largest = max(event.cpu_memory_usage for event in profiled.key_averages())
    assert 0 < largest < row.numel() * 4 / 4


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"index": torch.tensor([0, 5, 1])},
            IndexError,
            r"index must hold values from -1 to T - 1 = 4; got 5 for sample",
        ),
        ({"index": torch.tensor([0, -2, 1])}, IndexError, "index must hold values from -1; got -2 for sample 1"),
        (
            {"index": torch.tensor([0.0, 1, 1])},
            TypeError,
            "index must be torch.int32 or torch.int64; got torch.float32",
        ),
        ({"index": torch.tensor([[0, 1, 1]])}, ValueError, r"index must be \[S\], one adapter a sample; got shape"),
        ({"index": torch.tensor([0, 1])}, ValueError, r"index must be \[S\] with S = 3 .* got S = 2"),
        ({"index": [0, 1, 1]}, TypeError, "index must be a Tensor or a TaskIndex; got list"),
        ({"index": TaskIndex([0])}, ValueError, "got S = 1"),
        ({"x": torch.ones(K)}, ValueError, r"x must be \[S, ..., K\], S samples"),
        ({"x": torch.ones(3, K + 1)}, ValueError, r"x must be \[..., K\] with K = 40"),
        ({"scale_row": torch.ones(N)}, ValueError, r"scale_row must be \[T, N\] or \[T, N, r\] with N = 66"),
        ({"scale_row": torch.ones(T, N, 65)}, ValueError, "rank r from 1 to 64"),
        ({"scale_col": torch.ones(T, 2, 2, K)}, ValueError, r"scale_col must be \[T, K\] or \[T, G, K\] with K = 40"),
        ({"scale_col": torch.ones(T, 4, K)}, ValueError, "G = 4 groups, which must divide N = 66"),
        ({"scale_col": torch.ones(T + 1, K)}, ValueError, "scale_row has T = 5, scale_col has T = 6, shift has T = 5"),
        ({"scale_row": None, "scale_col": None, "shift": None}, ValueError, "must not all be None"),
        ({"shift": torch.ones(N)}, ValueError, r"shift must be \[T, N\] with N = 66"),
        ({"shift": torch.ones(T, N).half()}, TypeError, "shift must be torch.float32"),
        ({"shift": "f"}, TypeError, "shift must be a Tensor; got str"),
        ({"bias": torch.ones(T, N)}, ValueError, r"bias must be \[N\]"),
        ({"weight": torch.ones(N, K).requires_grad_()}, ValueError, "weight must be frozen"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(changed, error, message):
    arguments = draw([0, 1, 1], dtype=torch.float32) | {"index": torch.tensor([0, 1, 1])}
    with pytest.raises(error, match=message):
        rlrr_linear_multi(**(arguments | changed))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, -2], IndexError, "got -2 for sample 1"),
        ([0, True], TypeError, r"got \[0, True\]"),
        ("01", TypeError, "a Tensor or a sequence of integers; got str"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"\[S\]"),
        (torch.zeros(2), TypeError, "torch.float32"),
    ],
)
def test_task_index_refuses(index, error, message):
    with pytest.raises(error, match=message):
        TaskIndex(index)


def test_task_index_groups_samples_that_are_no_neighbours():
    index = TaskIndex([2, -1, 0, 2, 0])
    assert index.segments == ((-1, 0, 1), (0, 1, 3), (2, 3, 5))
    assert index.order.tolist() == [1, 2, 4, 0, 3]  # stable
    assert index.order[index.inverse].tolist() == [0, 1, 2, 3, 4]
    assert index.rows(3).segments == ((-1, 0, 3), (0, 3, 9), (2, 9, 15))
    assert index.rows(3, grouped=False).segments == ((-1, 3, 6), (0, 6, 9), (0, 12, 15), (2, 0, 3), (2, 9, 12))
    assert index.rows(3) is index.rows(3)
    grouped = TaskIndex([2, 2, -1, 0])
    assert grouped.order is None
    assert grouped.segments == ((2, 0, 2), (-1, 2, 3), (0, 3, 4))
    assert TaskIndex([]).segments == ()
    values = torch.tensor([1, 0], dtype=torch.int32)
    kept = TaskIndex(values)
    values.zero_()
    assert kept.index.tolist() == [1, 0]


# ---------------------------------------------------------------- a citizen of PyTorch


def operator_arguments(dtype=torch.float32):
    tensors = draw(INDICES["unsorted"], 2, rank=2, groups=3, dtype=dtype)
    return [*tensors.values(), torch.tensor(INDICES["unsorted"])]


def test_opcheck(backend):
    arguments = operator_arguments()
    for position in (0, 2, 3, 4, 5):
        arguments[position].requires_grad_()
    torch.library.opcheck(torch.ops.rlrr_kernels.linear_multi.default, (*arguments, True, backend))
    frozen = [argument.detach() for argument in arguments]
    grad_y = torch.randn(7, 2, N)
    run = torch.ops.rlrr_kernels.linear_multi_backward.default
    for needs in ([True] * 5, [True, False, False, False, True]):
        torch.library.opcheck(run, (grad_y, *frozen[:4], frozen[6], True, backend, needs))


def test_gradcheck_and_second_derivatives():
    index = torch.tensor([1, -1, 0])
    x, weight, row, col, bias, shift = (t[..., :6] if t.shape[-1] == K else t for t in draw(index, 2, tasks=2).values())
    weight, row, bias, shift = weight[:4], row[:, :4], bias[:4], shift[:, :4]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, row, col, bias, shift)]

    def function(x, *others):
        return rlrr_linear_multi(x, weight, *others, index=index)

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("of", ["x", "scale_row", "scale_col", "bias", "shift"])
def test_a_jacobian_of_one_argument_alone_by_batches_of_gradients(of):
    index = INDICES["unsorted"]
    tensors, index = draw(index, 2, rank=2), torch.tensor(index)
    tensors = {key: value[..., :4] if key in ("x", "weight", "scale_col") else value for key, value in tensors.items()}

    def function(value):
        return rlrr_linear_multi(**{**tensors, of: value}, index=index)[:, :, :3]

    vectorized, in_a_loop = (
        torch.autograd.functional.jacobian(function, tensors[of], vectorize=vectorize) for vectorize in (True, False)
    )
    torch.testing.assert_close(vectorized, in_a_loop)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    def step(x, weight, row, col, bias, shift, index):
        y = rlrr_linear_multi(x, weight, row, col, bias, shift, index=index, backend=backend)
        return torch.autograd.grad(y.square().sum(), (x, row, col, bias, shift))

    def eager(*arguments):
        leaves = [t.detach().requires_grad_(i not in (1, 6)) for i, t in enumerate(arguments)]
        return step(*leaves)

    compiled = torch.compile(
        lambda *arguments: rlrr_linear_multi(*arguments[:6], index=arguments[6], backend=backend),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for name in ("unsorted", "all", "bare") if not dynamic else ("unsorted",):
        for size in (7, 4) if dynamic else (7,):
            index = INDICES[name][:size]
            arguments = [*draw(index, 2, rank=2, dtype=torch.float32).values(), torch.tensor(index)]
            leaves = [t.detach().requires_grad_(i not in (1, 6)) for i, t in enumerate(arguments)]
            y = compiled(*leaves)
            close(y.detach(), rlrr_linear_multi(*arguments[:6], index=arguments[6], backend=backend), 1e-6)
            wanted = [leaf for i, leaf in enumerate(leaves) if i not in (1, 6)]
            close(torch.autograd.grad(y.square().sum(), wanted), eager(*arguments), 1e-5)


def test_compiled_calls_check_the_values_of_an_index():
    arguments = operator_arguments()
    compiled = torch.compile(lambda *a: rlrr_linear_multi(*a[:6], index=a[6]), fullgraph=True, backend="aot_eager")
    compiled(*arguments)
    with pytest.raises(IndexError, match="got 9 for sample 0"):
        compiled(*arguments[:6], torch.full((7,), 9))


def test_a_task_index_serves_compiled_layers():
    arguments = operator_arguments()
    index = TaskIndex(arguments[6])
    compiled = torch.compile(lambda *a: rlrr_linear_multi(*a, index=index), fullgraph=True, backend="aot_eager")
    close(compiled(*arguments[:6]), rlrr_linear_multi(*arguments[:6], index=index), 1e-6)


def test_export_with_any_number_of_samples():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in draw([0], dtype=torch.float32).items():
                self.register_buffer(name, tensor)

        def forward(self, samples, index):
            _, *tensors = self.buffers()
            return rlrr_linear_multi(samples, *tensors, index=index)

    layer, samples = Layer(), torch.export.Dim("samples", min=2)
    x, index = torch.randn(3, 2, K), torch.tensor([0, 4, -1])
    program = torch.export.export(layer, (x, index), dynamic_shapes=({0: samples}, {0: samples}))
    for size in (3, 5):
        x, index = torch.randn(size, 2, K), torch.arange(size) - 1
        close(program.module()(x, index), layer(x, index), 1e-6)


def test_autocast_casts_as_linear_does():
    tensors = draw([0, 1, -1], 2, dtype=torch.float32)
    index = torch.tensor([0, 1, -1])
    with torch.autocast("cpu", torch.bfloat16):
        y = rlrr_linear_multi(**tensors, index=index)
        operator = torch.ops.rlrr_kernels.linear_multi(
            tensors["x"], tensors["weight"], tensors["scale_row"][..., None], tensors["scale_col"][:, None, None],
            tensors["bias"], tensors["shift"], index,
        )  # fmt: skip
    assert y.dtype == operator.dtype == torch.bfloat16
    assert torch.equal(y, operator)
    exact = rlrr_linear_multi(**tensors, index=index)
    assert (y - exact).norm() / exact.norm() < 1e-2


def test_a_flop_counter_sees_one_product():
    tensors = draw([0, 1, -1], 2, dtype=torch.float32)
    leaves = [tensors[name].requires_grad_() for name in ("x", "scale_row")]
    product = 2 * 3 * 2 * N * K
    with FlopCounterMode(display=False) as counter:
        y = rlrr_linear_multi(**tensors, index=TaskIndex([0, 1, -1]))
    assert counter.get_total_flops() == product
    y = rlrr_linear_multi(**tensors, index=TaskIndex([0, 1, -1]))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), leaves)
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize("inside", [False, True])
def test_transforms_are_refused(inside: bool):
    tensors, index = draw([0, 1, -1], 2), TaskIndex([0, 1, -1])

    def loss(x):
        return rlrr_linear_multi(**(tensors | {"x": x}), index=TaskIndex([0, 1, -1]) if inside else index).sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(loss)(tensors["x"])


def test_tensors_without_values():
    tensors = draw([0, 1, -1], 2, dtype=torch.bfloat16)
    index = torch.tensor([0, 1, -1])
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for given in (index, index.to("meta"), TaskIndex(index)):
        y = rlrr_linear_multi(**meta, index=given)
        assert (y.shape, y.dtype, y.device.type) == ((3, 2, N), torch.bfloat16, "meta")
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        y = rlrr_linear_multi(**fake, index=mode.from_tensor(index))
        assert (y.shape, y.dtype) == ((3, 2, N), torch.bfloat16)


# ---------------------------------------------------------------- calls of a layout that is known


def test_eager_calls_of_other_layouts_compile_nothing_again():
    arguments = operator_arguments()
    compiled = torch.compile(lambda *a: rlrr_linear_multi(*a[:6], index=a[6]), fullgraph=True, backend="aot_eager")
    expected = compiled(*arguments)
    for samples in range(1, 9):
        rlrr_linear_multi(**draw([0] * samples), index=TaskIndex([0] * samples))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*arguments), expected)


def test_what_a_known_layout_does_not_cover_is_still_checked():
    tensors, index = draw([0, 1, -1], 2, dtype=torch.float32), TaskIndex([0, 1, -1])
    for _ in range(2):
        y = rlrr_linear_multi(**tensors, index=index)
    with pytest.raises(IndexError, match="got 7 for sample 1"):
        rlrr_linear_multi(**tensors, index=TaskIndex([0, 7, -1]))
    with pytest.raises(ValueError, match="got S = 2"):
        rlrr_linear_multi(**tensors, index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="must stack as many adapters each"):
        rlrr_linear_multi(**(tensors | {"shift": tensors["shift"][:3]}), index=index)
    with pytest.raises(ValueError, match="backend"):
        rlrr_linear_multi(**tensors, index=index, backend="abacus")
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: rlrr_linear_multi(**(tensors | {"x": x}), index=index))(tensors["x"][None])
    with torch.autocast("cpu", torch.bfloat16):
        assert rlrr_linear_multi(**tensors, index=index).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        rlrr_linear_multi(**tensors, index=index)
    assert counter.get_total_flops() == 2 * 3 * 2 * N * K
    without = rlrr_linear_multi(**tensors, index=index, residual=False)
    assert not torch.equal(without[0], y[0])
    assert torch.equal(without[2], y[2])
    tensors["weight"].requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        rlrr_linear_multi(**tensors, index=index)
    with torch.no_grad():
        assert torch.equal(rlrr_linear_multi(**tensors, index=index), y)


def test_other_values_in_a_known_layout(backend):
    index = TaskIndex([2, -1, 2, 0])
    for factor in (1, 3):
        tensors = {name: factor * tensor for name, tensor in draw([2, -1, 2, 0], 3).items()}
        expected = run(rlrr_linear_multi_reference, tensors, index=index.index)
        for _ in range(2):
            close(run(functools.partial(rlrr_linear_multi, backend=backend), tensors, index=index), expected)


class Tagged(Tensor):
    """A subclass without a meaning of its own."""


@pytest.mark.parametrize("name", ["x", "weight", "scale_row"])
def test_tensors_of_other_types(backend, name):
    tensors = draw([0, 1, -1], 2)
    index = TaskIndex([0, 1, -1])
    expected = rlrr_linear_multi(**tensors, index=index, backend=backend)
    actual = rlrr_linear_multi(**(tensors | {name: tensors[name].as_subclass(Tagged)}), index=index, backend=backend)
    close(actual.as_subclass(Tensor), expected)


def test_lazily_negated_tensors(backend):
    tensors = draw([0, 1, -1], 2)
    index = TaskIndex([0, 1, -1])
    expected = run(rlrr_linear_multi_reference, tensors, index=index.index)["y"]
    negated = tensors | {k: torch._neg_view(-tensors[k]) for k in ("x", "scale_row", "shift")}
    close(rlrr_linear_multi(**negated, index=index, backend=backend), expected)


def test_nothing_is_kept_but_x_and_the_parameters(backend):
    tensors = draw([0, 1, 0], 40, dtype=torch.float32)
    leaves = {k: v.requires_grad_(k != "weight") for k, v in tensors.items()}
    known = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rlrr_linear_multi(**leaves, index=torch.tensor([0, 1, 0]), backend=backend)
    assert kept
    assert all(tensor.untyped_storage().data_ptr() in known for tensor in kept)


def test_the_loop_knows_every_backend():
    """What kernels are held to runs by itself."""
    assert loop_backend.forward.__kwdefaults__ == {"backend": "torch"}
