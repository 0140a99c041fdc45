"""One linear layer: kernel time and eager wall time of every rival, and the host's share of a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import Problem
from benchmarks.gpu.correctness.check import Gate
from benchmarks.gpu.measurements.baselines import OURS, PEFT, PLAIN, compiled_formula, layer_steps, peft_reason
from benchmarks.gpu.measurements.estimates import ESTIMATES
from benchmarks.gpu.measurements.timing import copies_for, explain, host_us, interleave, release
from benchmarks.gpu.measurements.tune import is_tuned
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Plan, Precision, Shape, problem_of
from benchmarks.gpu.session.work import Row, Unit, announce
from benchmarks.model.layers import Ceilings, model_us
from rlrr_kernels import rlrr_linear

RIVALS = {
    "forward": (*OURS, *PLAIN, *PEFT),
    "step": (*OURS, *(name for name in PLAIN if name != "merged"), *PEFT),
    "scales": ("triton", "torch", "floor"),
}
"""By work. The paths of the Triton backend share one kernel for the scale gradients: ``triton`` there."""

AGAIN = "again"
"""The mode of a layer that is timed once more, with the tiles the tuner has found meanwhile."""

AGAIN_RIVALS = {
    "forward": ("triton.one_pass", "auto", "reference", "merged", "floor"),
    "step": ("triton.one_pass", "auto", "reference", "floor"),
    "scales": ("triton", "floor"),
}
"""What the tuner changed and what the targets compare it with."""


def reason_against(gate: Gate, name: str, precision: Precision, problem: Problem) -> str | None:
    """Why a rival is not timed: not installed, or not exact; None when it is."""
    if name in PEFT:
        return peft_reason(name)
    if name == "triton":
        name = "triton.one_pass"
    return gate.reason_against(name, precision, problem) if name in (*OURS, *ESTIMATES) else None


def layer_rows(
    plan: Plan,
    gate: Gate,
    ceilings: Ceilings | None,
    shape: Shape,
    rows: int,
    precision: Precision,
    work: str,
    mode: str = "",
) -> list[Row]:
    """Every rival on one layer, interleaved.

    ``mode``: one of torch.compile's, in which the compiled reference joins a few of them; :data:`AGAIN`; or neither.
    """
    problem = problem_of(plan, shape, rows, precision)
    tuned, compiling = is_tuned(plan, problem, precision), mode not in ("", AGAIN)
    names = _names(plan, rows, work, mode)
    head = {
        "section": "layers", "shape": shape.name, "M": rows, "N": shape.out_features, "K": shape.in_features,
        "precision": precision.name, "work": work, "compile_mode": mode if compiling else None,
        "tiles": "tuned" if tuned else "shipped",
    }  # fmt: skip
    if mode == AGAIN and not tuned:
        return [{**head, "rival": names[0], "skipped": "no tiles were faster than the shipped ones"}]

    def starting(name: str) -> None:
        announce(name, precision.name, M=rows, N=shape.out_features, K=shape.in_features)

    skipped = {name: reason for name in names if (reason := reason_against(gate, name, precision, problem))}
    try:
        compiled = compiled_formula(mode, plan.compile_options) if compiling else None
        with precision.applied():
            tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
            steps = {}
            for name in names:
                if name not in skipped:
                    try:
                        starting(name)
                        steps[name] = layer_steps(name, work, tensors, precision, compiled)
                    except Exception as error:
                        skipped[name] = explain(error, plan.device)
            timings, failures = interleave(steps, plan.device, plan.seconds, plan.graphs, starting)
    finally:
        tensors = steps = None
        release(plan.device)
    result = []
    for name in names:
        label = f"compiled ({mode})" if name == "compiled" else name
        if name not in timings:
            result.append({**head, "rival": label, "skipped": skipped.get(name) or failures[name]})
            continue
        timing = timings[name]
        modelled = "triton.one_pass" if name == "triton" else name
        row = {**head, "rival": label, "graph_us": timing.graph_us, "wall_us": timing.wall_us}
        row["model_us"] = ceilings and model_us(modelled, work, problem, precision.name, ceilings)
        result.append(row | ({"note": timing.note} if timing.note else {}))
    return result


def _names(plan: Plan, rows: int, work: str, mode: str) -> tuple[str, ...]:
    if mode == AGAIN:
        return AGAIN_RIVALS[work]
    if mode:
        return "auto", "reference", "floor", "compiled"
    estimated = work == "step" and (rows >= TOKENS or plan.tiny)
    return RIVALS[work] + (tuple(ESTIMATES) if estimated else ())


def host_rows(plan: Plan, gate: Gate) -> list[Row]:
    """What a call costs the host over ``F.linear``: one row of x, so that the device never holds the host up."""
    precision = PRECISIONS[plan.main]
    problem = problem_of(plan, plan.host, 1, precision)
    t = problem.tensors()
    x, weight, bias = t["x"], t["weight"], t["bias"].detach().to(precision.dtype).requires_grad_()
    scales = t["scale_row"], t["scale_col"]
    leaves = {"F.linear": [x, bias], "auto": [x, *scales, bias]}
    calls = {"F.linear": lambda: F.linear(x, weight, bias)}
    reason = gate.reason_against("auto", precision)
    reason = None if reason and plan.tiny else reason  # without Triton auto takes another path, which is fine here
    if not reason:
        calls["auto"] = lambda: rlrr_linear(x, weight, *scales, bias)
    grad_y = t["grad_y"]

    def forward(call):
        with torch.no_grad():
            call()

    def step(call, name):
        torch.autograd.grad(call(), leaves[name], grad_y)

    count, rounds = (3, 3) if plan.tiny else (100, 30)
    rows: list[Row] = []
    for work in ("forward", "step"):
        medians = {
            name: host_us(
                (lambda call=call: forward(call)) if work == "forward" else (lambda call=call, n=name: step(call, n)),
                plan.device, count, rounds,
            )
            for name, call in calls.items()
        }  # fmt: skip
        for name, value in medians.items():
            rows.append(
                {
                    "section": "host", "work": work, "rival": name, "host_us": value,
                    "over_linear_us": value - medians["F.linear"],
                }
            )  # fmt: skip
    return rows + ([{"section": "host", "work": "forward", "rival": "auto", "skipped": reason}] if reason else [])


def layer_units(plan: Plan) -> list[Unit]:
    """The layers of the plan, those that wait for a compiler or for the tuner, and the host's share."""

    def unit(tier: int, shape: Shape, rows: int, name: str, work: str, mode: str, seconds: float) -> Unit:
        label = f"{shape.name}, M = {rows}, {name}, {work}" + (f", {mode}" if mode else "")
        precision = PRECISIONS[name]
        return Unit(
            tier, "layers", label, seconds,
            lambda bench: layer_rows(plan, bench.gate, bench.ceilings, shape, rows, precision, work, mode),
        )  # fmt: skip

    works = ("step", "forward", "scales")
    units = [unit(*entry, work, "", 3.0) for entry in plan.layers for work in works]
    units += [unit(*entry, work, AGAIN, 1.0) for entry in plan.again for work in works]
    units += [
        unit(*entry, work, mode, 40.0 if mode == "max-autotune" else 15.0)
        for *entry, mode in plan.compiled
        for work in works[:2]
    ]
    units.append(Unit(3, "host", "host time of a call", 3.0, lambda bench: host_rows(plan, bench.gate)))
    return units
