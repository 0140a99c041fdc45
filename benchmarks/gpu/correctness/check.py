"""Correctness checks: what is not exact enough on this machine, or not repeatable, is not timed.

What is checked and how:

* The error rule of :mod:`rlrr_kernels.numerics` on every small case of the plan, over eight seeds and more.
* :func:`flaws` on all its cases, and on the very problem that is timed (its tiles depend on the shape): one seed in
  memory that shows misuse, run twice for the same bits and as a replay, every output against eager's error and, where
  the formula on absolute values is a bound, every single element, so that one wrong tile of thousands is found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.correctness.guard import GuardedMemory, guarded
from benchmarks.gpu.estimates import ESTIMATES, estimate_by_images, exact_by_sampling
from benchmarks.gpu.plan import TOKENS, Precision, RunPlan, Shape
from benchmarks.gpu.timing import explain
from benchmarks.gpu.work import Row, announce, sizes_of
from benchmarks.support.common import Problem
from rlrr_kernels import backends, norm_rescale, numerics, rlrr_linear, rlrr_linear_multi, rlrr_mlp
from rlrr_kernels.reference import (
    norm_rescale_reference,
    rlrr_linear_multi_reference,
    rlrr_linear_reference,
    rlrr_mlp_reference,
)

SAMPLED = "sampled rows"
"""The scale gradients from sampled rows, by a sample that stands for all of them."""

BY_IMAGES = "sampled rows by images"
"""The same from a draw as training takes it, against the torch path with that draw: an estimate has no exact result."""

MLP, NORM = "mlp", "norm"

MULTI = "several tasks"
"""``rlrr_linear_multi``: the problem's rows dealt out to a few tasks and the bare backbone."""

CHECKED = ("triton.fused", "triton.merge", "torch", SAMPLED, BY_IMAGES, MULTI, MLP, NORM)

_PATHS = ("triton.fused", "triton.merge")

CHOICES = {
    "auto": _PATHS,
    "model": (*_PATHS, NORM),
    "recompute": (*_PATHS, NORM, MLP),
    **dict.fromkeys(ESTIMATES, (*_PATHS, SAMPLED, BY_IMAGES)),
}
"""What an implementation stands on that has no kernels of its own; it is as exact as all of these."""

FEW_VALUES_RATIO = 2.0
"""Of eager's error, for outputs of fewer values than :data:`numerics.VALUES`: their ratio is noise.

With 33 values it scatters by 0.18 from draw to draw and comes to 2 now and then, by 0.06 over :data:`numerics.SEEDS`
draws. So where y has few values too, the errors of as many draws count.
"""

MOST_DEATHS = 2
"""So many processes an implementation may end before none of its problems is run any more."""

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]


class Subject(NamedTuple):
    """Both compute an operator's outputs and gradients, by name; ``bounded``: the formula on |tensors| is a bound."""

    ours: Run
    reference: Run
    bounded: bool


def _norm(function: Callable[..., Tensor], t: Tensors) -> Tensors:
    leaves = {name: t[name].detach().requires_grad_() for name in ("x", "scale", "shift")}
    y = function(leaves["x"], t["weight"], t["bias"], leaves["scale"], leaves["shift"], 1e-6)
    return {
        "y": y.detach(),
        **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), t["grad_y"]), strict=True)),
    }


def _tasks(samples: int) -> tuple[int, ...]:
    """The adapters of samples, a few and in no order; -1 for the bare backbone."""
    return tuple(sample * 3 % 7 - 1 for sample in range(samples))


def _multi(function: Callable[..., Tensor], x: Tensor, *tensors: Tensor, residual: bool) -> Tensor:
    return function(x, *tensors, index=torch.tensor(_tasks(len(x))), residual=residual)


def _outputs(function: Callable[..., Tensor], t: Tensors) -> Tensors:
    return numerics.outputs(function, t, True)


def subject(name: str) -> Subject:
    """What stands behind a name of :data:`CHECKED`, or behind a choice among them that can be called as a whole."""
    if name == NORM:
        return Subject(partial(_norm, norm_rescale), partial(_norm, norm_rescale_reference), False)
    if name == MLP:
        ours = partial(rlrr_mlp, backend="triton")
        return Subject(partial(_outputs, ours), partial(_outputs, rlrr_mlp_reference), False)
    if name == MULTI:
        ours = partial(_multi, partial(rlrr_linear_multi, backend="triton"))
        return Subject(partial(_outputs, ours), partial(_outputs, partial(_multi, rlrr_linear_multi_reference)), True)
    if name == BY_IMAGES:
        torch_path = partial(estimate_by_images, backend="torch")
        return Subject(partial(_outputs, estimate_by_images), partial(_outputs, torch_path), False)
    sampled = name in (SAMPLED, *ESTIMATES)
    ours = exact_by_sampling if sampled else partial(rlrr_linear, backend=name)
    return Subject(partial(_outputs, ours), partial(_outputs, rlrr_linear_reference), True)


def draw(name: str, problem: Problem, seed: int = 0) -> Tensors:
    """The tensors of ``problem`` for a subject; MLP and norm take its sizes for theirs, several tasks its rows."""
    if name == MULTI:
        rows = TOKENS if problem.m > TOKENS else -(-problem.m // 8)
        case = numerics.MultiCase(
            _tasks(-(-problem.m // rows)), rows, problem.n, problem.k, 6, problem.rank, problem.groups,
            dtype=problem.dtype, weight_dtype=problem.weight_dtype, device=problem.device,
        )  # fmt: skip
        return case.draw(seed)
    if name == MLP:
        case = numerics.MlpCase(
            problem.m, problem.k, problem.n, problem.k, problem.rank, problem.groups, dtype=problem.dtype,
            weight_dtype=problem.weight_dtype, device=problem.device,
        )  # fmt: skip
        return case.draw(seed)
    if name != NORM:
        return problem.tensors(seed)
    generator = torch.Generator(problem.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=problem.device).to(dtype)

    m, d = problem.m, problem.k
    # Where the weights are wider, autocast would widen the norm: the residual stream, its input, is as wide as they.
    wide = {"dtype": problem.weight_dtype or problem.dtype}
    return {
        "x": normal(m, d, **wide), "grad_y": normal(m, d, **wide), "weight": normal(d, **wide),
        "bias": normal(d, **wide), "scale": 1 + 0.1 * normal(d), "shift": normal(d),
    }  # fmt: skip


def replays(device: torch.device) -> bool:
    """Whether calls on a device may be replayed."""
    return device.type == "cuda"


def flaws_on(name: str, problem: Problem, by_element: bool = True) -> list[str]:
    """:func:`flaws` of a subject on the draws of ``problem``."""
    more = (draw(name, problem, seed) for seed in range(1, numerics.SEEDS))
    return flaws(subject(name), draw(name, problem), by_element, more)


def flaws(what: Subject, tensors: Tensors, by_element: bool = True, more: Iterable[Tensors] = ()) -> list[str]:
    """What is wrong with ``what`` on one problem; nothing where all is well.

    ``by_element``: whether single elements are held to the bound, which does not know TF32. ``more``: other draws of
    the problem, whose errors count as well where y has few values.
    """
    wide = {name: tensor.detach().double() for name, tensor in tensors.items()}
    exact, eager = what.reference(wide), what.reference(tensors)
    bound = what.reference({name: tensor.abs() for name, tensor in wide.items()}) if what.bounded else {}
    given = {name: guarded(tensor) for name, tensor in tensors.items()}
    with GuardedMemory() as memory:
        ours, again = what.ours(given), what.ours(given)
    found = [damage] if (damage := memory.damage()) else []
    if replays(tensors["x"].device):
        # The mode that guards memory keeps calls from being replayed. Of these the third is a replay and nothing else.
        for _ in range(3):
            repeated = what.ours(given)
        for name, actual in repeated.items():
            if not numerics.relative_error(actual, ours[name].double()) <= 4 * torch.finfo(actual.dtype).eps:
                found.append(f"{name} of a replayed call is not that of the call")
    errors = [_errors(ours, eager, exact)]
    if exact["y"].numel() < numerics.VALUES:
        for other in more:
            in_full = what.reference({name: tensor.detach().double() for name, tensor in other.items()})
            errors.append(_errors(what.ours(other), what.reference(other), in_full))
    for name, actual in ours.items():
        if not torch.equal(actual, again[name]):
            found.append(f"{name} differs from run to run")
        error, eager_error = (math.hypot(*column) for column in zip(*(each[name] for each in errors), strict=True))
        ratio = numerics.RATIO if actual.numel() >= numerics.VALUES else FEW_VALUES_RATIO
        if not error <= ratio * eager_error:
            found.append(f"{name} has an error of {error:.2e}, over {ratio} times eager's {eager_error:.2e}")
        if name in bound and by_element:
            dtypes = tensors["x"].dtype, actual.dtype
            limit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2 * bound[name]
            # fp32 products also add up in fp32: over thousands of rows their worst element is past four roundings.
            most = numerics.BOUND if tensors["x"].dtype.itemsize == 2 else 4 * numerics.BOUND
            wrong = ((actual.double() - exact[name]).abs() > most * limit).sum().item()
            if wrong:
                found.append(f"{wrong} of {actual.numel()} elements of {name} are over {most} unit roundoffs off")
    return found


def _errors(ours: Tensors, eager: Tensors, exact: Tensors) -> dict[str, tuple[float, float]]:
    """The relative errors of both, by output."""
    return {
        name: (numerics.relative_error(actual, exact[name]), numerics.relative_error(eager[name], exact[name]))
        for name, actual in ours.items()
    }


class Checks:
    """Remembers what was checked, in an earlier process too, whose rows are given; ``rows`` says how it went."""

    def __init__(self, plan: RunPlan, earlier: Iterable[Row] = ()) -> None:
        self.plan = plan
        self.rows: list[Row] = []
        self._verdicts: dict[tuple[str, str], str | None] = {}
        self._flaws: dict[tuple, str | None] = {}
        self._deaths: dict[tuple[str, str], list[Row]] = {}
        for row in earlier:
            if row["section"] == "correctness":
                self._learn(row)

    def _learn(self, row: Row) -> None:
        key = row["backend"], row["precision"]
        if row["check"] == "survival":
            self._deaths.setdefault(key, []).append(row)
        elif row["check"] in ("error rule", "one problem"):
            self._verdicts[key] = self._verdicts.get(key) or (None if row["passed"] else row["reason"])

    def reason_against(self, name: str, precision: Precision, problem: Problem | None = None) -> str | None:
        """Why ``name`` must not be timed in ``precision`` (on ``problem``); None when it may."""
        for checked in (name, *CHOICES.get(name, ())):
            if reason := self._died(checked, precision, problem) or self.check(checked, precision):
                return reason if checked == name else f"{checked}: {reason}"
        if problem is None or name not in (*CHECKED, "auto", *ESTIMATES):
            return None
        key = name, precision.name, problem
        if key not in self._flaws:
            self._flaws[key] = self._check(name, precision, problem, "timed problem", keep_good=False)
        return self._flaws[key]

    def _died(self, name: str, precision: Precision, problem: Problem | None) -> str | None:
        deaths = self._deaths.get((name, precision.name), [])
        if len(deaths) >= MOST_DEATHS:
            return f"ended {len(deaths)} processes: {deaths[0]['reason']}"
        for row in deaths:
            everywhere = "M" not in row and "model" not in row
            sizes = sizes_of(problem) if "M" in row and problem else {}
            if everywhere or (sizes and all(row.get(key, size) == size for key, size in sizes.items())):
                return row["reason"]
        return None

    def check(self, name: str, precision: Precision) -> str | None:
        """Why ``name`` failed on the plan's cases, None where it passed them all or has none; checked once."""
        key = name, precision.name
        if name in CHECKED and key not in self._verdicts:
            announce(name, precision.name)
            self._verdicts[key] = self._check_cases(name, precision)
        return self._verdicts.get(key)

    def reason_against_tiles(self, kernel: str, precision: Precision, problem: Problem) -> str | None:
        """Why the tiles now in force for ``kernel`` must not be used; not remembered as the implementation's fault."""
        announce(f"{kernel} with its shipped tiles", precision.name)
        try:
            with precision.applied():
                found = flaws_on("triton.fused", problem, precision.matmul == "highest")
        except Exception as error:
            return explain(error, self.plan.device)
        return "; ".join(found) or None

    def _check_cases(self, name: str, precision: Precision) -> str | None:
        backend = "triton" if name in (MULTI, MLP, NORM) else name
        reason = None if name in (SAMPLED, BY_IMAGES) else backends.unavailable(backend, self.plan.device)
        if reason:
            self._add(name, precision, None, "error rule", None, reason)
            return reason
        reasons = []
        for m, n, k, groups, rank in self.plan.check_cases:
            problem = self.plan.problem(m, Shape("", n, k, groups, rank), precision)
            if m <= self.plan.rule_m and name not in (BY_IMAGES, MULTI, MLP, NORM):
                reasons.append(self._check(name, precision, problem, "error rule"))
            reasons.append(self._check(name, precision, problem, "one problem"))
        return next((reason for reason in reasons if reason), None)

    def _check(
        self, name: str, precision: Precision, problem: Problem, check: str, keep_good: bool = True
    ) -> str | None:
        announce(name, precision.name, **(sizes_of(problem) if check == "timed problem" else {}))
        started = time.perf_counter()
        try:
            with precision.applied(), self._triton(name):
                if check == "error rule":
                    self._check_rule(name, problem)
                    reason = None
                else:
                    found = flaws_on(name, problem, precision.matmul == "highest")
                    reason = "; ".join(found) or None
        except Exception as error:
            broken = check == "error rule" and isinstance(error, AssertionError)
            lines = str(error).splitlines()
            reason = "fails the error rule: " + "; ".join(lines[1:]) if broken else explain(error, self.plan.device)
        if reason or keep_good:
            self._add(name, precision, problem, check, reason is None, reason, time.perf_counter() - started)
        return reason

    def _check_rule(self, name: str, problem: Problem) -> None:
        function = exact_by_sampling if name == SAMPLED else partial(rlrr_linear, backend=name)
        case = numerics.Case(
            problem.m, problem.n, problem.k, problem.rank, problem.groups, dtype=problem.dtype,
            weight_dtype=problem.weight_dtype, device=problem.device,
        )  # fmt: skip
        numerics.check_error_rule(function, case)

    def _triton(self, name: str):
        """Norms and sampled rows have no argument that says who computes them."""
        chooses = name in (NORM, SAMPLED, BY_IMAGES) and backends.unavailable("triton", self.plan.device) is None
        return backends.use_backend("triton") if chooses else nullcontext()

    def _add(self, name, precision, problem, check, passed, reason, seconds=None) -> None:
        row = {"section": "correctness", "check": check, "backend": name, "precision": precision.name}
        if problem is not None:
            row |= sizes_of(problem)
            row |= {"groups": problem.groups, "rank": problem.rank, "seconds": round(seconds, 2)}
        self.rows.append({**row, "passed": passed, "reason": reason})
