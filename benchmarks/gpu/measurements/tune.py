"""Times the tuner's candidates for each kernel and class of M.

The fastest is printed as a row of the table of tiles and kept in the run's own file of tuned tiles, which all that is
timed later uses, and which ``RLRR_CACHE_DIR`` makes any later process use.
"""

from __future__ import annotations

import math
from itertools import product

import torch

from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Precision, RunPlan, Shape
from benchmarks.gpu.timing import ContextLost, copies_for, interleave, release
from benchmarks.gpu.work import Row, Unit, announce, sizes_of
from benchmarks.support.common import Problem
from rlrr_kernels import backends, devices
from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.dtypes import matmul_precision


def _entry(plan: RunPlan, kernel: str, precision: Precision, m: int) -> str:
    """The name of a tuned entry; under ``precision.applied()``."""
    from rlrr_kernels.ops.choice import store

    device = torch.device(plan.device)
    limit = configs.shape_class(kernel, devices.gpu_of(device), precision.dtype, m)
    names = store.precision_name(precision.dtype, precision.weight_dtype, matmul_precision())
    return store.entry_name(store.gpu_name(device), kernel, names, limit)


def is_tuned(plan: RunPlan, problem: Problem, precision: Precision) -> bool:
    """Whether any kernel takes tuned tiles for a problem."""
    if backends.unavailable("triton", plan.device):
        return False
    from rlrr_kernels.ops.choice import store

    entries = store.read(store.cache_file()) if store.enabled() else {}
    with precision.applied():
        return any(_entry(plan, kernel, precision, problem.m) in entries for kernel in configs.KERNELS)


def tune_rows(
    plan: RunPlan, problems: list[tuple[Shape, int]], precision: Precision, kernel: str, schedule: str
) -> list[Row]:
    """Times each candidate of :mod:`rlrr_kernels.ops.tuning.tiles` of one schedule, and the tiles in use.

    These, pairs (shape, M), are of one class of M. Interleaved, one graph each; ``us`` is the geometric mean and
    ``winner`` the fastest. Candidates that do not compile, spill, need too much shared memory or break the error bound
    have a reason instead.
    """
    m = problems[0][1]
    head = {
        "section": "tune", "kernel": kernel, "schedule": schedule, "precision": precision.name,
        "problems": [[m, shape.n, shape.k] for shape, m in problems],
    }  # fmt: skip
    reason = backends.unavailable("triton", plan.device)
    if reason:
        return [{**head, "skipped": reason}]
    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.tuning import tiles as tuning

    gpu, dtype = devices.gpu_of(torch.device(plan.device)), precision.dtype
    limit = configs.shape_class(kernel, gpu, dtype, m)
    head |= {"arch": gpu.name, "class": limit}
    with precision.applied():
        name = _entry(plan, kernel, precision, m)
        shipped, *others = tuning.candidates(kernel, gpu, dtype, m, experimental=schedule != "tiled")
        entry = store.read(store.cache_file()).get(name)
        used = configs.Tiles(**{field: entry[field] for field in shipped._fields}) if entry else shipped
        candidates = list(dict.fromkeys([used, *(tiles for tiles in (shipped, *others) if tiles.schedule == schedule)]))
        if len(candidates) == 1:
            return [{**head, "skipped": "there are no other tiles to try"}]
        skipped: dict[configs.Tiles, str] = {}
        times: dict[configs.Tiles, list[float]] = {tiles: [] for tiles in candidates}
        for shape, m in problems:
            problem = plan.problem(m, shape, precision)
            timed = [tiles for tiles in candidates if tiles not in skipped]
            found, failed = _time_candidates(plan, problem, precision, kernel, gpu, timed)
            skipped |= failed
            for tiles, microseconds in found.items():
                times[tiles].append(microseconds)
        means = {
            tiles: math.exp(sum(map(math.log, here)) / len(here))
            for tiles, here in times.items()
            if tiles not in skipped
        }
        winner = min(means, key=means.get) if means else None
        if winner is not None and winner != used and means[winner] < tuning.GAIN * means.get(used, math.inf):
            figures = {"us": round(means[winner], 3), "instead_of_us": round(means.get(used, math.inf), 3)}
            store.write(store.cache_file(), {name: winner._asdict() | figures})
    result = []
    for tiles in candidates:
        row = {**head, "tiles": list(tiles), "shipped": tiles == shipped, "used": tiles == used}
        if tiles in means:
            row |= {"us": means[tiles], "each_us": times[tiles], "winner": tiles == winner}
            if tiles == winner:
                row["table_row"] = f"({kernel!r}, {dtype.itemsize}): ({limit}, {tiles})"
                if tiles != used and not configs.proven(kernel, tiles.schedule, gpu):
                    row["proven_row"] = str((kernel, schedule, gpu.name))
        else:
            row["skipped"] = skipped[tiles]
        result.append(row)
    return result


def _time_candidates(
    plan: RunPlan,
    problem: Problem,
    precision: Precision,
    kernel: str,
    gpu: Gpu,
    candidates: list[configs.Tiles],
) -> tuple[dict[configs.Tiles, float], dict[configs.Tiles, str]]:
    """Microseconds of each candidate on one problem, and why others have none."""
    from rlrr_kernels.ops.tuning import tiles as tuning

    tensors = [problem.tensors(seed) for seed in range(copies_for(problem))]
    drawn = [{name: tensor.detach() for name, tensor in t.items()} for t in tensors]
    steps, skipped = {}, {}
    for tiles in candidates:
        announce(f"{kernel} {tuple(tiles)}", precision.name, **sizes_of(problem))
        if reason := tuning.rejection(kernel, drawn[0], gpu, tiles):
            skipped[tiles] = reason
            _check_context(plan, reason)
        else:
            launches = [tuning.launches_of(kernel, t, gpu, tiles) for t in drawn]
            steps[tiles] = [lambda group=group: [launch.run() for launch in group] for group in launches]
    timings, failures = interleave(steps, plan.device, plan.seconds, plan.graphs)
    tensors = drawn = launches = steps = None
    release(plan.device)
    return {tiles: timing.graph_us or timing.wall_us for tiles, timing in timings.items()}, skipped | failures


def _check_context(plan: RunPlan, reason: str) -> None:
    """The tuner takes every error for a candidate's own; one that the device does not survive ends the process."""
    if plan.device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise ContextLost(reason) from error


def tune_units(plan: RunPlan) -> list[Unit]:
    """One unit for each kernel, schedule and class of M."""
    units = []
    for tier, problems, name in plan.tuned:
        for kernel, (schedule, kernels) in product(configs.KERNELS, configs.SCHEDULES.items()):
            if kernel not in kernels or (schedule != "tiled" and problems[0][1] < configs.TMA_MIN_ROWS):
                continue
            label = f"{kernel}, {schedule}, M = {', '.join(str(m) for _, m in problems)}, {name}"
            units.append(
                Unit(
                    tier, "tune", label, 5.0 * len(problems),
                    lambda bench, s=problems, p=PRECISIONS[name], k=kernel, c=schedule: tune_rows(plan, s, p, k, c),
                )
            )  # fmt: skip
    return units


def fallback_rows(plan: RunPlan, checks: Checks, precision: Precision) -> list[Row]:
    """Makes sure that what ships for TMA works here, or that all later units do without it.

    The tiles without TMA are first put in force, in the file of tuned tiles, and left so unless the shipped ones pass:
    where those hang or crash, the next process finds the file. One problem, large enough for TMA.
    """
    from rlrr_kernels.ops.choice import store

    if backends.unavailable("triton", plan.device):
        return []
    gpu, result = devices.gpu_of(torch.device(plan.device)), []
    path = store.cache_file()
    problem = plan.problem(8 * TOKENS, Shape("", 768, 768), precision)
    for (kernel, size), shipped in configs.PERSISTENT.get(gpu.family, {}).items():
        if size != precision.dtype.itemsize or not configs.proven(kernel, shipped.schedule, gpu):
            continue
        with precision.applied():
            name = _entry(plan, kernel, precision, problem.m)
            tiled = configs.tiles_for(kernel, gpu, precision.dtype, problem.m)
            store.write(path, {name: tiled._asdict()})
            with store.only_tiles(kernel, shipped):
                reason = checks.reason_against_tiles(kernel, precision, problem)
            if reason is None:
                store.write(path, {name: None})
        result.append(
            {
                "section": "correctness", "check": "shipped tiles", "backend": f"{kernel}, {shipped.schedule}",
                "precision": precision.name, "passed": reason is None, "reason": reason,
            }
        )  # fmt: skip
    return result
