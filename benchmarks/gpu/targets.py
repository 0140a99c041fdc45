"""The targets, evaluated from the rows: reached, not reached with the number, or not measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.plan import RunPlan
from benchmarks.gpu.work import Row

FEW_M = 64
WIDE_WEIGHT_BYTES = 64e6

Case = tuple[float, float, str]
"""A measured value, its bound, and where it was measured."""


class Verdict(NamedTuple):
    """One target. ``value`` and ``bound`` are of the worst of ``count`` cases; None where no row speaks of it."""

    target: str
    value: float | None = None
    bound: float | None = None
    where: str = ""
    count: int = 0
    reached: bool | None = None

    @property
    def text(self) -> str:
        """The verdict in words."""
        return {None: "not measured", True: "reached", False: "not reached"}[self.reached]


def at_most(target: str, cases: list[Case], sign: int = 1) -> Verdict:
    """Reached when no value is over its bound."""
    if not cases:
        return Verdict(target)
    value, bound, where = max(cases, key=lambda case: sign * (case[0] - case[1]))
    return Verdict(target, value, bound, where, len(cases), sign * (value - bound) <= 0)


def at_least(target: str, cases: list[Case]) -> Verdict:
    """Reached when no value is under its bound."""
    return at_most(target, cases, -1)


def time_of(row: Row) -> float | None:
    """Kernel time where there is one, else wall time; None for a skipped row."""
    return row.get("graph_us") or row.get("wall_us")


def measured(rows: list[Row], section: str) -> list[Row]:
    """The rows of a section that hold a measurement: not those of what was skipped or failed."""
    return [row for row in rows if row["section"] == section and "skipped" not in row and "error" not in row]


def _groups(rows: list[Row], section: str, keys: tuple[str, ...]) -> list[tuple[Row, dict[str, Row]]]:
    """Rows that were measured together: (one of them, name → row)."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in measured(rows, section):
        groups.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = row
    return [(next(iter(group.values())), group) for group in groups.values()]


def layer_groups(rows: list[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """Layer rows that were interleaved with one another."""
    return _groups(rows, "layers", ("shape", "M", "precision", "work", "compile_mode", "tiles"))


def _layer_cases(rows, plan: RunPlan, work: str, ours: str, baseline: str, few: bool | None) -> Iterator[tuple]:
    """(our time, the baseline's, rows by name, where) of layers in the main precision, with tuned tiles if any."""
    groups = layer_groups(rows)
    keys = ("shape", "M", "precision", "work", "compile_mode")
    tuned = {tuple(head[key] for key in keys) for head, _ in groups if head["tiles"] == "tuned"}
    for head, group in groups:
        if head["precision"] != plan.main or head["work"] != work or head.get("rank", 1) > 1:  # these have no targets
            continue
        if head["tiles"] == "shipped" and tuple(head[key] for key in keys) in tuned:
            continue
        if few is not None and not (head["M"] <= FEW_M if few else head["M"] >= plan.many_m):
            continue
        if ours in group and baseline in group:
            where = f"{head['shape']}, M = {head['M']}" + (", tuned" if head["tiles"] == "tuned" else "")
            yield time_of(group[ours]), time_of(group[baseline]), group, where


def layer_verdicts(rows: list[Row], plan: RunPlan) -> list[Verdict]:
    """The targets for one layer."""
    many, few = f"M ≥ {plan.many_m}", f"M ≤ {FEW_M}"

    def ratios(work, baseline, bound, is_few, inverse=False) -> list[Case]:
        cases = _layer_cases(rows, plan, work, "triton" if work == "scales" else "auto", baseline, is_few)
        return [((b / a) if inverse else (a / b), bound, where) for a, b, _, where in cases]

    copy = next((row["TB_per_s"] for row in measured(rows, "ceilings") if row["what"] == "copy"), None)
    bandwidths = []
    for ours, _, group, where in _layer_cases(rows, plan, "forward", "auto", "auto", True):
        m, n, k = (group["auto"][key] for key in "MNK")
        size = 2 if plan.main == "bf16" else 4
        if copy and size * n * k >= WIDE_WEIGHT_BYTES:
            bandwidths.append((size * (n * k + m * n + m * k) / (ours * 1e-6) / (copy * 1e12), 0.8, where))
    speedups = []
    for ours, floor, group, where in _layer_cases(rows, plan, "step", "auto", "floor", False):
        if "reference" in group:
            eager = time_of(group["reference"])
            speedups.append((eager / ours, min(1.5, 0.95 * eager / floor), where))
    compiled = []
    for mode in ("default", "max-autotune"):
        cases = _layer_cases(rows, plan, "step", "auto", f"compiled ({mode})", False)
        compiled += [(ours / theirs, 1.0, f"{where}, {mode}") for ours, theirs, _, where in cases]
    return [
        at_most(f"forward, {many}: time over the merged Linear's ≤ 1.05", ratios("forward", "merged", 1.05, False)),
        at_most(f"forward, {few}: time over the merged Linear's ≤ 1.15", ratios("forward", "merged", 1.15, True)),
        at_least(f"forward, {few}: speed over eager ≥ 3", ratios("forward", "reference", 3.0, True, inverse=True)),
        at_least(f"forward, {few}, W ≥ 64 MB: share of measured bandwidth ≥ 0.8", bandwidths),
        at_most(f"forward + backward, {many}: time over the floor's ≤ 1.10", ratios("step", "floor", 1.10, False)),
        at_least(f"forward + backward, {many}: speed over eager ≥ min(1.5, 0.95 eager / floor)", speedups),
        at_most(f"forward + backward, {many}: time over the compiled formula's ≤ 1", compiled),
        at_most("scale and bias gradients alone: time over gᵀx ≤ 1.05", ratios("scales", "floor", 1.05, None)),
    ]


def other_verdicts(rows: list[Row]) -> list[Verdict]:
    """The targets for kept memory and host time."""
    kept = [
        (max(row["kept_bytes"], row["alive_bytes"] or 0), 0, f"{row['shape']}, M = {row['M']}, {row['precision']}")
        for row in measured(rows, "memory")
        if row["implementation"] == "auto"
    ]
    verdicts = [at_most("kept beyond x and parameters: 0 bytes a layer", kept)]
    for work, limit in (("forward", 15.0), ("step", 30.0)):
        host = [
            (row["over_linear_us"], limit, "one row of x")
            for row in measured(rows, "host")
            if row["work"] == work and row["implementation"] == "auto"
        ]
        name = "forward" if work == "forward" else "forward + backward"
        verdicts.append(at_most(f"host time over F.linear, {name} ≤ {limit:.0f} µs", host))
    return verdicts


def task_verdicts(rows: list[Row]) -> list[Verdict]:
    """The target for many adapters in one batch."""
    cases = []
    for head, group in _groups(rows, "tasks", TASK_KEYS):
        if head["work"] == "forward" and head["rows_a_sample"] > 1 and {"auto", "merged"} <= set(group):
            where = f"{head['shape']}, {head['samples']} x {head['rows_a_sample']} rows, {head['tasks']} tasks"
            cases.append((time_of(group["auto"]) / time_of(group["merged"]), 1.5, where))
    return [at_most("many adapters in one batch, forward: time over one merged Linear's ≤ 1.5", cases)]


TASK_KEYS = ("shape", "samples", "rows_a_sample", "tasks", "precision", "work")
"""What rows of the section ``tasks`` that were measured together have in common."""


def step_verdicts(rows: list[Row], plan: RunPlan) -> list[Verdict]:
    """The targets for training steps, by model."""
    groups = _groups(rows, "steps", ("model", "batch", "precision", "mode"))
    verdicts = []
    for model in dict.fromkeys(entry[1] for entry in plan.models):
        here = [(head, group) for head, group in groups if head["model"] == model]

        def ratios(baseline, bound, mode="eager", batch=None, key="ms", inverse=False, here=here) -> list[Case]:
            found = []
            for head, group in here:
                if head["mode"] == mode and batch in (None, head["batch"]) and {"auto", baseline} <= set(group):
                    ratio = group["auto"][key] / group[baseline][key]
                    where = f"batch {head['batch']}, {head['precision']}, {mode}"
                    found.append((1 / ratio if inverse else ratio, bound, where))
            return found

        for batch, least in ((8, 1.4), (64, 1.15)):
            eager = ratios("reference", least, batch=batch, inverse=True)
            verdicts.append(at_least(f"{model}, batch {batch}: speed over eager ≥ {least}", eager))
        compiled = ratios("reference", 1.0, "compile") + _graph_against_compiled(here)
        peaks = [] if plan.tiny else ratios("lora", 1.0, key="peak_bytes")
        verdicts += [
            at_most(f"{model}, compiled or graph: time over the compiled reference's ≤ 1", compiled),
            at_least(f"{model}: speed over PEFT HiRA (r = 1) ≥ 1.4", ratios("hira", 1.4, inverse=True)),
            at_most(f"{model}: time over PEFT LoRA's (r = 8) ≤ 1.2", ratios("lora", 1.2)),
            at_most(f"{model}: peak memory over LoRA's ≤ 1", peaks),
        ]
    return verdicts


def _graph_against_compiled(groups: list[tuple[Row, dict[str, Row]]]) -> list[Case]:
    """Our step in a CUDA graph against the compiled reference, of the same batch and precision."""
    by_mode = {(h["mode"], h["batch"], h["precision"]): group for h, group in groups}
    result = []
    for (mode, batch, precision), group in by_mode.items():
        ours = by_mode.get(("graph", batch, precision), {}).get("auto")
        if mode == "compile" and "reference" in group and ours:
            result.append((ours["ms"] / group["reference"]["ms"], 1.0, f"batch {batch}, {precision}, graph"))
    return result


def verdicts(rows: list[Row], plan: RunPlan) -> list[Verdict]:
    """Every target."""
    return layer_verdicts(rows, plan) + other_verdicts(rows) + task_verdicts(rows) + step_verdicts(rows, plan)


def merge_crossovers(rows: list[Row]) -> list[tuple[str, str, str, int | None]]:
    """By shape, precision and work: the smallest measured M from which merging W' beats the fused kernel."""
    found: dict[tuple[str, str, str], dict[int, bool]] = {}
    for head, group in layer_groups(rows):
        if {"triton.merge", "triton.fused"} <= set(group):
            faster = time_of(group["triton.merge"]) <= time_of(group["triton.fused"])
            by_m = found.setdefault((head["shape"], head["precision"], head["work"]), {})
            by_m[head["M"]] = by_m.get(head["M"], True) and faster
    return [
        (*key, min((m for m in by_m if all(faster for n, faster in by_m.items() if n >= m)), default=None))
        for key, by_m in found.items()
    ]
