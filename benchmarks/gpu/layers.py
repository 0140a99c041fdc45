"""One linear layer: kernel time and eager wall time of every rival, and the host's share of a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import Problem
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.gate import Gate
from benchmarks.gpu.measure import copies_for, describe, host_us, interleave, release
from benchmarks.gpu.model import Ceilings, model_us
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Plan, Precision, Shape
from benchmarks.gpu.rivals import OURS, PEFT, PLAIN, compiled_formula, layer_steps, peft_reason
from benchmarks.gpu.work import Row, Unit
from rlrr_kernels import rlrr_linear

RIVALS = {
    "forward": (*OURS, *PLAIN, *PEFT),
    "step": (*OURS, *(name for name in PLAIN if name != "merged"), *PEFT),
    "scales": ("triton", "torch", "floor"),
}
"""By work. The paths of the Triton backend share one kernel for the scale gradients: ``triton`` there."""


def problem_of(plan: Plan, shape: Shape, rows: int, precision: Precision, backward: bool = True) -> Problem:
    """The problem of one layer call."""
    return Problem(
        rows, shape.in_features, shape.out_features, precision.dtype, backward, plan.device, precision.weight_dtype
    )


def reason_against(gate: Gate, name: str, precision: Precision, problem: Problem) -> str | None:
    """Why a rival is not timed: not installed, or not exact; None when it is."""
    if name in PEFT:
        return peft_reason(name)
    if name == "triton":
        name = "triton.one_pass"
    return gate.reason_against(name, precision, problem) if name in (*OURS, *ESTIMATES) else None


def layer_rows(
    plan: Plan, gate: Gate, ceilings: Ceilings, shape: Shape, rows: int, precision: Precision, work: str, mode: str = ""
) -> list[Row]:
    """Every rival on one layer, interleaved. With ``mode`` torch.compile of the reference joins a few of them."""
    problem = problem_of(plan, shape, rows, precision)
    names = RIVALS[work] if not mode else ("auto", "reference", "floor", "compiled")
    if work == "step" and not mode and (rows >= TOKENS or plan.tiny):
        names += tuple(ESTIMATES)
    skipped = {name: reason for name in names if (reason := reason_against(gate, name, precision, problem))}
    try:
        compiled = compiled_formula(mode, plan.compile_options) if mode else None
        with precision.applied():
            tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
            steps = {}
            for name in names:
                if name not in skipped:
                    try:
                        steps[name] = layer_steps(name, work, tensors, precision, compiled)
                    except Exception as error:
                        skipped[name] = describe(error)
            timings, failures = interleave(steps, plan.device, plan.seconds, plan.graphs)
    finally:
        tensors = steps = None
        release(plan.device)
    head = {
        "section": "layers", "shape": shape.name, "M": rows, "N": shape.out_features, "K": shape.in_features,
        "precision": precision.name, "work": work, "compile_mode": mode or None,
    }  # fmt: skip
    result = []
    for name in names:
        label = f"compiled ({mode})" if name == "compiled" else name
        if name not in timings:
            result.append({**head, "rival": label, "skipped": skipped.get(name) or failures[name]})
            continue
        timing = timings[name]
        modelled = "triton.one_pass" if name == "triton" else name
        row = {**head, "rival": label, "graph_us": timing.graph_us, "wall_us": timing.wall_us}
        row["model_us"] = model_us(modelled, work, problem, precision.name, ceilings)
        result.append(row | ({"note": timing.note} if timing.note else {}))
    return result


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


def layer_units(plan: Plan, gate: Gate, ceilings: Ceilings) -> list[Unit]:
    """The layers of the plan, then those that wait for a compiler, and the host's share."""
    units = []
    for tier, shape, rows, name in plan.layers:
        for work in ("forward", "step", "scales"):
            units.append(
                Unit(
                    tier, "layers", f"{shape.name}, M = {rows}, {name}, {work}", 3.0,
                    lambda s=shape, r=rows, p=PRECISIONS[name], w=work: layer_rows(plan, gate, ceilings, s, r, p, w),
                )
            )  # fmt: skip
    for tier, shape, rows, name, mode in plan.compiled:
        for work in ("step", "forward"):
            units.append(
                Unit(
                    tier, "layers", f"{shape.name}, M = {rows}, {name}, {work}, compiled ({mode})",
                    40.0 if mode == "max-autotune" else 15.0,
                    lambda s=shape, r=rows, p=PRECISIONS[name], w=work, m=mode: layer_rows(
                        plan, gate, ceilings, s, r, p, w, m
                    ),
                )
            )  # fmt: skip
    units.append(Unit(2, "host", "host time of a call", 3.0, lambda: host_rows(plan, gate)))
    return units
