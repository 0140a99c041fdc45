"""All units of a plan, in the order in which they are run."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.correctness.check import CHECKED, MLP, MULTI, NORM
from benchmarks.gpu.measurements.ceilings import ceiling_rows
from benchmarks.gpu.measurements.layers import layer_units
from benchmarks.gpu.measurements.memory import memory_units
from benchmarks.gpu.measurements.steps import step_units
from benchmarks.gpu.measurements.tasks import task_units
from benchmarks.gpu.measurements.tune import fallback_rows, tune_units
from benchmarks.gpu.plan import PRECISIONS, Precision, RunPlan, cpu_plan, gpu_plan
from benchmarks.gpu.session.worker import Bench
from benchmarks.gpu.work import Row, Unit

SECTIONS = ("layers", "host", "memory", "steps", "tasks", "tune")
"""Those that can be left out. In this order within a tier, after the checks and the ceilings."""

_ORDER = ("ceilings", "correctness", *SECTIONS)


def make_units(sections: tuple[str, ...], device: str) -> tuple[RunPlan, list[Unit]]:
    """The plan for ``device`` ("cuda" or "cpu"), and the units of these sections, most valuable first."""
    plan = gpu_plan() if device == "cuda" else cpu_plan()
    return plan, units_of(plan, sections)


def units_of(plan: RunPlan, sections: tuple[str, ...]) -> list[Unit]:
    """The units of these sections, most valuable first."""
    units = [*layer_units(plan), *memory_units(plan), *step_units(plan), *task_units(plan), *tune_units(plan)]
    units = [unit for unit in units if unit.section in sections]
    ceilings = [Unit(0, "ceilings", "copy and products", 5.0, lambda bench: ceiling_rows(plan))]
    units += ceilings + check_units(plan, sections)
    return sorted(units, key=lambda unit: (unit.tier, _ORDER.index(unit.section)))


def check_units(plan: RunPlan, sections: tuple[str, ...]) -> list[Unit]:
    """One unit for each implementation and precision, before the first that times either."""
    tiers: dict[tuple[str, str], int] = {}

    def need(names: tuple[str, ...], entries: list[tuple[int, str]]) -> None:
        for tier, precision in entries:
            for name in (_FALLBACK, *names):
                key = name, precision
                tiers[key] = min(tier, tiers.get(key, tier))

    linear = tuple(name for name in CHECKED if name not in (MLP, MULTI, NORM))
    if "layers" in sections:
        need(linear, [(tier, name) for tier, _, _, name in plan.layers])
    if "host" in sections:
        need(linear[:2], [(min(entry[0] for entry in plan.layers), plan.main)])
    if "memory" in sections:
        need(linear, [(tier, name) for tier, _, _, name in plan.memory])
        need(CHECKED, [(tier, name) for tier, *_, name in plan.blocks])
    if "steps" in sections:
        need(CHECKED, [(tier, name) for tier, _, _, name, _ in plan.models])
    if "tasks" in sections:
        need((MULTI,), [(tier, name) for tier, _, name in plan.batches])
    if "tune" in sections:
        need((), [(tier, name) for tier, _, name in plan.tuned])
    return [
        Unit(tier, "correctness", f"{name}, {precision}", 5.0, partial(_run_check, name, PRECISIONS[precision]))
        for (name, precision), tier in sorted(tiers.items(), key=lambda item: item[1])
    ]


_FALLBACK = "shipped tiles"


def _run_check(name: str, precision: Precision, bench: Bench) -> list[Row]:
    if name == _FALLBACK:
        return fallback_rows(bench.plan, bench.checks, precision)
    bench.checks.check(name, precision)
    return []  # the bench adds the rows of its checks


def default_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
