"""A layer under many adapters in one batch, beside one merged layer and beside one adapter, on the same rows."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.correctness.check import MULTI, Checks
from benchmarks.gpu.plan import PRECISIONS, Batch, Precision, RunPlan
from benchmarks.gpu.timing import copies_for, release, timing_rows
from benchmarks.gpu.work import Row, Unit, announce, sizes_of
from benchmarks.support.common import Problem, Step
from rlrr_kernels import TaskIndex, numerics, rlrr_linear, rlrr_linear_multi
from rlrr_kernels.reference import rescaled_weight_reference

OURS = ("auto", "triton.fused", "triton.merge")
IMPLEMENTATIONS = {"forward": (*OURS, "one adapter", "merged"), "step": (*OURS, "one adapter")}
"""By work. ``merged`` is ``F.linear`` with the W' of one adapter, ``one adapter`` is ``rlrr_linear``."""

Tensors = dict[str, torch.Tensor]


def _draws(problem: Problem, batch: Batch) -> list[Tensors]:
    """Sets of x, W and grad_y that rotate, so that no cache holds them, and the adapters, which all of them share."""
    index = (0,) * batch.samples
    case = numerics.MultiCase(index, 1, problem.n, problem.k, batch.tasks, dtype=problem.dtype, device=problem.device)
    stacks = {name: case.draw(0)[name].requires_grad_() for name in ("scale_row", "scale_col", "shift")}
    found = []
    for seed in range(copies_for(problem)):
        drawn = problem.tensors(seed)
        t = {name: drawn[name].detach().unflatten(0, (batch.samples, -1)) for name in ("x", "grad_y")}
        found.append({"weight": drawn["weight"], "bias": drawn["bias"].detach(), **t, **stacks})
        found[-1]["x"].requires_grad_()
    return found


def _step(name: str, work: str, index: TaskIndex, t: Tensors) -> Step:
    """One call of an implementation: a forward, or forward and backward of x and all adapters."""
    stacks = [t[key] for key in ("scale_row", "scale_col", "shift")]
    if name == "merged":
        row, col = (stack[0].detach() for stack in stacks[:2])
        weight = rescaled_weight_reference(t["weight"].float(), row, col).to(t["weight"].dtype)
        forward = partial(F.linear, t["x"], weight, t["bias"].to(weight.dtype))
    elif name == "one adapter":
        stacks = [stack[0].detach().requires_grad_() for stack in stacks]
        forward = partial(rlrr_linear, t["x"], t["weight"], *stacks)
    else:
        forward = partial(
            rlrr_linear_multi, t["x"], t["weight"], *stacks[:2], t["bias"], stacks[2], index=index, backend=name
        )
    if work == "step":
        return lambda: torch.autograd.grad(forward(), [t["x"], *stacks], t["grad_y"])
    return torch.no_grad()(forward)


def task_rows(plan: RunPlan, checks: Checks, batch: Batch, precision: Precision, work: str) -> list[Row]:
    """Every implementation on one batch, interleaved."""
    problem = plan.problem(batch.samples * batch.rows, batch.shape, precision)
    head = {
        "section": "tasks", "shape": batch.shape.name, **sizes_of(problem), "samples": batch.samples,
        "rows_a_sample": batch.rows, "tasks": batch.tasks, "precision": precision.name, "work": work,
    }  # fmt: skip

    def starting(name: str) -> None:
        announce(MULTI if name in OURS else name, precision.name, **sizes_of(problem))

    reason = checks.reason_against(MULTI, precision)
    skipped = {name: reason for name in OURS if reason}
    try:
        with precision.applied():
            order = torch.randperm(batch.samples, generator=torch.Generator().manual_seed(0))
            index = TaskIndex((torch.arange(batch.samples) % batch.tasks)[order], problem.device)
            draws = _draws(problem, batch)
            steps_of = {
                name: lambda name=name: [_step(name, work, index, t) for t in draws] for name in IMPLEMENTATIONS[work]
            }
            return timing_rows(head, steps_of, skipped, plan.device, plan.seconds, plan.graphs, starting)
    finally:
        draws = steps_of = None
        release(plan.device)


def task_units(plan: RunPlan) -> list[Unit]:
    """The batches of the plan, forward and with the backward."""

    def unit(tier: int, batch: Batch, name: str, work: str) -> Unit:
        label = f"{batch.shape.name}, {batch.samples} x {batch.rows} rows, {batch.tasks} tasks, {name}, {work}"
        precision = PRECISIONS[name]
        return Unit(
            tier, "tasks", label, 8.0, lambda bench: task_rows(bench.plan, bench.checks, batch, precision, work)
        )

    return [unit(*entry, work) for entry in plan.batches for work in IMPLEMENTATIONS]
