"""The two ceilings of this device: a large copy, and a large matrix product by the vendor library on random data."""

from __future__ import annotations

import torch

from benchmarks.gpu.launch_model import Ceilings
from benchmarks.gpu.plan import PRECISIONS, RunPlan
from benchmarks.gpu.timing import interleave, release
from benchmarks.gpu.work import Row


def ceilings_of(rows: list[Row]) -> Ceilings | None:
    """The ceilings that :func:`ceiling_rows` measured, from the rows so far; None before that."""
    here = [row for row in rows if row["section"] == "ceilings" and "what" in row]
    bandwidth = next((1e12 * row["TB_per_s"] for row in here if "TB_per_s" in row), None)
    rates = {row["precision"]: 1e12 * row["TFLOP_per_s"] for row in here if "TFLOP_per_s" in row}
    return Ceilings(bandwidth, rates) if bandwidth and rates else None


def ceiling_rows(plan: RunPlan) -> list[Row]:
    """Copy bandwidth, counting bytes read plus written, and the rate of a square product in every dtype."""
    elements, side = (1 << 16, 64) if plan.tiny else (1 << 30, 8192)
    source = torch.randn(elements, device=plan.device, dtype=torch.float32 if plan.tiny else torch.bfloat16)
    target = torch.empty_like(source)

    def microseconds(step) -> float:
        timings, failures = interleave({"it": [step]}, plan.device, plan.seconds, plan.graphs)
        if failures:
            raise RuntimeError(failures["it"])
        return timings["it"].graph_us or timings["it"].wall_us

    moved = 2 * source.nbytes
    bandwidth = 1e6 * moved / microseconds(lambda: target.copy_(source))
    rows: list[Row] = [{"section": "ceilings", "what": "copy", "bytes": moved, "TB_per_s": bandwidth / 1e12}]
    source = target = None  # a gigabyte each
    for name, precision in PRECISIONS.items():
        if precision.mixed:
            continue
        a, b = (torch.randn(side, side, device=plan.device).to(precision.dtype) for _ in range(2))
        with precision.applied():
            rate = 1e6 * 2 * side**3 / microseconds(lambda a=a, b=b: a @ b)
        what = f"{name} product {side}³"
        rows.append({"section": "ceilings", "what": what, "precision": name, "TFLOP_per_s": rate / 1e12})
    release(plan.device)
    return rows
