"""Memory of a linear layer and of a block: what stays alive between forward and backward, and the peak of a step."""

from __future__ import annotations

import gc

import torch

from benchmarks.activation_bytes import TOKENS, VARIANTS, build
from benchmarks.common import Forward, kept_bytes, peak_bytes, synchronize
from benchmarks.gpu.correctness.check import Gate
from benchmarks.gpu.measurements.baselines import OURS, PEFT, forwards, layer_steps, peft_reason
from benchmarks.gpu.measurements.estimates import ESTIMATES
from benchmarks.gpu.measurements.layers import reason_against
from benchmarks.gpu.measurements.timing import explain, release
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision, Shape, problem_of
from benchmarks.gpu.session.work import Row, Unit, announce

RIVALS = (*OURS, "reference", "frozen", *PEFT, *ESTIMATES)


def alive_bytes(forward: Forward) -> int:
    """Bytes the allocator holds after a forward beyond its result."""
    forward()
    gc.collect()
    synchronize("cuda")
    before = torch.cuda.memory_allocated()
    y = forward()
    return torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()


def memory_rows(plan: Plan, gate: Gate, shape: Shape, rows: int, precision: Precision) -> list[Row]:
    """``kept_bytes``: saved tensors beyond x and the parameters; ``kept_with_x_bytes``: beyond the parameters alone.
    ``alive_bytes``: what the GPU's allocator says of the former (None on a CPU). ``peak_bytes``: the most a step holds
    beyond its arguments."""
    result = []
    problem = problem_of(plan, shape, rows, precision)
    for name in RIVALS:
        row: Row = {
            "section": "memory", "shape": shape.name, "M": rows, "N": shape.out_features, "K": shape.in_features,
            "precision": precision.name, "rival": name,
        }  # fmt: skip
        reason = reason_against(gate, name, precision, problem)
        announce(name, precision.name, M=rows, N=shape.out_features, K=shape.in_features)
        try:
            if not reason:
                row |= _measured(plan, problem.tensors(), name, precision)
        except Exception as error:
            reason = explain(error, plan.device)
        result.append(row | ({"skipped": reason} if reason else {}))
        release(plan.device)
    return result


def _measured(plan: Plan, tensors: dict[str, torch.Tensor], name: str, precision: Precision) -> Row:
    with precision.applied():
        ((forward, leaves),) = forwards(name, [tensors])
        with precision.autocast(plan.device):
            kept = kept_bytes(forward, [*tensors.values(), *leaves])
            others = [tensor for tensor in (*tensors.values(), *leaves) if tensor is not tensors["x"]]
            kept_with_x = kept_bytes(forward, others)
            alive = None if plan.device == "cpu" else alive_bytes(forward)
        (step,) = layer_steps(name, "step", [tensors], precision)
        return {
            "kept_bytes": kept, "kept_with_x_bytes": kept_with_x, "alive_bytes": alive,
            "peak_bytes": peak_bytes(step, plan.device),
        }  # fmt: skip


def block_rows(plan: Plan, gate: Gate, width: int, heads: int, images: int, precision: Precision) -> list[Row]:
    """The same of a ViT of one block, for every variant of :mod:`benchmarks.activation_bytes`."""
    result = []
    for variant in VARIANTS:
        row: Row = {
            "section": "memory", "shape": f"ViT of one block, width {width}", "M": images * TOKENS, "N": width,
            "K": 4 * width, "precision": precision.name, "rival": variant,
        }  # fmt: skip
        reason = peft_reason("lora") if variant == "lora" else None
        if variant.startswith("rlrr") and not plan.tiny:
            reason = gate.reason_against("recompute", precision)
        announce(variant, precision.name, model=row["shape"])
        try:
            if not reason:
                row |= _measured_block(plan, variant, width, heads, images, precision)
        except Exception as error:
            reason = explain(error, plan.device)
        result.append(row | ({"skipped": reason} if reason else {}))
        release(plan.device)
    return result


def _measured_block(plan: Plan, variant: str, width: int, heads: int, images: int, precision: Precision) -> Row:
    model = build(variant, 1, width, heads, precision.weight_dtype).to(plan.device).train()
    x = torch.randn(images, 3, 32, 32, device=plan.device, dtype=precision.weight_dtype, requires_grad=True)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def forward() -> torch.Tensor:
        with precision.autocast(plan.device):
            return model(x)

    with precision.applied():
        kept, with_x = (kept_bytes(forward, [*given, *model.parameters()]) for given in ([x], []))
        alive = None if plan.device == "cpu" else alive_bytes(forward)
        peak = peak_bytes(lambda: torch.autograd.grad(forward().float().sum(), leaves), plan.device)
    return {"kept_bytes": kept, "kept_with_x_bytes": with_x, "alive_bytes": alive, "peak_bytes": peak}


def memory_units(plan: Plan) -> list[Unit]:
    """One unit for each shape, and one for each block."""
    blocks = [
        Unit(
            tier, "memory", f"ViT of one block, width {width}, {name}", 6.0,
            lambda bench, w=width, h=heads, i=images, p=PRECISIONS[name]: block_rows(plan, bench.gate, w, h, i, p),
        )
        for tier, width, heads, images, name in plan.blocks
    ]  # fmt: skip
    return blocks + [
        Unit(
            tier, "memory", f"{shape.name}, M = {rows}, {name}", 3.0,
            lambda bench, s=shape, r=rows, p=PRECISIONS[name]: memory_rows(plan, bench.gate, s, r, p),
        )
        for tier, shape, rows, name in plan.memory
    ]  # fmt: skip
