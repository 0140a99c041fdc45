"""The tuner: tries tiles for each kernel and shape class, and prints the winner as a row of the table of tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu.gate import Gate
from benchmarks.gpu.layers import problem_of
from benchmarks.gpu.measure import copies_for, describe, interleave, release
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision, Shape
from benchmarks.gpu.work import Row, Unit
from rlrr_kernels import backends, numerics, rlrr_linear
from rlrr_kernels.ops import linear_configs
from rlrr_kernels.ops.linear_configs import Tiles

# By kernel, bytes of an element and the largest M of the class (0: any). What ships is always tried as well.
CANDIDATES = {
    ("forward", 2, 16): [(16, 32, 128, 4, 4), (16, 32, 256, 4, 3), (16, 64, 128, 4, 5), (16, 64, 256, 4, 3)],
    ("forward", 2, 64): [(64, 64, 64, 4, 5), (64, 64, 128, 4, 3), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4)],
    ("forward", 2, 0): [(128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4)],
    ("grad_x", 2, 16): [(16, 64, 32, 4, 4), (16, 128, 32, 4, 4), (16, 128, 64, 4, 5), (16, 256, 64, 4, 3)],
    ("grad_x", 2, 64): [(64, 64, 64, 4, 5), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4), (64, 64, 128, 4, 4)],
    ("grad_x", 2, 0): [(128, 32, 128, 8, 4), (128, 64, 128, 8, 3), (128, 64, 128, 4, 3), (64, 64, 128, 4, 4)],
    ("grad_scales", 2, 64): [(32, 64, 64, 4, 4), (64, 64, 64, 8, 3), (64, 64, 128, 4, 3), (16, 64, 64, 4, 4)],
    ("grad_scales", 2, 0): [(64, 128, 128, 8, 3), (32, 128, 128, 8, 4), (128, 128, 128, 8, 2), (64, 128, 64, 4, 4)],
    ("forward", 4, 0): [(64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3)],
    ("grad_x", 4, 0): [(64, 32, 64, 4, 3), (64, 32, 64, 8, 3), (128, 32, 64, 8, 3), (128, 32, 128, 8, 3)],
    ("grad_scales", 4, 0): [(32, 64, 64, 4, 3), (32, 64, 64, 8, 3), (32, 128, 64, 8, 3), (32, 128, 128, 8, 3)],
}
"""(block_m, block_n, block_k, warps, stages) for :class:`rlrr_kernels.ops.linear_configs.Tiles`."""

TINY_CANDIDATES = [(16, 16, 32, 4, 1)]


@contextmanager
def only_tiles(arch: str, kernel: str, size: int, tiles: Tiles) -> Iterator[None]:
    """Makes ``tiles`` the table's only entry for a kernel and element size within a block."""
    table = linear_configs.TABLE[arch]
    before = table[kernel, size]
    table[kernel, size] = [(0, tiles)]
    linear_configs.tiles_for.cache_clear()
    try:
        yield
    finally:
        table[kernel, size] = before
        linear_configs.tiles_for.cache_clear()


def shape_class(arch: str, kernel: str, size: int, rows: int) -> int:
    """The largest M of the table's class that serves ``rows``; 0 for the last, which has none."""
    entries = linear_configs.TABLE[arch][kernel, size]
    return next((limit for limit, _ in entries[:-1] if rows <= limit), 0)


def call_of(kernel: str, t: dict[str, torch.Tensor]) -> Callable[[], object]:
    """The one-pass launches of ``kernel`` alone, without autograd."""
    from rlrr_kernels.ops import linear_triton

    t = {name: tensor.detach() for name, tensor in t.items()}
    given = [t[key] for key in ("weight", "scale_row", "scale_col")]
    if kernel == "forward":
        return lambda: linear_triton.forward(t["x"], *given, t["bias"], True, path="one_pass")
    needs = (True, False, False, False) if kernel == "grad_x" else (False, True, True, True)
    return lambda: linear_triton.backward(t["grad_y"], t["x"], *given, True, needs, path="one_pass")


def architecture(plan: Plan) -> str:
    """The architecture of the table that serves this device."""
    if plan.device == "cpu":
        return "interpreter"
    if torch.version.hip:
        return linear_configs.architecture(None, torch.cuda.get_device_properties(0).gcnArchName)
    return linear_configs.architecture(torch.cuda.get_device_capability())


def tune_rows(plan: Plan, gate: Gate, shape: Shape, rows: int, precision: Precision, kernel: str) -> list[Row]:
    """Times every candidate that is exact, interleaved, one graph each; ``winner`` marks the fastest.

    Candidates that do not compile, need too much shared memory or break the error bound have a reason instead.
    """
    arch, size = architecture(plan), precision.dtype.itemsize
    limit = shape_class(arch, kernel, size, rows)
    shipped = linear_configs.tiles_for(kernel, arch, precision.dtype, rows)
    tried = TINY_CANDIDATES if plan.tiny else CANDIDATES.get((kernel, size, limit), [])
    candidates = list(dict.fromkeys([shipped, *(Tiles(*values) for values in tried)]))
    head = {
        "section": "tune", "arch": arch, "kernel": kernel, "M": rows, "N": shape.out_features, "K": shape.in_features,
        "precision": precision.name, "class": limit,
    }  # fmt: skip
    reason = backends.unavailable("triton", plan.device)
    if reason:
        return [{**head, "skipped": reason}]
    problem = problem_of(plan, shape, rows, precision)
    steps, skipped = {}, {}
    with precision.applied():
        tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
        for tiles in candidates:
            try:
                if reason := _inexact(arch, kernel, size, tiles, problem, precision, gate):
                    skipped[tiles] = reason
                    continue
            except Exception as error:
                skipped[tiles] = describe(error)
                continue
            steps[tiles] = [_with_tiles(arch, kernel, size, tiles, call_of(kernel, t)) for t in tensors]
        timings, failures = interleave(steps, plan.device, plan.seconds, plan.graphs)
    tensors = steps = None
    release(plan.device)
    times = {tiles: timing.graph_us or timing.wall_us for tiles, timing in timings.items()}
    winner = min(times, key=times.get) if times else None
    result = []
    for tiles in candidates:
        row = {**head, "tiles": list(tiles), "shipped": tiles == shipped}
        if tiles in times:
            row |= {"us": times[tiles], "winner": tiles == winner}
            if tiles == winner:
                row["table_row"] = f"({kernel!r}, {size}): ({limit}, {tiles})"
        else:
            row["skipped"] = skipped.get(tiles) or failures[tiles]
        result.append(row)
    return result


def _with_tiles(arch: str, kernel: str, size: int, tiles: Tiles, call: Callable[[], object]) -> Callable[[], object]:
    def step():
        with only_tiles(arch, kernel, size, tiles):
            return call()

    return step


def _inexact(arch, kernel, size, tiles, problem, precision: Precision, gate: Gate) -> str | None:
    """Why a candidate is not timed: the bound on the timed problem, or in TF32 the error rule on a case like it."""
    function = functools.partial(rlrr_linear, backend="triton.one_pass")
    with only_tiles(arch, kernel, size, tiles):
        if precision.matmul == "highest":
            errors = numerics.bound_errors(function, problem.tensors())
            broken = {name: round(error, 2) for name, error in errors.items() if not error <= numerics.BOUND}
            return f"over {numerics.BOUND} unit roundoffs of the bound: {broken}" if broken else None
        rows, out_features, in_features, groups = gate.plan.gate[0]
        case = numerics.Case(
            rows, out_features, in_features, groups=groups, dtype=precision.dtype, device=gate.plan.device
        )
        try:
            numerics.check_error_rule(function, case)
        except AssertionError as error:
            return "fails the error rule: " + "; ".join(str(error).splitlines()[1:])
    return None


def tune_units(plan: Plan, gate: Gate) -> list[Unit]:
    """One unit for each kernel and shape class."""
    return [
        Unit(
            tier, "tune", f"{kernel}, {shape.name}, M = {rows}, {name}", 15.0,
            lambda s=shape, r=rows, p=PRECISIONS[name], k=kernel: tune_rows(plan, gate, s, r, p, k),
        )
        for tier, shape, rows, name in plan.tuned
        for kernel in linear_configs.KERNELS
    ]  # fmt: skip
