"""Draws docs/pictures/rlrr.svg, the picture of the method in the README: ``python docs/pictures/rlrr.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

FROZEN, TRAINED, TEXT = "Blues", "Oranges", "#24292f"


def grid(axes, values: np.ndarray, left: float, bottom: float, cell: float, colours: str) -> None:
    """A matrix as coloured cells, its lower left corner at (left, bottom)."""
    rows, cols = values.shape
    for row in range(rows):
        for col in range(cols):
            colour = mpl.colormaps[colours](0.2 + 0.6 * values[row, col])
            corner = (left + col * cell, bottom + (rows - 1 - row) * cell)
            axes.add_patch(plt.Rectangle(corner, cell, cell, facecolor=colour, edgecolor="white", linewidth=1))


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "rlrr"  # the same file every time
    random = np.random.default_rng(4)
    weight, row, col = random.random((6, 8)), random.random((6, 1)), random.random((1, 8))
    factor = row * col
    figure, axes = plt.subplots(figsize=(9, 2.7))
    axes.set_xlim(0, 36)
    axes.set_ylim(-2.4, 8.4)
    axes.set_aspect("equal")
    axes.axis("off")
    grid(axes, weight, 0, 0, 1, FROZEN)
    axes.text(9.2, 3, "⊙ ( 1 +", fontsize=15, va="center", color=TEXT)
    grid(axes, row, 13.4, 0, 1, TRAINED)
    grid(axes, col, 15.2, 5, 1, TRAINED)
    axes.text(23.6, 3, ")   =", fontsize=15, va="center", color=TEXT)
    grid(axes, weight * (0.4 + factor), 27, 0, 1, FROZEN)
    labels = [
        (4, 7.3, "W  [N, K]"), (13.9, 7.3, "$s_r$"), (19.2, 7.3, "$s_c$  [K]"), (31, 7.3, "W'"),
        (4, -1.4, "frozen"), (16.5, -1.4, "trained: N + K numbers (and a bias shift)"),
        (31, -1.4, "gone after the call"),
    ]  # fmt: skip
    for x, y, label in labels:
        axes.text(x, y, label, fontsize=11, ha="center", va="center", color=TEXT)
    figure.savefig(Path(__file__).with_name("rlrr.svg"), bbox_inches="tight", metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
