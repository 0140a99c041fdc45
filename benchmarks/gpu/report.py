"""The files: one JSON with every row, valid after each write; one Markdown; three pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table, number
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.targets import layer_groups, measured, merge_crossovers, time_of, verdicts
from benchmarks.gpu.work import Row

JSON, MARKDOWN = "gpu.json", "gpu.md"
TILES = "tiles.json"
"""The tuner's winners, as :mod:`rlrr_kernels.ops.tuning.store` reads them."""
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
    """The lines to write into ``PROVEN`` of ``rlrr_kernels/ops/linear/tiles.py``; none where nothing was faster."""
    proven = dict.fromkeys(row["proven_row"] for row in measured(rows, "tune") if "proven_row" in row)
    if not proven:
        return []
    heading = "## Schedules that were right and faster here: lines for PROVEN in rlrr_kernels/ops/linear/tiles.py"
    return [heading, "", *(f"    {line}," for line in proven), ""]


def markdown(rows: list[Row], plan: Plan, environment: Row) -> str:
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


def pictures(rows: list[Row], plan: Plan, folder: Path) -> None:
    """Layers against the floor over M, kept and peak memory, and training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    note = " (CPU, meaningless)" if plan.tiny else ""
    colours: dict[str, Any] = {}  # the same implementation in both panels
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    for axis, (work, title) in zip(axes, (("forward", "forward"), ("step", "forward + backward")), strict=True):
        points: dict[str, dict[int, list[float]]] = {}
        for head, group in layer_groups(rows):
            if head["precision"] == plan.main and head["work"] == work and "floor" in group:
                for name, row in group.items():
                    ratio = time_of(row) / time_of(group["floor"])
                    points.setdefault(name, {}).setdefault(head["M"], []).append(ratio)
        for name, by_rows in points.items():
            counts = sorted(by_rows)
            colour = colours.setdefault(name, plt.get_cmap("tab20")(len(colours) % 20))
            axis.plot(counts, [max(by_rows[m]) for m in counts], marker="o", markersize=3, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=f"{title}, {plan.main}{note}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over bare matrix products, worst shape")
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    axes[1].legend(handles=lines, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, folder / PICTURES[0])

    memory = measured(rows, "memory")
    figure, axis = plt.subplots(figsize=(8, max(3, 0.2 * len(memory))))
    labels = [f"{r['implementation']}: {r['shape']}, {r['precision']}" for r in memory]
    axis.barh(labels, [r["peak_bytes"] / 1e6 for r in memory], label="peak of a step")
    axis.barh(labels, [r["kept_bytes"] / 1e6 for r in memory], label="kept between forward and backward")
    axis.set(xlabel="MB beyond arguments", title=f"one layer or block{note}")
    axis.tick_params(axis="y", labelsize=5)
    axis.legend(fontsize=7)
    _save(figure, folder / PICTURES[1])

    steps = measured(rows, "steps")
    figure, axis = plt.subplots(figsize=(8, max(3, 0.2 * len(steps))))
    labels = [f"{r['implementation']}: {r['model']}, batch {r['batch']}, {r['precision']}, {r['mode']}" for r in steps]
    axis.barh(labels, [r["images_per_s"] for r in steps])
    axis.set(xlabel="images a second", title=f"training steps{note}")
    axis.tick_params(axis="y", labelsize=5)
    _save(figure, folder / PICTURES[2])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def write_report(rows: list[Row], plan: Plan, environment: Row, folder: Path, with_pictures: bool = True) -> None:
    """Markdown and pictures of the rows so far. Without matplotlib there are no pictures."""
    (folder / MARKDOWN).write_text(markdown(rows, plan, environment), encoding="utf-8")
    if with_pictures:
        try:
            pictures(rows, plan, folder)
        except ImportError as error:
            print(f"no pictures: {error}", flush=True)
