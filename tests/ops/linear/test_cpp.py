"""The C++ operator for the CPU: every path, instruction set and dtype by the error rule, threads, registration."""

import functools
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from rlrr_kernels import backend_report, backends, rlrr_linear
from rlrr_kernels.backends import CPU_LEVELS
from rlrr_kernels.numerics import Case, cancelling, check_bound, check_error_rule
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from tests.support.levels import LEVELS, eager_for
from tests.support.matmul_precision import switched

pytestmark = pytest.mark.skipif(backends.CPP_FAILURE is not None, reason=str(backends.CPP_FAILURE))

linear_cpp = pytest.importorskip("rlrr_kernels.ops.linear.cpp_backend") if backends.CPP_FAILURE is None else None

PATHS = ("fused", "panels", "library")

# Rows, out_features, in_features: nothing a multiple of a vector or tile, and one that fills them.
SHAPES = ((1, 33, 35), (5, 66, 17), (29, 45, 99), (64, 96, 128), (300, 130, 70))


@pytest.fixture(autouse=True)
def _one_thread_count():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def force_path(monkeypatch):
    """force_path(name) makes the C++ backend take that path, in forward and backward."""

    def force(path):
        for name in ("forward", "backward"):
            monkeypatch.setattr(linear_cpp, name, functools.partial(getattr(linear_cpp, name), path=path))

    return force


def cpp_linear(*args, **kwargs):
    return rlrr_linear(*args, **kwargs, backend="cpp")


def random_arguments(rows=5, out_features=12, in_features=35, rank=2, groups=3, dtype=torch.float32, grad=False):
    case = Case(rows, out_features, in_features, rank=rank, groups=groups, dtype=dtype)
    tensors = case.draw(0)
    grad_y = tensors.pop("grad_y")
    arguments = [tensors[name] for name in ("x", "weight", "scale_row", "scale_col", "bias")]
    for index in (0, 2, 3, 4):
        arguments[index].requires_grad_(grad)
    return arguments, grad_y


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_the_crossovers_between_the_paths(level):
    """The most rows of x for one pass over W and for panels; those of csrc/dispatch.h were measured."""
    library = torch.ops.rlrr_kernels_cpp.cpu_library()
    assert library & 1 or not getattr(torch.cpu, "_is_amx_tile_supported", bool)()

    def most(dtype, rank, backward) -> list[int]:
        weight, rows = torch.empty(64, 64, dtype=dtype), torch.empty(1000, 64, dtype=dtype)
        taken = [linear_cpp.path_of(rows[:count], weight, rank, backward) for count in range(1, 1001)]
        assert taken == sorted(taken, key=PATHS.index)
        return [taken.count("fused"), 1000 - taken.count("library")]

    for backward, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        bf16 = dtype == torch.bfloat16
        tiles, pairs = bf16 and library & 1, bf16 and level == "avx512_bf16"
        if backward:
            few = 8 if level == "portable" else 3 if pairs else 32
            fused = {1: few, 4: few, 5: 0, 64: 0}
        else:
            fused = {1: 4 if not pairs else 3 if tiles else 6, 4: 4, 5: 0, 64: 0}
        for rank, of_one_pass in fused.items():
            if level == "portable":
                panels = 16
            elif tiles:
                panels = 24 + (3 if backward else 2) * rank
            else:
                panels = 384 + 6 * rank if library & 2 and not bf16 else 1000
            assert most(dtype, rank, backward) == [of_one_pass, max(of_one_pass, panels)], (backward, dtype, rank)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(level, path, dtype, shape, force_path):
    if path == "fused" and shape[0] > 64:
        pytest.skip("one pass sums G over the rows of x in one chain: it is for few rows and never chosen here")
    force_path(path)
    rank, groups, residual = {1: (1, 3, True), 5: (3, 1, False), 29: (2, 5, True)}.get(shape[0], (1, 1, True))
    case = Case(*shape, rank=rank, groups=groups, residual=residual, dtype=dtype)
    check_error_rule(cpp_linear, case, reference=eager_for(level))


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(24, 30, 99, rank=2, groups=5),  # two columns share a lane of ∂s_r
        Case(16, 130, 70, rank=8, residual=False),
        Case(20, 66, 130, rank=13, groups=3),  # groups of rows that no tile divides, and a rank that no tile divides
        Case(70, 131, 97, rank=33),
        Case(200, 66, 40, rank=64, groups=2),
    ],
    ids=str,
)
def test_ranks_are_products(level, dtype, case, force_path):
    force_path("panels")
    check_error_rule(cpp_linear, case._replace(dtype=dtype), reference=eager_for(level))


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_chunk(dtype, rank, force_path):
    force_path("panels")
    check_error_rule(cpp_linear, Case(2100, 35, 70, rank=rank, dtype=dtype), seeds=4)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        Case(1030, 70, 450),  # more rows than one chunk of G, more columns than one group of panels
        Case(10, 1100, 65),  # ∂x sums in two depths
        Case(45, 66, 1090, rank=2),  # y sums in two depths
        Case(10, 35, 4170),  # and where few rows have y summed across lanes
    ],
    ids=str,
)
def test_bfloat16_products_longer_than_a_panel(case, weight_dtype):
    check_error_rule(cpp_linear, case._replace(dtype=torch.bfloat16, weight_dtype=weight_dtype), seeds=3)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("threads", [1, 2])
def test_few_rows_of_bfloat16_in_groups(rows, threads, force_path):
    """Groups of an odd number of rows of W, which no block divides; every number of rows of x in a pass."""
    torch.set_num_threads(threads)
    force_path("fused")
    check_error_rule(cpp_linear, Case(rows, 3 * 37, 99, groups=3, dtype=torch.bfloat16, residual=rows != 2))


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 66, 131),  # ∂s_r along a row of W, which four lanes sum in long chains
        Case(2, 66, 131, rank=2),
        Case(2, 35, 65, rank=9),  # ∂s_r of a rank that fills no lanes twice
        Case(1, 131, 16, rank=9),  # columns that eager sums in a tree
        Case(9, 35, 33),  # ∂b of a few rows
        Case(33, 34, 300, rank=9),  # W' of many ranks where there is no FMA
        Case(17, 37, 40, rank=4),  # ∂x of the rows of W that fill no block
    ],
    ids=str,
)
def test_sums_of_few_terms(level, case):
    check_error_rule(cpp_linear, case, reference=eager_for(level))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 9, 17, 33])
@pytest.mark.parametrize("shape", [(66, 131), (35, 65), (131, 16), (70, 300)], ids=str)
def test_sums_of_few_terms_everywhere(level, rank, shape):
    """Weights no smaller: the level without FMA rounds every product once more than eager does where that has one."""
    for rows in (1, 2, 3, 5, 9, 17, 33):
        check_error_rule(cpp_linear, Case(rows, *shape, rank=rank), reference=eager_for(level))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(4, 768, 768), (16, 3072, 768), (64, 768, 3072), (197, 2304, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule_at_vit_shapes(level, path, shape, dtype, force_path):
    if path == "fused" and shape[0] > 64:
        pytest.skip("never chosen here")
    force_path(path)
    check_error_rule(cpp_linear, Case(*shape, groups=3, dtype=dtype), reference=eager_for(level))


@pytest.mark.parametrize(
    "case",
    [
        Case(7, 30, 33, dtype=torch.float16),
        Case(7, 30, 33, dtype=torch.float16, weight_dtype=torch.float32, rank=3),
        Case(7, 30, 33, dtype=torch.float64, rank=2, groups=3),
        Case(7, 30, 33, dtype=torch.bfloat16, weight_dtype=torch.float32, rank=2),
        Case(70, 30, 33, dtype=torch.bfloat16, weight_dtype=torch.float32, groups=2, bias=False),
        Case(7, 30, 33, dtype=torch.bfloat16, scale_dtype=torch.bfloat16),
        Case(9, 70, 65, rank=64, groups=2),
        Case(40, 70, 65, rank=64, groups=2),
    ],
    ids=str,
)
def test_error_rule_for_dtypes_and_ranks(case):
    check_error_rule(cpp_linear, case)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_factor(level, path, dtype, force_path):
    force_path(path)
    check_bound(cpp_linear, cancelling(Case(9, 66, 130, rank=2, dtype=dtype).draw(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(0, 6, 5), (3, 0, 5), (3, 6, 0)])
def test_empty_dimensions(dtype, rows, out_features, in_features):
    arguments, grad_y = random_arguments(rows, out_features, in_features, groups=1, dtype=dtype, grad=True)
    y = cpp_linear(*arguments)
    expected = arguments[4].detach().to(dtype).expand(rows, out_features)
    torch.testing.assert_close(y.detach(), expected)
    y.backward(grad_y)
    for index in (0, 2, 3):
        torch.testing.assert_close(arguments[index].grad, torch.zeros_like(arguments[index]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_strided_arguments(path, rows):
    """x and W with padded rows or transposed, grad_y expanded or transposed: the same numbers as contiguous ones."""
    (x, weight, scale_row, scale_col, bias), grad_y = random_arguments(rows, 30, 37)
    plain = linear_cpp.forward(x, weight, scale_row, scale_col, bias, True, path=path)
    padded_x = torch.full((rows, 50), torch.nan)[:, 5:42].copy_(x)
    for other in (padded_x, x.t().contiguous().t()):
        strided = linear_cpp.forward(other, weight, scale_row, scale_col, bias, True, path=path)
        torch.testing.assert_close(strided, plain)
    padded_weight = torch.full((30, 50), torch.nan)[:, 5:42].copy_(weight)
    other = linear_cpp.forward(x, padded_weight, scale_row, scale_col, bias, True, path=path)
    torch.testing.assert_close(other, plain)

    rest = (weight, scale_row, scale_col, True, (True,) * 4)
    for g in (grad_y.t().contiguous().t(), torch.ones(()).expand(rows, 30), grad_y[:1].expand(rows, 30)):
        strided = linear_cpp.backward(g, padded_x, *rest, path=path)
        for actual, expected in zip(strided, linear_cpp.backward(g.clone(), x, *rest, path=path), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written(path, dtype):
    """Outputs and scratch start as NaN under deterministic fill: whatever is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        (x, weight, scale_row, scale_col, bias), grad_y = random_arguments(21, 45, 67, dtype=dtype)
        y = linear_cpp.forward(x, weight, scale_row, scale_col, bias, True, path=path)
        grads = linear_cpp.backward(grad_y, x, weight, scale_row, scale_col, True, (True,) * 4, path=path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (y, *grads))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 0)])
def test_only_the_gradients_asked_for(path, needs):
    (x, weight, scale_row, scale_col, _), grad_y = random_arguments(20)
    everything = linear_cpp.backward(grad_y, x, weight, scale_row, scale_col, True, (True,) * 4, path=path)
    some = linear_cpp.backward(
        grad_y, x if any(needs[1:3]) else None, weight, scale_row, scale_col, True, tuple(map(bool, needs)), path=path
    )
    for need, actual, expected in zip(needs, some, everything, strict=True):
        assert (actual is not None) == bool(need)
        if need:
            torch.testing.assert_close(actual, expected)


def test_nan_and_infinity_pass_through():
    (x, weight, scale_row, scale_col, bias), _ = random_arguments(4, dtype=torch.bfloat16)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    for path in PATHS:
        y = linear_cpp.forward(x, weight, scale_row, scale_col, bias, True, path=path)
        assert y[0].isnan().all()
        assert not y[1].isfinite().any()
        assert y[2:].isfinite().all()


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_repeatable_for_a_number_of_threads(path, threads):
    torch.set_num_threads(threads)
    (x, weight, scale_row, scale_col, _), grad_y = random_arguments(40, 96, 130)

    def run():
        return linear_cpp.backward(grad_y, x, weight, scale_row, scale_col, True, (True,) * 4, path=path)

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    exact = linear_torch.backward(grad_y, x, weight, scale_row, scale_col, True, (True,) * 4)
    for actual, expected in zip(first, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_concurrent_callers():
    """Threads that share nothing but the code, on every path at once, get what each gets alone."""
    jobs = []
    for path in PATHS:
        for rows, dtype in ((3, torch.float32), (30, torch.bfloat16), (70, torch.float32)):
            (x, weight, scale_row, scale_col, bias), grad_y = random_arguments(
                rows, 60 + rows, 130, dtype=dtype, groups=1
            )

            def run(x=x, weight=weight, row=scale_row, col=scale_col, bias=bias, grad_y=grad_y, path=path):
                y = linear_cpp.forward(x, weight, row, col, bias, True, path=path)
                return y, *linear_cpp.backward(grad_y, x, weight, row, col, True, (True,) * 4, path=path)

            jobs.append((run, run()))
    wrong, start = [], threading.Barrier(len(jobs))

    def repeat(run, expected):
        # A thread's own number of OpenMP threads follows the process default: sums may be split differently.
        start.wait()
        for _ in range(20):
            for actual, other in zip(run(), expected, strict=True):
                if not torch.allclose(actual.float(), other.float(), rtol=1e-2, atol=1e-3):
                    wrong.append((actual, other))

    workers = [threading.Thread(target=repeat, args=job) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---------------------------------------------------------------- registration and choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    arguments, grad_y = random_arguments(dtype=dtype)
    ops, given = torch.ops.rlrr_kernels_cpp, arguments[:4]
    torch.library.opcheck(ops.linear.default, (*arguments, True, 0))
    torch.library.opcheck(ops.linear_backward.default, (grad_y, *given, True, True, True, True, True, 0))
    torch.library.opcheck(ops.linear_backward.default, (grad_y, None, *given[1:], True, True, False, False, False, 0))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(5, 34), "x must be"),
        (0, torch.zeros(5, 35, dtype=torch.float64), "weight must have the dtype of x"),
        (2, torch.zeros(11, 2), "scale_row must be"),
        (3, torch.zeros(5, 2, 35), "scale_col must be"),
        (3, torch.zeros(1, 1, 35), "scale_col must be"),
    ],
)
def test_operator_checks_its_arguments(index, wrong, message):
    arguments, _ = random_arguments()
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlrr_kernels_cpp.linear(*arguments)


def test_auto_chooses_cpp_for_cpu_tensors():
    report = backend_report()
    assert report["devices"]["cpu"]["auto"] == "cpp"
    assert report["cpu_level"] in CPU_LEVELS
    with pytest.raises(ValueError, match="serve cpu tensors"):
        backends.resolve("cpp", "cuda", torch.float32)


def test_fast_float32_products_are_left_to_the_library():
    arguments, _ = random_arguments(64, 64, 64, groups=1)
    with switched("medium"):
        automatic = linear_cpp.forward(*arguments, True)
        library = linear_cpp.forward(*arguments, True, path="library")
    assert torch.equal(automatic, library)


# ---------------------------------------------------------------- the instruction set


def _python(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    return run.stdout + run.stderr


def test_environment_caps_the_level():
    code = "import rlrr_kernels; print(rlrr_kernels.backend_report()['cpu_level'])"
    assert _python(code, RLRR_CPU_LEVEL="portable").strip().endswith("portable")
    assert "must be one of portable" in _python(code, RLRR_CPU_LEVEL="sse9")


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        linear_cpp.set_cpu_level("avx1024")
