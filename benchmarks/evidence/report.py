"""The report of ``python -m benchmarks.evidence``: a table, its rows as JSON, a picture with a dot for every seed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from benchmarks.evidence.runs import ARMS, Evidence
from benchmarks.support.common import markdown_table
from rlrr_kernels.train.grid.runs import Spread
from rlrr_kernels.writing import write_together

NAME = "evidence"

SCORES = ("val_accuracy", "test_accuracy", "test_macro_f1")
_COLUMNS = ["method", "lr", "trained parameters", "seeds", "val. accuracy", "test accuracy", "test macro-F1", "time"]


def write_report(evidence: Evidence, folder: Path) -> str:
    """Writes ``evidence.md``, ``.json`` and ``.png`` to ``folder``; returns the table."""
    rows = rows_of(evidence)
    text = markdown(evidence, rows)
    files = {f"{NAME}.json": json.dumps(rows, indent=1).encode(), f"{NAME}.md": text.encode()}
    if rows:
        files[f"{NAME}.png"] = picture(rows)
    write_together(folder, files)
    return text


def rows_of(evidence: Evidence) -> list[dict[str, Any]]:
    """One row a finished run, with what it ran on."""
    return [row for cell in evidence.cells() for row in evidence.rows(*cell)]


def markdown(evidence: Evidence, rows: list[dict[str, Any]]) -> str:
    """One table a dataset, a line a method, mean ± standard deviation over the seeds; and what was not run."""
    lines, missing = [], []
    if evidence.limit is not None:
        lines += [f"**A trial on about {evidence.limit} images a split: the scores mean nothing.**", ""]
    for dataset in evidence.datasets:
        table = []
        for _, method in (cell for cell in evidence.cells() if cell[0] == dataset):
            runs = [row for row in rows if (row["dataset"], row["method"]) == (dataset, method)]
            if left := len(evidence.seeds) - len(runs):
                missing.append(f"{ARMS[method].title} on {dataset} ({left} of {len(evidence.seeds)} seeds)")
            if runs:
                spreads = [_cell(Spread.of(row[name] for row in runs)) for name in SCORES]
                seconds = f"{Spread.of(row['seconds'] for row in runs).mean:.0f} s"
                head = ARMS[method].title, _rate(evidence, method, runs[0]), f"{runs[0]['trained_parameters']:,}"
                table.append([*head, len(runs), *spreads, seconds])
        if table:
            count = next(row["test_images"] for row in rows if row["dataset"] == dataset)
            lines += [f"## {dataset}, {count} test images", "", *markdown_table(_COLUMNS, table)]
    if rows:
        ran_on = sorted({(row["cpu"], row["device"], row["torch"], row["precision"]) for row in rows})
        where = "; ".join(f"{cpu}, {device}, torch {torch}, {precision}" for cpu, device, torch, precision in ran_on)
        commits = sorted({str(row["commit"])[:7] for row in rows})
        lines += [
            f"DINOv2 ViT-S/14 at {rows[0]['image_size']} px, epochs: {rows[0]['epochs']}; mean ± standard deviation "
            "over the seeds. The epoch, and on the first seed the learning rate, were chosen on validation images. The "
            f"time is of one run, on a machine that had other work too. {where}; commit {', '.join(commits)}.",
            "",
        ]
    lines += ["Not run: " + ("; ".join(missing) if missing else "nothing") + "."]
    return "\n".join(lines) + "\n"


def _rate(evidence: Evidence, method: str, row: dict[str, Any]) -> str:
    """The rate and what it was chosen from: a reader sees where it lies at an end."""
    chooser = evidence.chooser(method)
    if chooser != method:
        return f"{row['lr']:g}, as {chooser}"
    return f"{row['lr']:g} of {', '.join(f'{lr:g}' for lr in row['lr_candidates'])}"


def _cell(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def picture(rows: list[dict[str, Any]]) -> bytes:
    """PNG: test accuracy, a dot a seed and a bar at the mean, one panel a dataset."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    methods = [method for method in ARMS if any(row["method"] == method for row in rows)]
    figure = Figure(figsize=(1.5 + 4.5 * len(datasets), 1.2 + 0.36 * len(methods)), layout="constrained")
    for axes, dataset in zip(figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0], datasets, strict=True):
        for place, method in enumerate(methods):
            values = [r["test_accuracy"] for r in rows if (r["dataset"], r["method"]) == (dataset, method)]
            colour = "tab:red" if method.startswith("rlrr") else "tab:blue"
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=6)
            if values:
                axes.plot(Spread.of(values).mean, place, "|", color=colour, markersize=18, markeredgewidth=2)
        axes.set(xlabel="test accuracy", title=dataset)
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(methods)), [ARMS[method].title for method in methods])
    axes.invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
