"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from rlrr_kernels.train.loop.record import FitResult
from rlrr_kernels.writing import write_together


def learning_curve(
    result: FitResult,
    path: str | Path,
    title: str,
    *,
    baseline: tuple[str, float] | None = None,
    chosen_on: str = "validation",
) -> Path:
    """Draws training and validation loss, and validation accuracy and macro-F1, over the epochs, as PNG.

    Args:
        result: of :func:`rlrr_kernels.train.loop.fit`.
        path: of the picture.
        title: above it.
        chosen_on: the images that the epoch was chosen on, in words.
        baseline: name and validation accuracy of something to compare with, drawn as a horizontal line.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    epochs = [entry["epoch"] for entry in result.history]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)

    left.plot(
        *zip(*result.loss_curve, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training, running"
    )
    left.plot(
        epochs, [entry["train_loss"] for entry in result.history], "o-", color="tab:blue", label="training, epoch"
    )
    left.plot(epochs, [entry["val_loss"] for entry in result.history], "s-", color="tab:orange", label=chosen_on)
    left.set(xlabel="epochs", ylabel="cross-entropy")

    for key, label, style in (("val_accuracy", "accuracy", "o-"), ("val_macro_f1", "macro-F1", "s--")):
        right.plot(epochs, [entry[key] for entry in result.history], style, label=label)
    if baseline is not None:
        right.axhline(baseline[1], color="tab:gray", linestyle=":", label=f"accuracy of the {baseline[0]}")
    right.plot(
        result.best_epoch, result.best.accuracy, "*", color="tab:red", markersize=14, label="chosen epoch", zorder=3
    )
    right.set(xlabel="epochs", ylabel=f"on the {chosen_on} images")

    for axes in (left, right):
        axes.set_xlim(0, max(epochs) + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_together(path.parent, {path.name: buffer.getvalue()})
    return path
