"""The paper's table from the results of a reproduction: ours, the reported number, the difference."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlrr_kernels.paper.hyperparameters import DATASETS, GROUPS, dataset_names
from rlrr_kernels.paper.reported import PEERS, Reported, reported_for
from rlrr_kernels.paper.results import Protocol, TaskResults
from rlrr_kernels.train.methods.baselines import TITLES
from rlrr_kernels.writing import write_together

MARKDOWN, CSV, PICTURE = "report.md", "report.csv", "report.png"

_COLUMNS = ("group", "dataset", "accuracy", "standard deviation", "seeds", "reported", "difference", "note")
_PROTOCOL_COLUMNS = ("method", "model", "split", "epoch_chosen_on", "epochs", "paper_epochs")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table; accuracies in percent.

    Attributes:
        group: of the dataset; empty for the means over all.
        title: of the dataset, or what the mean is over.
        accuracy: mean over the seeds; None where there is no finished run.
        spread: standard deviation over the seeds; None with fewer than two.
        seeds: finished ones.
        reported: in the paper; None where it has no such number, or ours is of a part of the tasks only.
        note: what else to know.
        is_mean: over datasets.
    """

    group: str
    title: str
    accuracy: float | None
    spread: float | None
    seeds: int
    reported: float | None
    note: str
    is_mean: bool = False

    @property
    def difference(self) -> float | None:
        """Ours minus the reported; None where one of them is not there."""
        return None if self.accuracy is None or self.reported is None else self.accuracy - self.reported


@dataclasses.dataclass(frozen=True)
class Report:
    """The table: ``rows`` of the datasets in the paper's order, then the means."""

    protocol: Protocol
    reported: Reported | None
    rows: tuple[Row, ...]


def build_report(results: Mapping[str, TaskResults], compare: str | None = None) -> Report:
    """The table of ``results``; tasks without one are missing in it, and means without them are partial.

    Args:
        results: of one protocol by dataset, see :func:`rlrr_kernels.paper.results.read_results`.
        compare: the model of the paper to compare with; None: the one of the same backbone, if there is one.

    Raises:
        ValueError: unknown ``compare``.
    """
    protocol = next(iter(results.values())).protocol
    reported = reported_for(protocol.benchmark, protocol.model, compare)
    names = dataset_names(protocol.benchmark)
    rows = [_dataset_row(name, results.get(name), reported) for name in names]
    scores = {name: _scores(results[name]) for name in names if name in results and results[name].runs}
    if protocol.benchmark == "vtab":
        for group in GROUPS:
            members = [name for name in names if DATASETS[name].group == group]
            rows.append(_mean_row(group, f"mean of {group}", members, scores, _reported_mean(reported, group, members)))
        rows.append(_mean_row("", "mean over tasks", names, scores, reported and reported.over_tasks))
        rows.append(_over_groups(names, scores, reported and reported.over_groups))
    else:
        rows.append(_mean_row("", "mean over tasks", names, scores, reported and reported.over_tasks))
    return Report(protocol, reported, tuple(rows))


def _scores(results: TaskResults) -> dict[int, float]:
    """Seed → test accuracy in percent."""
    return {run.seed: 100 * run.test_accuracy for run in results.runs}


def _dataset_row(name: str, results: TaskResults | None, reported: Reported | None) -> Row:
    settings = DATASETS[name]
    theirs = reported.tasks.get(name) if reported else None
    if results is None or not results.runs:
        return Row(settings.group, settings.title, None, None, 0, theirs, "missing")
    values = list(_scores(results).values())
    notes = [results.note] if results.note else []
    if len(values) < len(results.seeds):
        notes.append(f"{len(values)} of {len(results.seeds)} seeds")
    return Row(
        settings.group, settings.title, statistics.mean(values), _spread(values), len(values), theirs, "; ".join(notes)
    )


def _mean_row(
    group: str, title: str, names: Sequence[str], scores: Mapping[str, Mapping[int, float]], reported: float | None
) -> Row:
    """The mean over the datasets ``names`` of their means over the seeds; the spread is that of the seeds' means."""
    present = [name for name in names if name in scores]
    if not present:
        return Row(group, title, None, None, 0, reported, "missing", is_mean=True)
    complete = len(present) == len(names)
    seeds = _common_seeds([scores[name] for name in present])
    return Row(
        group,
        title,
        statistics.mean(statistics.mean(scores[name].values()) for name in present),
        _spread([statistics.mean(scores[name][seed] for name in present) for seed in seeds]),
        len(seeds),
        reported if complete else None,
        "" if complete else f"partial: {len(present)} of {len(names)} datasets",
        is_mean=True,
    )


def _reported_mean(reported: Reported | None, group: str, names: Sequence[str]) -> float | None:
    """The printed mean of a group, or that of its printed tasks."""
    if reported is None:
        return None
    if group in reported.groups:
        return reported.groups[group]
    return statistics.mean(reported.tasks[name] for name in names) if reported.tasks.keys() >= set(names) else None


def _over_groups(names: Sequence[str], scores: Mapping[str, Mapping[int, float]], reported: float | None) -> Row:
    """The mean of the three group means; like the paper's 76.7, of these as printed, with one decimal."""
    groups = [
        _mean_row(group, group, [name for name in names if DATASETS[name].group == group], scores, None)
        for group in GROUPS
    ]
    title = "mean over groups"
    present = [row.accuracy for row in groups if row.accuracy is not None]
    if not present:
        return Row("", title, None, None, 0, reported, "missing", is_mean=True)
    partial = any(row.note for row in groups)
    notes = [f"partial: {sum(name in scores for name in names)} of {len(names)} datasets"] if partial else []
    notes.append(f"{statistics.mean(present):.2f} without that rounding")
    return Row(
        "",
        title,
        statistics.mean(round(accuracy, 1) for accuracy in present),
        None,
        min(row.seeds for row in groups if row.accuracy is not None),
        None if partial else reported,
        "; ".join(notes),
        is_mean=True,
    )


def _common_seeds(scores: Sequence[Mapping[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(values) for values in scores)))


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def headline(report: Report) -> list[str]:
    """What must be said of the whole table."""
    protocol = report.protocol
    lines = [
        f"{TITLES[protocol.method]} on {protocol.benchmark.upper()} with {protocol.model}, weights {protocol.weights}, "
        f"{protocol.image_size} px, {protocol.epochs} epochs, learning rate "
        + ("as the authors' code has it" if protocol.schedule == "ran" else "as the paper has it")
        + (", mixup, cutmix, smoothing and averaged weights" if protocol.augmented else "")
    ]
    if protocol.epoch_chosen_on == "test":
        lines.append(
            f"Split '{protocol.split}': trained on the training and validation images, and the best epoch on the test "
            "images reported, as the authors did: an optimistic score."
        )
    else:
        lines.append(
            f"Split '{protocol.split}': the epoch is chosen on the validation images, the test images are scored once. "
            "The paper's numbers are of the best epoch on the test images and of more training images."
        )
    if protocol.epochs != protocol.paper_epochs:
        lines.append(f"TRIAL: {protocol.epochs} epochs in place of the paper's {protocol.paper_epochs}.")
    if report.reported is None:
        lines.append("The paper reports nothing for this backbone; choose a row of it with --compare.")
    else:
        lines.append(f"Reported: RLRR, {report.reported.model} (Dong et al., CVPR 2024). Accuracies in percent.")
    lines.append("± is the standard deviation over the seeds; of a mean, that of the seeds' means.")
    if protocol.benchmark == "vtab":
        lines.append(
            "The paper's mean (74.5 for ViT-B/16) is over the 19 tasks; the often quoted 76.7 is over the three "
            "groups, of group means with one decimal."
        )
    return lines


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    model = report.reported.model if report.reported else "-"
    lines = ["# Reproduction of the paper's table", ""]
    lines += [line + "\n" for line in headline(report)]
    lines += [
        f"| group | dataset | ours | seeds | reported, {model} | difference | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        cells = (row.group, row.title, accuracy_text(row), str(row.seeds), number(row.reported), signed(row.difference))
        cells = [f"**{cell}**" if row.is_mean and cell else cell for cell in cells]
        lines.append("| " + " | ".join((*cells, row.note)) + " |")
    if report.protocol.benchmark == "vtab":
        peers = ", ".join(f"{name} {value}" for name, value in PEERS)
        lines += ["", f"Others on VTAB-1k with a ViT-B/16, as the paper reports them, means over tasks: {peers}."]
    return "\n".join(lines) + "\n"


def to_csv(report: Report) -> str:
    """The report as CSV, numbers not rounded; every line carries how the runs were made."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow((*_COLUMNS, *(name.replace("_", " ") for name in _PROTOCOL_COLUMNS)))
    protocol = [getattr(report.protocol, name) for name in _PROTOCOL_COLUMNS]
    for row in report.rows:
        numbers = (row.accuracy, row.spread, row.seeds, row.reported, row.difference)
        texts = ["" if value is None else f"{value:.6g}" for value in numbers]
        writer.writerow((row.group, row.title, *texts, row.note, *protocol))
    return buffer.getvalue()


def accuracy_text(row: Row) -> str:
    """Ours, with its spread."""
    if row.accuracy is None:
        return "missing"
    return f"{row.accuracy:.1f}" + ("" if row.spread is None else f" ± {row.spread:.1f}")


def number(value: float | None) -> str:
    """One decimal, as the paper prints it; a dash for None."""
    return "-" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """One decimal and a sign; a dash for None."""
    return "-" if value is None else f"{value:+.1f}"


def to_png(report: Report) -> bytes:
    """The report as a picture: ours with its spread, and the reported number, of every line."""
    from matplotlib.figure import Figure

    rows = report.rows[::-1]
    figure = Figure(figsize=(7.5, 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row.accuracy is not None and row.reported is not None:
            axes.plot([row.accuracy, row.reported], [y, y], color="tab:gray", linewidth=1, zorder=1)
    ours = [(row.accuracy, y, row.spread or 0.0) for y, row in enumerate(rows) if row.accuracy is not None]
    theirs = [(row.reported, y) for y, row in enumerate(rows) if row.reported is not None]
    if ours:
        x, y, spread = zip(*ours, strict=True)
        axes.errorbar(x, y, xerr=spread, fmt="o", color="tab:blue", capsize=2, label="ours")
    if theirs:
        label = f"reported, {report.reported.model}"
        axes.plot(*zip(*theirs, strict=True), "D", color="tab:orange", markersize=5, label=label)
    titles = [
        row.title + (" (missing)" if row.accuracy is None else " (partial)" if "partial" in row.note else "")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), titles, fontsize="small")
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row.is_mean else "normal")
    protocol = report.protocol
    trial = f"; trial of {protocol.epochs} epochs" if protocol.epochs != protocol.paper_epochs else ""
    axes.set(xlabel="test accuracy, %", ylim=(-0.7, len(rows) - 0.3))
    figure.suptitle(
        f"{protocol.model}\nsplit '{protocol.split}', epoch chosen on {protocol.epoch_chosen_on} images{trial}",
        fontsize="medium",
    )
    axes.grid(axis="x", alpha=0.3)
    if ours or theirs:
        axes.legend(fontsize="small", loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Writes ``report.md``, ``report.csv`` and ``report.png`` to ``folder``.

    Raises:
        OSError: they cannot be written.
    """
    folder = Path(folder)
    contents = {MARKDOWN: to_markdown(report).encode(), CSV: to_csv(report).encode(), PICTURE: to_png(report)}
    write_together(folder, contents)
    return [folder / name for name in contents]
