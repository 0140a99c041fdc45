"""The report of ``benchmarks.evidence.runs``: a table, its rows as JSON, and a picture with a dot for every seed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrr_kernels.adapt.files import write_together
from rlrr_kernels.train.finetune import ENVIRONMENT
from rlrr_kernels.train.grid.runs import METRICS, Spread

if TYPE_CHECKING:
    from benchmarks.evidence.runs import Evidence

NAME = "evidence"

_COLUMNS = ("method", "lr", "trained parameters", "seeds", "val. accuracy", "test accuracy", "test macro-F1", "time")


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
    rows = []
    for dataset, method in evidence.cells():
        lr, results, _ = evidence.finished(dataset, method)
        for result in results:
            session = json.loads((result["folder"] / ENVIRONMENT).read_bytes())["sessions"][-1]
            rows.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "seed": result["settings"]["train.seed"],
                    "lr": lr,
                    "lr_candidates": list(evidence.rates(method)[1]),
                    "epochs": result["settings"]["train.epochs"],
                    "epoch": result["epoch"],
                    "epoch_chosen_on": result["epoch_chosen_on"],
                    "image_size": result["task"]["preprocessing"]["image_size"],
                    "trial": evidence.limit is not None,
                    **{name: result[part][key] for name, (part, key) in METRICS.items()},
                    "test_images": result["test"]["count"],
                    "trained_parameters": result["trained_parameters"],
                    "adapter_parameters": result["adapter_parameters"],
                    "seconds": result["seconds"],
                    "peak_memory_bytes": result["peak_memory_bytes"],
                    "precision": result["precision"],
                    "cpu": session["processor"],
                    "device": session["device"],
                    "threads": session["threads"],
                    "torch": session["versions"]["torch"],
                    "commit": session["commit"],
                }
            )
    return rows


def markdown(evidence: Evidence, rows: list[dict[str, Any]]) -> str:
    """One table a dataset, a line a method, mean ± standard deviation over the seeds; and what was not run."""
    from benchmarks.evidence.runs import ARMS

    lines, missing = [], []
    if evidence.limit is not None:
        lines += [f"**A trial on about {evidence.limit} images a split: the scores mean nothing.**", ""]
    for dataset in evidence.datasets:
        here = [row for row in rows if row["dataset"] == dataset]
        if here:
            lines += [f"## {dataset}, {here[0]['test_images']} test images", ""]
            lines += [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        for _, method in (cell for cell in evidence.cells() if cell[0] == dataset):
            runs = [row for row in here if row["method"] == method]
            left = len(evidence.seeds) - len(runs)
            if left:
                missing.append(f"{ARMS[method].title} on {dataset} ({left} of {len(evidence.seeds)} seeds)")
            if not runs:
                continue
            spreads = [
                Spread.of(row[name] for row in runs) for name in ("val_accuracy", "test_accuracy", "test_macro_f1")
            ]
            seconds = Spread.of(row["seconds"] for row in runs).mean
            cells = (
                ARMS[method].title,
                _rate(evidence, method, runs[0]),
                f"{runs[0]['trained_parameters']:,}",
                str(len(runs)),
            )
            lines.append(f"| {' | '.join([*cells, *map(_cell, spreads), f'{seconds:.0f} s'])} |")
        lines += [""] if here else []
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
    chooser, _ = evidence.rates(method)
    if chooser != method:
        return f"{row['lr']:g}, as {chooser}"
    return f"{row['lr']:g} of {', '.join(f'{lr:g}' for lr in row['lr_candidates'])}"


def _cell(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def picture(rows: list[dict[str, Any]]) -> bytes:
    """PNG: test accuracy, a dot a seed and a bar at the mean, one panel a dataset."""
    from matplotlib.figure import Figure

    from benchmarks.evidence.runs import ARMS

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
