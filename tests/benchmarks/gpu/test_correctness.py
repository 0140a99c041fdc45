"""The GPU command's correctness checks find kernels that are wrong, unrepeatable or write where they must not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import launch_model as model
from benchmarks.gpu.correctness import check as check_module
from benchmarks.gpu.correctness.check import FEW_VALUES_RATIO, draw, flaws, flaws_on, subject
from benchmarks.gpu.correctness.guard import PAD_BYTES, GuardedMemory, guarded
from benchmarks.gpu.measurements.layers import AGAIN, layer_rows
from benchmarks.gpu.plan import PRECISIONS, cpu_plan
from benchmarks.support.common import Problem
from rlrr_kernels import backends, numerics, rlrr_linear

pytestmark = pytest.mark.interpreted

CEILINGS = model.Ceilings(4e12, {"fp32": 5e13})
PLAN = cpu_plan()
SHAPE = PLAN.layers[0][1]
BACKENDS = ("triton.fused", "triton.merge") if backends.INTERPRETING else ("torch",)
not_interpreted = pytest.mark.skipif(backends.INTERPRETING, reason="says nothing about kernels")
DTYPES = (torch.float32, torch.float16) if backends.INTERPRETING else (torch.float32, torch.float16, torch.bfloat16)


@not_interpreted
def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_module, "rlrr_linear", lambda *args, **options: 1.01 * rlrr_linear(*args, **options))
    checks = check_module.Checks(PLAN)
    rows = layer_rows(PLAN, checks, CEILINGS, SHAPE, 8, PRECISIONS["fp32"], "forward")
    wrong = next(row for row in rows if row["implementation"] == "torch")
    assert "over 2.0 times eager's" in wrong["skipped"]
    assert "wall_us" not in wrong
    assert layer_rows(PLAN, checks, CEILINGS, SHAPE, 8, PRECISIONS["fp32"], "forward", AGAIN)[0]["skipped"]
    assert next(row for row in rows if row["implementation"] == "floor")["wall_us"] > 0
    assert not next(row for row in checks.rows if row["backend"] == "torch")["passed"]


@not_interpreted
def test_an_error_on_the_timed_problem_alone_is_found(monkeypatch: pytest.MonkeyPatch):
    def wrong_for_five_rows(x, *args, **options):
        return rlrr_linear(x, *args, **options) * (1.01 if x.shape[0] == 5 else 1.0)

    monkeypatch.setattr(check_module, "rlrr_linear", wrong_for_five_rows)
    checks = check_module.Checks(PLAN)
    for count, wrong in ((5, True), (6, False)):
        rows = layer_rows(PLAN, checks, CEILINGS, SHAPE, count, PRECISIONS["fp32"], "forward")
        assert ("skipped" in next(row for row in rows if row["implementation"] == "torch")) == wrong


# ---------------------------------------------------------------- memory that shows misuse


def test_what_nobody_wrote_is_nan_and_what_lies_around_stays():
    with GuardedMemory() as memory:
        made = [
            torch.empty(3, 5),
            torch.empty(4, dtype=torch.bfloat16).new_empty(2, 2),
            torch.empty_like(torch.zeros(5, 3).t()),
            torch.empty(0, 7),
            torch.zeros(2).new_empty(3, dtype=torch.float64),
        ]
        numbers = torch.empty(3, dtype=torch.int64)
    assert [tensor.shape for tensor in made] == [(3, 5), (2, 2), (3, 5), (0, 7), (3,)]
    assert made[2].stride() == (1, 3)
    assert [tensor.dtype for tensor in made[1::3]] == [torch.bfloat16, torch.float64]
    assert all(tensor.isnan().all() for tensor in made)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in made)
    assert numbers.shape == (3,)
    assert memory.count == 6  # the bfloat16 tensor of four values as well
    assert memory.damage() is None
    for tensor in made:
        tensor.fill_(1.0)
    assert memory.damage() is None
    before = torch.as_strided(made[0], (1,), (1,), made[0].storage_offset() - 1)
    before.fill_(0.0)
    assert "before tensor 1" in memory.damage()
    before.fill_(float("nan"))
    behind = torch.as_strided(made[1], (1,), (1,), made[1].storage_offset() + 4)
    behind.fill_(0.0)
    assert "behind tensor 3" in memory.damage()


def test_a_guarded_copy_has_the_same_strides_and_nan_around_it():
    tensor = torch.randn(6, 4).t()[:, ::2]
    copy = guarded(tensor.requires_grad_())
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert not copy.requires_grad
    around = torch.as_strided(copy, (PAD_BYTES // 4,), (1,), 0)
    assert around.isnan().all()


def test_memory_made_in_a_backward_is_guarded_too():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.empty_like(x).copy_(2 * x)

        @staticmethod
        def backward(ctx, grad):
            made.append(grad.new_empty(3))
            return 2 * grad

    made, x = [], torch.ones(3, requires_grad=True)
    with GuardedMemory() as memory:
        torch.autograd.grad(Doubled.apply(x), [x], torch.ones(3))
    assert memory.count >= 2
    assert made[0].isnan().all()


# ---------------------------------------------------------------- flaws


def flaws_of(run, dtype=torch.float32, rows=40, **options) -> str:
    problem = Problem(rows, 66, 70, dtype, False, "cpu", None, 2, 3)
    what = subject("torch")
    return "; ".join(flaws(what._replace(ours=lambda t: run(what.ours, t)), draw("torch", problem), **options))


def damaged(name: str, index: tuple, factor: float = 1.0, offset: float = 0.0):
    """A run whose output ``name`` is wrong at ``index``."""

    def run(ours, t):
        outputs = ours(t)
        outputs[name][index] = outputs[name][index] * factor + offset
        return outputs

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(40, 66, 67, 1, 3), (1, 33, 70, 4, 1), (130, 64, 48, 1, 1)], ids=str)
def test_kernels_have_none(dtype: torch.dtype, backend: str, sizes: tuple):
    m, n, k, rank, groups = sizes
    problem = Problem(m, n, k, dtype, False, "cpu", None, rank, groups)
    assert flaws_on(backend, problem) == []


# The GPU command's run on the interpreter (test_command.py) makes the check of the MLP too.
@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.slow_interpreted), "norm", "sampled rows"])
def test_other_kernels_have_none(name: str):
    problem = Problem(65, 96, 96, torch.float32, False, "cpu", None, 1, 1)
    with backends.use_backend("triton" if backends.INTERPRETING else "torch"):
        if name == "mlp" and not backends.INTERPRETING:
            what = subject(name)
            assert flaws(what._replace(ours=what.reference), draw(name, problem)) == []
        else:
            assert flaws_on(name, problem) == []


def test_one_draw_on_which_eager_is_lucky_is_no_flaw():
    """With few values the ratio of two equally exact results comes to 2 on one draw in a thousand."""
    problem, what = Problem(1, 33, 70, torch.float32, False, "cpu", None, 4, 1), subject("torch")
    draws = [draw("torch", problem, seed) for seed in range(numerics.SEEDS)]

    def worse(tensors):
        """Three times eager's error on the first draw, eager itself on all others."""
        if not torch.equal(tensors["x"], draws[0]["x"]):
            return what.reference(tensors)
        exact = what.reference({name: tensor.double() for name, tensor in tensors.items()})
        eager = what.reference(tensors)
        return {name: (exact[name] + 3 * (value - exact[name])).float() for name, value in eager.items()}

    unlucky = what._replace(ours=worse)
    assert "times eager's" in "; ".join(flaws(unlucky, draws[0]))
    assert flaws(unlucky, draws[0], more=draws[1:]) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_is_found(dtype: torch.dtype):
    assert flaws_of(lambda ours, t: ours(t), dtype) == ""
    assert "1 of 2640 elements of y are over" in flaws_of(damaged("y", (39, 65), offset=40.0), dtype)
    assert "1 of 2800 elements of x are over" in flaws_of(damaged("x", (0, 69), offset=40.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_tile_of_many_is_found(dtype: torch.dtype):
    problem = Problem(4096, 64, 64, dtype, False)
    what, tensors = subject("torch"), draw("torch", problem)
    assert flaws(what, tensors) == []
    wrong = what._replace(ours=lambda t: damaged("y", (slice(4080, 4096),), 1.05)(what.ours, t))
    assert "y has an error of" in "; ".join(flaws(wrong, tensors))


def test_a_part_of_the_rows_left_out_of_a_sum_is_found():
    def run(ours, t):
        some = {name: tensor[:-4] if name in ("x", "grad_y") else tensor for name, tensor in t.items()}
        return ours(t) | {name: value for name, value in ours(some).items() if name.startswith("scale")}

    found = flaws_of(run)
    assert "scale_row has an error of" in found
    assert f"over {FEW_VALUES_RATIO} times eager's" in found


def test_nan_bits_that_change_and_damaged_memory_are_found():
    assert "y has an error of nan" in flaws_of(damaged("y", (0, 0), float("nan")))
    calls = iter(range(100))
    assert "scale_col differs from run to run" in flaws_of(
        lambda ours, t: damaged("scale_col", (0,), 1.0, 1e-9 * next(calls))(ours, t)
    )

    def overwriting(ours, t):
        y = torch.empty(7)
        torch.as_strided(y, (1,), (1,), y.storage_offset() + 7).zero_()
        return ours(t)

    assert "memory behind tensor 1" in flaws_of(overwriting)

    def reading_on(ours, t):
        beyond = torch.as_strided(t["x"], (1,), (1,), t["x"].storage_offset() + t["x"].numel())
        outputs = ours(t)
        outputs["y"][0, 0] += beyond[0]
        return outputs

    assert "y has an error of nan" in flaws_of(reading_on)


def test_tf32_is_held_to_eager_but_not_to_the_bound():
    def rounded(ours, t):
        outputs = ours(t)
        return outputs | {"y": outputs["y"] * (1 + 1e-4)}

    assert "unit roundoffs" in flaws_of(rounded)
    assert "unit roundoffs" not in flaws_of(rounded, by_element=False)


@not_interpreted
def test_what_passed_or_failed_is_known_to_a_later_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_module, "rlrr_linear", lambda *args, **options: 1.01 * rlrr_linear(*args, **options))
    checks = check_module.Checks(PLAN)
    reason = checks.check("torch", PRECISIONS["fp32"])
    assert "over 2.0 times eager's" in reason
    monkeypatch.setattr(check_module.Checks, "_check_cases", lambda *arguments: pytest.fail("checked again"))
    later = check_module.Checks(PLAN, checks.rows)
    assert later.reason_against("torch", PRECISIONS["fp32"]) == reason
    good = [row | {"passed": True, "reason": None} for row in checks.rows]
    assert check_module.Checks(PLAN, good).check("torch", PRECISIONS["fp32"]) is None


def test_the_gates_tensors_of_one_problem_do_not_depend_on_the_host():
    first, again = (draw("norm", Problem(5, 8, 8, torch.float32, False)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert numerics.VALUES > 5 * 8  # few values: held to a looser ratio
