"""Times the tuner's candidates for each kernel and class of M; the winner is printed as a row of the table of tiles."""

from __future__ import annotations

import torch

from benchmarks.gpu.layers import problem_of
from benchmarks.gpu.measure import copies_for, interleave, release
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision, Shape
from benchmarks.gpu.work import Row, Unit
from rlrr_kernels import backends
from rlrr_kernels.ops import linear_configs


def tune_rows(plan: Plan, shape: Shape, rows: int, precision: Precision, kernel: str) -> list[Row]:
    """Times every candidate of :mod:`rlrr_kernels.ops.tuning`, interleaved, one graph each; ``winner`` is the fastest.

    Candidates that do not compile, spill, need too much shared memory or break the error bound have a reason instead.
    """
    head = {
        "section": "tune", "kernel": kernel, "M": rows, "N": shape.out_features, "K": shape.in_features,
        "precision": precision.name,
    }  # fmt: skip
    reason = backends.unavailable("triton", plan.device)
    if reason:
        return [{**head, "skipped": reason}]
    from rlrr_kernels.ops import linear_triton, tuning

    arch, dtype = linear_triton.architecture(torch.device(plan.device)), precision.dtype
    limit = linear_configs.shape_class(kernel, arch, dtype, rows)
    head |= {"arch": arch, "class": limit}
    candidates = tuning.candidates(kernel, arch, dtype, rows)
    shipped = candidates[0]
    problem = problem_of(plan, shape, rows, precision)
    steps, skipped = {}, {}
    with precision.applied():
        tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
        drawn = [{name: tensor.detach() for name, tensor in t.items()} for t in tensors]
        for tiles in candidates:
            if reason := tuning.rejection(kernel, drawn[0], arch, tiles):
                skipped[tiles] = reason
            else:
                launches = [tuning.launches_of(kernel, t, arch, tiles) for t in drawn]
                steps[tiles] = [lambda group=group: [launch.run() for launch in group] for group in launches]
        timings, failures = interleave(steps, plan.device, plan.seconds, plan.graphs)
    tensors = drawn = launches = steps = None
    release(plan.device)
    times = {tiles: timing.graph_us or timing.wall_us for tiles, timing in timings.items()}
    winner = min(times, key=times.get) if times else None
    result = []
    for tiles in candidates:
        row = {**head, "tiles": list(tiles), "shipped": tiles == shipped}
        if tiles in times:
            row |= {"us": times[tiles], "winner": tiles == winner}
            if tiles == winner:
                row["table_row"] = f"({kernel!r}, {dtype.itemsize}): ({limit}, {tiles})"
        else:
            row["skipped"] = skipped.get(tiles) or failures[tiles]
        result.append(row)
    return result


def tune_units(plan: Plan) -> list[Unit]:
    """One unit for each kernel and shape class."""
    return [
        Unit(
            tier, "tune", f"{kernel}, {shape.name}, M = {rows}, {name}", 15.0,
            lambda s=shape, r=rows, p=PRECISIONS[name], k=kernel: tune_rows(plan, s, r, p, k),
        )
        for tier, shape, rows, name in plan.tuned
        for kernel in linear_configs.KERNELS
    ]  # fmt: skip
