"""Draws docs/pictures/serving.svg, a batch of many tasks on one backbone: ``python docs/pictures/serving.py``."""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 800, 290
INK, EDGE, PAPER, FROZEN, ARROW = "#1f2937", "#64748b", "#ffffff", "#dbeafe", "#7c8796"
TASKS = {"cells": "#e69f00", "flowers": "#009e73", "cracks": "#cc79a7"}
"""Three of the Okabe-Ito colours, which are told apart with any eyes, and by the names beside them."""

BATCH = ("flowers", "cells", "cracks", "flowers", "cells", "flowers")
CLASSES = {"cells": 2, "flowers": 5, "cracks": 3}
ROW = 26


def text(x: float, y: float, content: str, *, size: int = 13, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="700"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}>{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, radius: int = 4) -> str:
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"'
    return f'<rect {shape} fill="{fill}" stroke="{EDGE}"/>'


def arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path d="M{x:g} {y:g}H{end - 7:g}" stroke="{ARROW}" stroke-width="2"/>'
        f'<path d="M{end:g} {y:g}l-9-5v10z" fill="{ARROW}"/>'
    )


def column(x: float, tasks: tuple[str, ...], top: float) -> list[str]:
    """Images of a batch, one a row, in the colours of their tasks."""
    parts = []
    for row, task in enumerate(tasks):
        y = top + row * ROW
        parts += [box(x, y, 74, ROW - 5, TASKS[task]), text(x + 37, y + 15, task, size=12)]
    return parts


def draw() -> str:
    """The picture as SVG."""
    top, middle = 70, 70 + 3 * ROW
    ordered = tuple(sorted(BATCH, key=list(TASKS).index))
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        text(77, 36, "a batch", bold=True),
        text(77, 54, "as it comes"),
        *column(40, BATCH, top),
        arrow(124, middle, 32),
        text(205, 36, "sorted by task", bold=True),
        text(205, 54, "once"),
        *column(168, ordered, top),
        arrow(252, middle, 32),
        text(432, 36, "one backbone", bold=True),
        text(432, 54, "one product for all rows"),
        box(294, top, 276, 6 * ROW - 5, FROZEN),
        text(346, middle - 6, "W  [N, K]", size=15),
        text(346, middle + 14, "frozen, shared"),
        text(426, middle + 1, "⊙ ( 1 +", size=15),
    ]
    for place, task in enumerate(ordered):
        y = top + 4 + place * ROW
        parts += [
            box(460, y, 12, ROW - 13, TASKS[task], 2),
            box(476, y + (ROW - 13) / 2 - 4, 72, 8, TASKS[task], 2),
        ]
    parts += [
        text(558, middle + 1, ")", size=15),
        arrow(580, middle, 32),
        text(700, 36, "each task's own head", bold=True),
        text(700, 54, "in the order of the batch"),
    ]
    for row, task in enumerate(BATCH):
        y = top + row * ROW
        parts += [text(624, y + 15, task, size=12, anchor="start")]
        parts += [box(676 + 20 * i, y + 3, 16, ROW - 11, TASKS[task], 2) for i in range(CLASSES[task])]
    parts += [
        text(432, top + 6 * ROW + 16, "s_r and s_c of each row's task, picked inside the product"),
        text(400, HEIGHT - 16, "An adapter of a ViT-B is 1.2 MB, its backbone 343 MB: no task has a copy of W."),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="system-ui, sans-serif" fill="{INK}">'
    )
    title = "<title>Samples of three tasks in one batch: a frozen weight, the scales and heads of each task</title>"
    return "\n".join([head, title, *parts, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_name("serving.svg").write_text(draw(), encoding="utf-8")
