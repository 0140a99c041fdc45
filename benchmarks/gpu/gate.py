"""The gate: an implementation that is not exact enough on this machine is not timed."""

from __future__ import annotations

import time
from functools import partial

from benchmarks.common import Problem
from benchmarks.gpu.estimates import ESTIMATES, exact_by_sampling
from benchmarks.gpu.measure import describe
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision
from benchmarks.gpu.work import Row
from rlrr_kernels import backends, numerics, rlrr_linear
from rlrr_kernels.numerics import Function

CHECKED = ("triton.one_pass", "triton.merge", "torch")
SAMPLED = "sampled rows"
"""The scale gradients from sampled rows, by a sample that stands for all of them."""

CHOICES = {"auto": ("triton.one_pass", "triton.merge")} | dict.fromkeys(ESTIMATES, (SAMPLED,))
"""What an implementation that only chooses stands on; it is as exact as all of these."""


def _function(name: str) -> Function:
    return exact_by_sampling if name in (SAMPLED, *ESTIMATES) else partial(rlrr_linear, backend=name)


class Gate:
    """Remembers what was checked; ``rows`` says how it went."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows: list[Row] = []
        self._rule: dict[tuple[str, str], str | None] = {}
        self._bound: dict[tuple, str | None] = {}

    def reason_against(self, name: str, precision: Precision, problem: Problem | None = None) -> str | None:
        """Why backend ``name`` must not be timed in ``precision`` (on ``problem``); None when it may.

        The error rule on the gate's cases, then :func:`rlrr_kernels.numerics.bound_errors` on the very problem that is
        timed: its tiles depend on the shape. The bound does not know TF32, so there the rule alone speaks.
        """
        for checked in CHOICES.get(name, (name,)):
            key = checked, precision.name
            if key not in self._rule:
                self._rule[key] = self._check_rule(checked, precision)
            if self._rule[key]:
                return f"{checked}: {self._rule[key]}"
        if problem is None or precision.matmul != "highest":
            return None
        key = name, problem
        if key not in self._bound:
            self._bound[key] = self._check_bound(name, problem)
        return self._bound[key]

    def _check_rule(self, name: str, precision: Precision) -> str | None:
        reason = None if name == SAMPLED else backends.unavailable(name, self.plan.device)
        if reason:
            self.rows.append(
                {"section": "gate", "backend": name, "precision": precision.name, "passed": None, "reason": reason}
            )
            return reason
        reasons = []
        for rows, out_features, in_features, groups in self.plan.gate:
            case = numerics.Case(
                rows, out_features, in_features, groups=groups, dtype=precision.dtype,
                weight_dtype=precision.weight_dtype, device=self.plan.device,
            )  # fmt: skip
            started, reason = time.perf_counter(), None
            try:
                with precision.applied():
                    numerics.check_error_rule(_function(name), case)
            except AssertionError as error:
                reason = "fails the error rule: " + "; ".join(str(error).splitlines()[1:])
            except Exception as error:
                reason = describe(error)
            self.rows.append(
                {
                    "section": "gate", "backend": name, "precision": precision.name, "M": rows, "N": out_features,
                    "K": in_features, "groups": groups, "passed": reason is None,
                    "reason": reason, "seconds": round(time.perf_counter() - started, 2),
                }
            )  # fmt: skip
            if reason:
                reasons.append(reason)
        return reasons[0] if reasons else None

    def _check_bound(self, name: str, problem: Problem) -> str | None:
        reason = None
        try:
            errors = numerics.bound_errors(_function(name), problem.tensors())
            broken = {key: round(error, 2) for key, error in errors.items() if not error <= numerics.BOUND}
            if broken:
                reason = f"over {numerics.BOUND} unit roundoffs of the bound on the timed problem: {broken}"
        except Exception as error:
            reason = describe(error)
        if reason:
            self.rows.append(
                {
                    "section": "gate", "backend": name, "precision": precision_name(problem), "M": problem.rows,
                    "N": problem.out_features, "K": problem.in_features, "groups": 1, "passed": False,
                    "reason": reason,
                }
            )  # fmt: skip
        return reason


def precision_name(problem: Problem) -> str:
    """The name in :data:`benchmarks.gpu.plan.PRECISIONS` of a problem's dtypes."""
    dtypes = problem.dtype, problem.weight_dtype or problem.dtype
    return next(name for name, p in PRECISIONS.items() if (p.dtype, p.weight_dtype) == dtypes)
