"""The files: one JSON with every row, valid after each write; one Markdown; three pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import RunPlan
from benchmarks.gpu.targets import TASK_KEYS, layer_groups, measured, merge_crossovers, time_of, verdicts
from benchmarks.gpu.work import Row
from benchmarks.support.common import markdown_table, number

JSON, MARKDOWN = "gpu.json", "gpu.md"
TILES = "tiles.json"
"""The tuner's winners, as :mod:`rlrr_kernels.ops.choice.store` reads them."""
PICTURES = ("gpu_layers.png", "gpu_memory.png", "gpu_steps.png")

NO_TIME = "no time left"
"""Why a unit was not started; the report counts such rows instead of listing them."""

_END = b"\n]}\n"
_NAMES = ("implementation", "backend", "kernel", "label")


class RowFile:
    """A JSON file that grows by rows and is complete and on the disk after each: a kill loses nothing."""

    def __init__(self, path: Path, environment: Row) -> None:
        self.environment = environment
        self._file = path.open("wb")
        self._size = self._file.write(b'{"rows": [')
        self._file.write(_END)
        self._file.flush()
        self._empty = True

    def write(self, rows: list[Row]) -> None:
        """Appends rows, each with the environment."""
        if not rows:
            return
        text = ",\n".join(json.dumps({**row, **self.environment}, default=str) for row in rows)
        text = (("\n" if self._empty else ",\n") + text).encode()
        self._file.seek(self._size)
        self._size += self._file.write(text)
        self._file.write(_END)
        self._file.flush()
        self._empty = False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a :class:`RowFile`."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def proven_lines(rows: list[Row]) -> list[str]:
    """The lines to write into ``PROVEN`` of ``rlrr_kernels/ops/choice/tiles.py``; none where nothing was faster."""
    proven = dict.fromkeys(row["proven_row"] for row in measured(rows, "tune") if "proven_row" in row)
    if not proven:
        return []
    heading = "## Schedules that were right and faster here: lines for PROVEN in rlrr_kernels/ops/choice/tiles.py"
    return [heading, "", *(f"    {line}," for line in proven), ""]


def markdown(rows: list[Row], plan: RunPlan, environment: Row) -> str:
    """Targets first, then every section's table, then what was skipped and why."""
    lines = ["# GPU benchmarks", "", "; ".join(f"{key} {value}" for key, value in environment.items()), ""]
    if environment["meaningless"]:
        lines += ["**Timings mean nothing: this is the command's test of itself on a CPU, on tiny shapes.**", ""]
    lines += [
        "Times are medians of interleaved runs. Kernel times are replays of a CUDA graph, µs a call; wall times are",
        "eager calls to the end of their work on the device. The model charges each launch the larger of bytes over",
        "the measured copy bandwidth and operations over the measured matrix rate with idle multiprocessors, and a",
        "fixed cost.", "",
        "## Targets", "",
    ]  # fmt: skip
    lines += markdown_table(
        ["target", "verdict", "worst", "bound there", "where", "cases"],
        [
            [v.target, v.text if not plan.tiny else f"meaningless ({v.text})", v.value, v.bound, v.where, v.count]
            for v in verdicts(rows, plan)
        ],
    )
    lines += ["## Ceilings measured here", ""]
    lines += markdown_table(
        ["what", "TB/s", "TFLOP/s"],
        [[r["what"], r.get("TB_per_s"), r.get("TFLOP_per_s")] for r in measured(rows, "ceilings")],
    )
    lines += _layer_tables(rows)
    lines += ["## Host time of one call, µs", ""]
    lines += markdown_table(
        ["work", "call", "host", "over F.linear"],
        [[r["work"], r["implementation"], r["host_us"], r["over_linear_us"]] for r in measured(rows, "host")],
    )
    lines += ["## Memory of one layer and one block, bytes", ""]
    keys = ["shape", "M", "precision", "implementation", "kept_bytes", "kept_with_x_bytes", "alive_bytes", "peak_bytes"]
    lines += markdown_table(keys, [[r[key] for key in keys] for r in measured(rows, "memory")])
    lines += ["## Training steps", ""]
    keys = ["model", "batch", "precision", "mode", "implementation", "ms", "images_per_s", "peak_bytes", "trained"]
    lines += markdown_table(keys, [[r[key] for key in keys] for r in measured(rows, "steps")])
    lines += ["## Many adapters in one batch", ""]
    keys = [*TASK_KEYS, "implementation", "graph_us", "wall_us"]
    lines += markdown_table(keys, [[r[key] for key in keys] for r in measured(rows, "tasks")])
    lines += ["## Tuned tiles: rows for the table of tiles", ""]
    lines += markdown_table(
        ["arch", "precision", "M x N x K", "row", "µs", "µs of those in use before"],
        [
            [
                r["arch"], r["precision"], ", ".join(" x ".join(map(str, sizes)) for sizes in r["problems"]),
                f"`{r['table_row']}`", r["us"], _used_us(rows, r),
            ]
            for r in measured(rows, "tune")
            if "table_row" in r
        ],
    )  # fmt: skip
    lines += proven_lines(rows)
    lines += ["## From which M merging W' is faster", ""]
    lines += markdown_table(["shape", "precision", "work", "M"], [list(entry) for entry in merge_crossovers(rows)])
    lines += ["## Not timed, and why", ""]
    reasons: dict[tuple, int] = {}
    for row in rows:
        reason = row.get("skipped") or row.get("error") or (row.get("reason") if not row.get("passed", True) else None)
        if reason:
            what = "" if reason == NO_TIME else next((row[k] for k in _NAMES if row.get(k)), "")
            key = row["section"], what, reason
            reasons[key] = reasons.get(key, 0) + 1
    lines += markdown_table(["section", "what", "why", "rows"], [[*key, count] for key, count in reasons.items()])
    return "\n".join(lines)


def _used_us(rows: list[Row], winner: Row) -> float | None:
    keys = ("arch", "precision", "kernel", "class", "schedule")
    same = (row for row in measured(rows, "tune") if row["used"] and all(row[k] == winner[k] for k in keys))
    return next((row["us"] for row in same), None)


def _layer_tables(rows: list[Row]) -> list[str]:
    """One table for each precision and work: kernel time / wall time, and the model of the floor and of our path."""
    lines: list[str] = []
    groups = layer_groups(rows)
    for precision, work in sorted({(head["precision"], head["work"]) for head, _ in groups}):
        here = [(h, g) for h, g in groups if (h["precision"], h["work"]) == (precision, work)]
        names = list(dict.fromkeys(name for _, group in here for name in group))
        lines += [f"## Layers, {precision}, {work}: kernel µs / wall µs", ""]
        table = []
        for head, group in here:
            ours = group.get("auto") or group.get("triton") or {}
            models = [group.get("floor", {}).get("model_us"), ours.get("model_us")]
            cells = [
                f"{number(group[n]['graph_us'])} / {number(group[n]['wall_us'])}" if n in group else "-" for n in names
            ]
            tiles = head["tiles"] + (f", {head['compile_mode']}" if head["compile_mode"] else "")
            table.append([head["shape"], head["M"], tiles, *cells, *models])
        lines += markdown_table(["shape", "M", "tiles", *names, "model: floor", "model: ours"], table)
    return lines


def pictures(rows: list[Row], plan: RunPlan, folder: Path) -> None:
    """Layers against the floor over M, kept and peak memory, and training steps."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    note = " (CPU, meaningless)" if plan.tiny else ""
    figure = Figure(figsize=(12, 4))
    axes = figure.subplots(1, 2)
    lines: dict[str, Any] = {}  # an implementation has the same colour in both panels
    for axis, (work, title) in zip(axes, (("forward", "forward"), ("step", "forward + backward")), strict=True):
        ratios: dict[str, dict[int, float]] = {}
        for head, group in layer_groups(rows):
            if head["precision"] == plan.main and head["work"] == work and "floor" in group:
                for name, row in group.items():
                    worst, ratio = ratios.setdefault(name, {}), time_of(row) / time_of(group["floor"])
                    worst[head["M"]] = max(ratio, worst.get(head["M"], ratio))
        for name, by_m in ratios.items():
            colour = lines[name].get_color() if name in lines else colormaps["tab20"](len(lines) % 20)
            (line,) = axis.plot(*zip(*sorted(by_m.items()), strict=True), marker="o", markersize=3, color=colour)
            lines.setdefault(name, line)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=f"{title}, {plan.main}{note}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over bare matrix products, worst shape")
    axes[1].legend(lines.values(), lines.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(folder / PICTURES[0], dpi=130, bbox_inches="tight")

    memory, steps = measured(rows, "memory"), measured(rows, "steps")
    bars = {
        "peak of a step": [row["peak_bytes"] / 1e6 for row in memory],
        "kept between forward and backward": [row["kept_bytes"] / 1e6 for row in memory],
    }
    names = [f"{row['implementation']}: {row['shape']}, {row['precision']}" for row in memory]
    _bars(folder / PICTURES[1], names, bars, "MB beyond arguments", f"one layer or block{note}")
    keys = ("model", "batch", "precision", "mode")
    names = [f"{row['implementation']}: {', '.join(str(row[key]) for key in keys)}" for row in steps]
    bars = {"training steps": [row["images_per_s"] for row in steps]}
    _bars(folder / PICTURES[2], names, bars, "images a second", f"training steps{note}")


def _bars(path: Path, names: list[str], bars: dict[str, list[float]], unit: str, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(3, 0.2 * len(names))))
    axis = figure.subplots()
    for label, values in bars.items():
        axis.barh(names, values, label=label)
    axis.set(xlabel=unit, title=title)
    axis.tick_params(axis="y", labelsize=5)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def write_report(rows: list[Row], plan: RunPlan, environment: Row, folder: Path, with_pictures: bool = True) -> None:
    """Markdown and pictures of the rows so far. Without matplotlib there are no pictures."""
    (folder / MARKDOWN).write_text(markdown(rows, plan, environment), encoding="utf-8")
    if with_pictures:
        try:
            pictures(rows, plan, folder)
        except ImportError as error:
            print(f"no pictures: {error}", flush=True)
