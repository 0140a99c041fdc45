"""Tables and picture of ``benchmarks/cpu/test_linear.py``.

    python -m benchmarks.cpu.report [RESULTS.json ...]

pytest-benchmark's JSON becomes compact rows, ``benchmarks/results/linear_cpu.csv``; without a file the earlier rows are
taken. From them come ``linear_cpu.md`` and ``linear_cpu.png`` beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
NAME = "linear_cpu"

Row = dict[str, Any]

BASELINES = {
    "reference": "eager formula",
    "compiled": "torch.compile",
    "torch": "our torch path",
    "floor": "3 products",
    "merged": "merged",
}
"""What the operator is compared with, and the headings; ``floor`` is one product in forward."""

TARGETS = {
    1: {"reference": 6, "compiled": 3, "torch": 1.3},
    16: {"reference": 3, "compiled": 1.8, "torch": 1.3},
    64: {"reference": 2, "compiled": 1.3, "torch": 1.3, "floor": 0.7},
    197: {"reference": 1.5, "compiled": 1.1, "torch": 1.2, "floor": 0.8},
    1576: {"reference": 1.05, "compiled": 1.0, "torch": 1.0, "floor": 0.9},
    6304: {"reference": 1.05, "compiled": 1.0, "torch": 1.0, "floor": 0.9},
}
"""By M: the least speedup over each baseline in forward + backward, worst shape."""

MERGED_TARGET = 0.8
"""The same for a merged layer in forward at M = 1: inference may take 1.25 times its time."""

TIMES = ("cpp", *BASELINES, "cold cpp", "cold reference")
BYTES = ("peak cpp", "peak reference", "kept cpp", "kept reference")
COLUMNS = ("cpu", "torch version", "commit", "dtype", "threads", "backward", "M", "K", "N", *TIMES, *BYTES)
"""Of a row: medians in microseconds by implementation, bytes, and None where nothing was measured."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of :func:`write_rows`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: json.loads(row[name] or "null") for name in COLUMNS[4:]} for row in rows]


def write_rows(rows: list[Row], path: Path) -> None:
    """CSV, one line a problem, times with seven digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            times = {name: format(row[name], ".7g") for name in TIMES if row.get(name) is not None}
            writer.writerow(row | {"backward": json.dumps(row["backward"])} | times)


def worst_speedup(rows: list[Row], baseline: str, cold: str = "") -> float | None:
    """The smallest time of ``baseline`` over ours among ``rows``; None where it was not measured."""
    found = [row[cold + baseline] / row[f"{cold}cpp"] for row in rows if row[cold + baseline] is not None]
    return min(found, default=None)


def grouped(rows: list[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by their values of ``keys``: backward before forward, float32 first, falling threads, rising M."""
    order = {"backward": lambda v: not v, "dtype": lambda v: v != "float32", "threads": lambda v: -v, "M": lambda v: v}
    groups: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: [order[key](row[key]) for key in keys]):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _table(headings: list[str], lines: list[list[object]]) -> list[str]:
    rule = "|" + "---|" * len(headings)
    return [f"| {' | '.join(headings)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)]


def _cell(value: float | None, pattern: str = ".2f") -> str:
    return "-" if value is None else format(value, pattern)


def targets(rows: list[Row]) -> list[str]:
    """A table of :data:`TARGETS`: what was measured in the worst shape, and the target where it was missed."""
    names = ["reference", "compiled", "torch", "floor"]
    lines = []
    for (dtype, threads, m), here in grouped([row for row in rows if row["backward"]], "dtype", "threads", "M").items():
        cells = []
        for name in names:
            speedup, least = worst_speedup(here, name), TARGETS[m].get(name)
            missed = least is not None and speedup is not None and round(speedup, 2) < least
            cells.append(_cell(speedup) + (f" (**target {least}**)" if missed else ""))
        kept = max((row["kept cpp"] for row in here if row["kept cpp"] is not None), default=None)
        cells += [_cell(worst_speedup(here, "reference", "cold ")), _cell(kept, "d")]
        lines.append([f"{dtype}, {threads}", m, *cells])
    headings = ["dtype, threads", "M", *(BASELINES[name] for name in names), "eager formula, cold", "kept bytes"]
    text = [
        "## Targets, forward + backward", "",
        "A cell with one number reached its target; a missed one names it. Cold: every call right after a baseline's,",
        "with W out of the nearest cache, as between the layers of a model; else after a call of its own.", "",
        *_table(headings, lines),
    ]  # fmt: skip
    single = [row for row in rows if not row["backward"] and row["M"] == 1]
    for (dtype, threads), here in grouped(single, "dtype", "threads").items():
        speedup = worst_speedup(here, "merged")
        verdict = "" if round(speedup, 2) >= MERGED_TARGET else f" (**target {1 / MERGED_TARGET:.2f}**)"
        time = f"{1 / speedup:.2f} times that of a merged layer{verdict}"
        text += ["", f"Inference at M = 1, {dtype}, {threads} thread(s): {time}."]
    return text


def markdown(rows: list[Row]) -> str:
    """One table for each pass, dtype and number of threads."""
    places = sorted({(row["cpu"], row["torch version"], row["commit"]) for row in rows})
    lines = ["# `rlrr_linear` in C++ against its baselines, CPU", ""]
    lines += [f"- {cpu}; torch {torch}; commit {commit}" for cpu, torch, commit in places]
    lines += [
        "",
        "Each cell: the baseline's time over ours, in the worst of the shapes (K → N) measured; medians of interleaved",
        "runs in one process, rank 1. Over 1 is faster than the baseline. Bytes: the largest shape.", "",
        *targets(rows),
    ]  # fmt: skip
    for (backward, dtype, threads), group in grouped(rows, "backward", "dtype", "threads").items():
        names = [name for name in BASELINES if any(row[name] is not None for row in group)]
        table = []
        for (m,), here in grouped(group, "M").items():
            times = [row["cpp"] for row in here]
            largest = max(here, key=lambda row: row["K"] * row["N"])
            peak, kept = ([largest[f"{what} {name}"] for name in ("cpp", "reference")] for what in ("peak", "kept"))
            table.append([
                m, *(_cell(worst_speedup(here, name)) for name in names), f"{min(times):.0f} to {max(times):.0f}",
                "-" if None in peak else ", ".join(f"{size / 1e6:.1f}" for size in peak),
                "-" if None in kept else ", ".join(map(str, kept)),
            ])  # fmt: skip
        lines += ["", f"## {'forward + backward' if backward else 'forward'}, {dtype}, {threads} thread(s)", ""]
        headings = [*(BASELINES[name] for name in names), "µs", "peak MB, eager's", "kept bytes, eager's"]
        lines += _table(["M", *headings], table)
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """Speed against the eager formula over M, one panel a dtype: geometric mean over the shapes, forward + backward."""
    from matplotlib.figure import Figure

    labels = {"cpp": "C++ operator", "torch": "plain torch path", "compiled": "torch.compile of the formula"}
    labels |= {"floor": "three bare matrix products"}
    most = max(row["threads"] for row in rows)
    panels = grouped([row for row in rows if row["backward"] and row["threads"] == most], "dtype")
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((dtype,), here) in zip(axes, panels.items(), strict=True):
        by_m = {m: group for (m,), group in grouped(here, "M").items()}
        for name, label in labels.items():
            means = [geometric_mean(row["reference"] / row[name] for row in group) for group in by_m.values()]
            axis.plot(list(by_m), means, marker="o", label=label, linestyle="--" if name == "floor" else "-")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=f"{dtype}, {most} threads")
        axis.set_xticks(list(by_m), [str(m) for m in by_m])
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times faster than the eager formula")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def write_report(results: list[Path], folder: Path) -> None:
    """Rows from pytest-benchmark's ``results`` if there are any; tables and picture from the rows in ``folder``."""
    path = folder / f"{NAME}.csv"
    if results:
        measured = [json.loads(file.read_text())["benchmarks"] for file in results]
        write_rows([entry["extra_info"] for entries in measured for entry in entries], path)
    rows = read_rows(path)
    path.with_suffix(".md").write_text(markdown(rows))
    picture(rows, path.with_suffix(".png"))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of pytest-benchmark")
    write_report(parser.parse_args().results, RESULTS)


if __name__ == "__main__":
    main()
