"""``rlrr_linear_multi`` in C++: every path and instruction set by the error rule, threads, and what it refuses."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from rlrr_kernels import TaskIndex, backends, rlrr_linear, rlrr_linear_multi
from rlrr_kernels.backends import cpu_level
from rlrr_kernels.numerics import MultiCase, check_error_rule
from rlrr_kernels.reference import rlrr_linear_multi_reference
from tests.support.levels import LEVELS, eager_for
from tests.support.matmul_precision import switched

pytestmark = pytest.mark.skipif(backends.CPP_FAILURE is not None, reason=str(backends.CPP_FAILURE))

if backends.CPP_FAILURE is None:
    from rlrr_kernels.ops.multi import cpp_backend as multi_cpp

INDEX = (3, -1, 0, 3, 0, -1, 4, 1)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def force_path(monkeypatch):
    def force(path):
        monkeypatch.setattr(multi_cpp, "forward", functools.partial(multi_cpp.forward, path=path))

    return force


def holds(case, **options):
    """The error rule for a case whose index is its own."""
    index = torch.tensor(case.index)
    check_error_rule(
        functools.partial(rlrr_linear_multi, index=index, backend="cpp"), case, **options,
        reference=eager_for(cpu_level(), functools.partial(rlrr_linear_multi_reference, index=index)),
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("path", ["fused", "panels"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("case", [
    MultiCase(INDEX, 1, 66, 70, 5, 1, 3),
    MultiCase(INDEX, 2, 99, 70, 5, 4, 3, residual=False),
    MultiCase(INDEX, 1, 35, 99, 5, 9),
    MultiCase(INDEX, 5, 52, 96, 5, 1, 2, bias=False),
])  # fmt: skip
def test_error_rule(level, path, dtype, weight_dtype, case, force_path):
    force_path(path)
    holds(case._replace(dtype=dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "index", [(0,) * 3, (0, 1, 2, 3, 4, 0, 1, -1), (0, 0, 0, 0, 0, 1, 2)], ids=["one", "many", "uneven"]
)
def test_threads_share_tasks_of_many_rows(threads, dtype, index):
    """Few tasks, each shared by all threads, or whole tasks a thread; samples that lie apart, in runs."""
    holds(MultiCase(index, 40, 70, 66, 5, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_panel_and_more_than_a_chunk(dtype):
    holds(MultiCase((1, 0, 1), 1030, 35, 66, 2, dtype=dtype), seeds=2)
    holds(MultiCase((1, 0, 1), 33, 35, 1090, 2, dtype=dtype), seeds=2)
    holds(MultiCase((1, 0, 1), 12, 35, 4170, 2, dtype=dtype), seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(70, 66, 1), (201, 35, 3), (65, 1041, 1)])
@pytest.mark.parametrize(("residual", "bias"), [(True, True), (False, False)])
def test_many_adapters_of_one_row(dtype, rows, cols, groups, residual, bias):
    """Together they have enough rows to lay W out for them."""
    index = (*range(33), -1, 3, 40)
    holds(MultiCase(index, 1, rows, cols, 41, 1, groups, residual=residual, bias=bias, dtype=dtype), seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_for_any_number_of_threads(dtype):
    tensors = MultiCase(INDEX, 40, 70, 66, 5, dtype=dtype).draw(0)
    tensors.pop("grad_y")
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(rlrr_linear_multi(**tensors, index=torch.tensor(INDEX), backend="cpp"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("per_sample", [1, multi_cpp.LEAST_RUN if LEVELS else 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_samples_lie_does_not_matter(per_sample, dtype):
    tensors = MultiCase(INDEX, per_sample, 70, 65, 5, dtype=dtype).draw(0)
    order = torch.tensor(INDEX).argsort(stable=True)
    x = tensors.pop("x")
    tensors.pop("grad_y")
    apart = rlrr_linear_multi(x, **tensors, index=torch.tensor(INDEX), backend="cpp")
    together = rlrr_linear_multi(x[order], **tensors, index=torch.tensor(INDEX)[order], backend="cpp")
    assert torch.equal(apart[order], together)


def test_concurrent_callers():
    kinds = (1, 1, torch.float32), (40, 2, torch.bfloat16), (3, 1, torch.bfloat16), (5, 8, torch.float32)
    cases = [MultiCase(INDEX, rows, 50, 70, 5, rank, dtype=dtype) for rows, rank, dtype in kinds]
    index = TaskIndex(INDEX)

    def step(case):
        drawn = {k: v.requires_grad_(k not in ("weight", "grad_y")) for k, v in case.draw(0).items()}
        grad_y = drawn.pop("grad_y")
        y = rlrr_linear_multi(**drawn, index=index, backend="cpp")
        return [y, *torch.autograd.grad(y, [t for t in drawn.values() if t.requires_grad], grad_y)]

    expected = [step(case) for case in cases]
    wrong = []

    def repeat(case, right):
        for _ in range(10):
            if not all(map(torch.equal, step(case), right)):
                wrong.append(case)

    workers = [threading.Thread(target=repeat, args=job) for job in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_products_that_may_be_rounded_are_left_to_the_library():
    tensors = MultiCase((0, 1), 16, 64, 64, 2).draw(0)
    tensors.pop("grad_y")
    with switched("medium"):
        y = rlrr_linear_multi(**tensors, index=TaskIndex([0, 1]), backend="cpp")
        for task in (0, 1):
            total = tensors["bias"] + tensors["shift"][task]
            arguments = tensors["x"][task], tensors["weight"], tensors["scale_row"][task], tensors["scale_col"][task]
            assert torch.equal(y[task], rlrr_linear(*arguments, total, backend="cpp"))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[0, 0, 3]], "must cover all 4 rows; got 3"),
        ([[0, 0, 5]], "rows up to 4"),
        ([[2, 0, 4]], "tasks from -1 to 1"),
        ([[0, -1, 3]], "rows up to 4"),
    ],
)
def test_the_operator_checks_its_runs(runs, message):
    x, weight, row, col = torch.ones(4, 6), torch.ones(5, 6), torch.ones(2, 5, 1), torch.ones(2, 1, 1, 6)
    op = torch.ops.rlrr_kernels_cpp.linear_multi
    with pytest.raises(RuntimeError, match=message):
        op(x, weight, row, col, None, None, torch.tensor(runs), True)
    with pytest.raises(RuntimeError, match="contiguous float32"):
        op(x, weight, row.double(), col, None, None, torch.tensor([[0, 0, 4]]), True)
    with pytest.raises(RuntimeError, match="nothing empty"):
        op(x.half(), weight.half(), row, col, None, None, torch.tensor([[0, 0, 4]]), True)
