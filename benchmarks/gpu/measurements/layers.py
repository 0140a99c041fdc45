"""One linear layer: kernel time and eager wall time of every implementation, and the host's share of a call."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.launch_model import Ceilings, model_us
from benchmarks.gpu.measurements.implementations import OURS, PLAIN, compiled_formula, layer_steps
from benchmarks.gpu.measurements.tune import is_tuned
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Precision, RunPlan, Shape
from benchmarks.gpu.timing import copies_for, host_us, release, timing_rows
from benchmarks.gpu.work import Row, Unit, announce, sizes_of
from benchmarks.support.baselines import PEFT, peft_reason
from benchmarks.support.common import Problem
from rlrr_kernels import rlrr_linear

IMPLEMENTATIONS = {
    "forward": (*OURS, *PLAIN, *PEFT),
    "step": (*OURS, *(name for name in PLAIN if name != "merged"), *PEFT),
    "scales": ("triton", "torch", "floor"),
}
"""By work. The paths of the Triton backend share one kernel for the scale gradients: ``triton`` there."""

AGAIN = "again"
"""The mode of a layer that is timed once more, with the tiles the tuner has found meanwhile."""

AGAIN_IMPLEMENTATIONS = {
    "forward": ("triton.fused", "auto", "reference", "merged", "floor"),
    "step": ("triton.fused", "auto", "reference", "floor"),
    "scales": ("triton", "floor"),
}
"""What the tuner changed and what the targets compare it with."""


def reason_against(checks: Checks, name: str, precision: Precision, problem: Problem) -> str | None:
    """Why an implementation is not timed: not installed, or not exact; None when it is."""
    if name in PEFT:
        return peft_reason(name)
    if name == "triton":
        name = "triton.fused"
    return checks.reason_against(name, precision, problem) if name in (*OURS, *ESTIMATES) else None


def layer_rows(
    plan: RunPlan,
    checks: Checks,
    ceilings: Ceilings | None,
    shape: Shape,
    m: int,
    precision: Precision,
    work: str,
    mode: str = "",
) -> list[Row]:
    """Every implementation of one layer, interleaved.

    ``mode``: one of torch.compile's, in which the compiled reference joins a few of them; :data:`AGAIN`; or neither.
    """
    problem = plan.problem(m, shape, precision)
    tuned, compiling = is_tuned(plan, problem, precision), mode not in ("", AGAIN)
    names = _names(plan, m, work, mode)
    head = {
        "section": "layers", "shape": shape.name, **sizes_of(problem), "precision": precision.name, "work": work,
        "compile_mode": mode if compiling else None, "tiles": "tuned" if tuned else "shipped",
    }  # fmt: skip
    if mode == AGAIN and not tuned:
        return [{**head, "implementation": names[0], "skipped": "no tiles were faster than the shipped ones"}]

    def starting(name: str) -> None:
        announce(name, precision.name, **sizes_of(problem))

    skipped = {name: reason for name in names if (reason := reason_against(checks, name, precision, problem))}
    try:
        compiled = compiled_formula(mode, plan.compile_options) if compiling else None
        with precision.applied():
            tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
            steps_of = {name: partial(layer_steps, name, work, tensors, precision, compiled) for name in names}
            rows = timing_rows(head, steps_of, skipped, plan.device, plan.seconds, plan.graphs, starting)
    finally:
        tensors = steps_of = None
        release(plan.device)
    for row in rows:
        name = row["implementation"]
        if "skipped" not in row:
            row["model_us"] = ceilings and model_us(name, work, problem, precision.name, ceilings, ESTIMATES.get(name))
        if name == "compiled":
            row["implementation"] = f"compiled ({mode})"
    return rows


def _names(plan: RunPlan, m: int, work: str, mode: str) -> tuple[str, ...]:
    if mode == AGAIN:
        return AGAIN_IMPLEMENTATIONS[work]
    if mode:
        return "auto", "reference", "floor", "compiled"
    estimated = work == "step" and (m >= TOKENS or plan.tiny)
    return IMPLEMENTATIONS[work] + (tuple(ESTIMATES) if estimated else ())


def host_rows(plan: RunPlan, checks: Checks) -> list[Row]:
    """What a call costs the host over ``F.linear``: one row of x, so that the device never holds the host up."""
    precision = PRECISIONS[plan.main]
    t = plan.problem(1, plan.host, precision).tensors()
    x, weight, bias = t["x"], t["weight"], t["bias"].detach().to(precision.dtype).requires_grad_()
    scales, grad_y = (t["scale_row"], t["scale_col"]), t["grad_y"]
    reason = checks.reason_against("auto", precision)
    reason = None if plan.tiny else reason  # without Triton auto takes another path, which is fine here
    calls = {"F.linear": (lambda: F.linear(x, weight, bias), [x, bias])}
    if not reason:
        calls["auto"] = lambda: rlrr_linear(x, weight, *scales, bias), [x, *scales, bias]
    count, rounds = (3, 3) if plan.tiny else (100, 30)
    rows: list[Row] = []
    for work in ("forward", "step"):
        medians = {}
        for name, (call, leaves) in calls.items():
            step = call if work == "forward" else lambda c=call, leaves=leaves: torch.autograd.grad(c(), leaves, grad_y)
            with torch.set_grad_enabled(work == "step"):
                medians[name] = host_us(step, plan.device, count, rounds)
        for name, value in medians.items():
            row = {"section": "host", "work": work, "implementation": name, "host_us": value}
            rows.append(row | {"over_linear_us": value - medians["F.linear"]})
    return rows + (
        [{"section": "host", "work": "forward", "implementation": "auto", "skipped": reason}] if reason else []
    )


def layer_units(plan: RunPlan) -> list[Unit]:
    """The layers of the plan, those that wait for a compiler or for the tuner, and the host's share."""

    def unit(tier: int, shape: Shape, m: int, name: str, work: str, mode: str, seconds: float) -> Unit:
        label = f"{shape.name}, M = {m}, {name}, {work}" + (f", {mode}" if mode else "")
        precision = PRECISIONS[name]
        return Unit(
            tier, "layers", label, seconds,
            lambda bench: layer_rows(plan, bench.checks, bench.ceilings, shape, m, precision, work, mode),
        )  # fmt: skip

    works = ("step", "forward", "scales")
    units = [unit(*entry, work, "", 3.0) for entry in plan.layers for work in works]
    units += [unit(*entry, work, AGAIN, 1.0) for entry in plan.again for work in works]
    units += [
        unit(*entry, work, mode, 40.0 if mode == "max-autotune" else 15.0)
        for *entry, mode in plan.compiled
        for work in works[:2]
    ]
    units.append(Unit(3, "host", "host time of a call", 3.0, lambda bench: host_rows(plan, bench.checks)))
    return units
