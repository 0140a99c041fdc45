"""Memory of a linear layer and of a block: what stays alive between forward and backward, and the peak of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.activation_bytes import TOKENS, VARIANTS, build
from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.measurements.implementations import OURS, forwards, layer_steps
from benchmarks.gpu.measurements.layers import reason_against
from benchmarks.gpu.plan import PRECISIONS, Precision, RunPlan, Shape
from benchmarks.gpu.timing import explain, release
from benchmarks.gpu.work import Row, Unit, announce, sizes_of
from benchmarks.support.baselines import PEFT, peft_reason
from benchmarks.support.common import Forward, Step, kept_bytes, peak_bytes, synchronize

IMPLEMENTATIONS = (*OURS, "reference", "frozen", *PEFT, *ESTIMATES)


def alive_bytes(forward: Forward) -> int:
    """Bytes the allocator holds after a forward beyond its result."""
    forward()
    gc.collect()
    synchronize("cuda")
    before = torch.cuda.memory_allocated()
    y = forward()
    return torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()


def _row(plan: RunPlan, head: Row, reason: str | None, measure: Callable[[], Row]) -> Row:
    try:
        return head | ({"skipped": reason} if reason else measure())
    except Exception as error:
        return head | {"skipped": explain(error, plan.device)}
    finally:
        release(plan.device)


def _bytes(plan: RunPlan, forward: Forward, x: Tensor, others: list[Tensor], step: Step) -> Row:
    """``kept_bytes``: saved tensors beyond x and ``others``, the parameters; ``kept_with_x_bytes``: beyond ``others``.
    ``alive_bytes``: what the GPU's allocator says of the former (None on a CPU). ``peak_bytes``: the most a step holds
    beyond its arguments."""
    kept, kept_with_x = kept_bytes(forward, [x, *others]), kept_bytes(forward, others)
    alive = None if plan.device == "cpu" else alive_bytes(forward)
    return {
        "kept_bytes": kept, "kept_with_x_bytes": kept_with_x, "alive_bytes": alive,
        "peak_bytes": peak_bytes(step, plan.device),
    }  # fmt: skip


def memory_rows(plan: RunPlan, checks: Checks, shape: Shape, m: int, precision: Precision) -> list[Row]:
    """What every implementation of one layer keeps, see :func:`_bytes`."""
    problem = plan.problem(m, shape, precision)

    def measure(name: str) -> Row:
        tensors = problem.tensors()
        with precision.applied():
            ((forward, leaves),) = forwards(name, [tensors])
            (step,) = layer_steps(name, "step", [tensors], precision)
            others = [tensor for tensor in (*tensors.values(), *leaves) if tensor is not tensors["x"]]
            with precision.autocast(plan.device):
                return _bytes(plan, forward, tensors["x"], others, step)

    rows = []
    for name in IMPLEMENTATIONS:
        reason = reason_against(checks, name, precision, problem)
        announce(name, precision.name, **sizes_of(problem))
        head = {"section": "memory", "shape": shape.name, **sizes_of(problem), "precision": precision.name}
        head["implementation"] = name
        rows.append(_row(plan, head, reason, lambda name=name: measure(name)))
    return rows


def block_rows(plan: RunPlan, checks: Checks, width: int, heads: int, images: int, precision: Precision) -> list[Row]:
    """The same of a ViT of one block, for every variant of :mod:`benchmarks.activation_bytes`."""

    def measure(variant: str) -> Row:
        model = build(variant, 1, width, heads, precision.weight_dtype).to(plan.device).train()
        x = torch.randn(images, 3, 32, 32, device=plan.device, dtype=precision.weight_dtype, requires_grad=True)
        leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

        def forward() -> Tensor:
            with precision.autocast(plan.device):
                return model(x)

        with precision.applied():
            step = lambda: torch.autograd.grad(forward().float().sum(), leaves)  # noqa: E731
            return _bytes(plan, forward, x, list(model.parameters()), step)

    rows = []
    for variant in VARIANTS:
        reason = peft_reason("lora") if variant == "lora" else None
        if variant.startswith("rlrr") and not plan.tiny:
            reason = checks.reason_against("recompute", precision)
        head = {
            "section": "memory", "shape": f"ViT of one block, width {width}", "M": images * TOKENS, "N": width,
            "K": 4 * width, "precision": precision.name, "implementation": variant,
        }  # fmt: skip
        announce(variant, precision.name, model=head["shape"])
        rows.append(_row(plan, head, reason, lambda variant=variant: measure(variant)))
    return rows


def memory_units(plan: RunPlan) -> list[Unit]:
    """One unit for each shape, and one for each block."""
    blocks = [
        Unit(
            tier, "memory", f"ViT of one block, width {width}, {name}", 6.0,
            lambda bench, w=width, h=heads, i=images, p=PRECISIONS[name]: block_rows(plan, bench.checks, w, h, i, p),
        )
        for tier, width, heads, images, name in plan.blocks
    ]  # fmt: skip
    return blocks + [
        Unit(
            tier, "memory", f"{shape.name}, M = {m}, {name}", 3.0,
            lambda bench, s=shape, m=m, p=PRECISIONS[name]: memory_rows(plan, bench.checks, s, m, p),
        )
        for tier, shape, m, name in plan.memory
    ]  # fmt: skip
