"""Memory of one linear layer: what stays alive between forward and backward, and the peak of a step."""

from __future__ import annotations

import gc

import torch

from benchmarks.common import Forward, kept_bytes, peak_bytes, synchronize
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.gate import Gate
from benchmarks.gpu.layers import problem_of, reason_against
from benchmarks.gpu.measure import describe, release
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision, Shape
from benchmarks.gpu.rivals import OURS, PEFT, forwards, layer_steps
from benchmarks.gpu.work import Row, Unit

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
        try:
            if not reason:
                row |= _measured(plan, problem.tensors(), name, precision)
        except Exception as error:
            reason = describe(error)
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


def memory_units(plan: Plan, gate: Gate) -> list[Unit]:
    """One unit for each shape."""
    return [
        Unit(
            tier, "memory", f"{shape.name}, M = {rows}, {name}", 3.0,
            lambda s=shape, r=rows, p=PRECISIONS[name]: memory_rows(plan, gate, s, r, p),
        )
        for tier, shape, rows, name in plan.memory
    ]  # fmt: skip
