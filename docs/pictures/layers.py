"""Draws docs/pictures/layers.svg, the layers that import-linter enforces: ``python docs/pictures/layers.py``.

Needs Python 3.11.
Layers are read from pyproject.toml, so the picture shows what is checked; only what a layer is for is written here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_suffix(".svg")

PURPOSE = {
    "tests": "one folder for each package; support/ptx executes compiled kernels",
    "benchmarks": "CPU, GPU and host timings, what the compiler made of kernels, models of times",
    "cli": "the program rlrr",
    "paper": "datasets, settings and tables of the paper",
    "demo": "a fine-tune on solar cells",
    "serve": "the HTTP server of many adapters",
    "train": "config, data, models, methods, loop, output, grid",
    "bank": "many adapters over one backbone, in one batch",
    "adapt": "what is adapted, the recipe, files, merging",
    "peft": "RLRR as a method of PEFT",
    "explain": "which backend, path and kernels a call takes, and why",
    "nn": "the layers: RLRRLinear, RLRRConv2d, AdditiveLinear, NormRescale; multi: one layer under many adapters",
    "ops": "the operators: checks, autograd, backends, kernels",
    "numerics": "the error rule against float64",
    "backends": "which one serves",
    "reference": "the literal formulas",
    "version": "its number",
    "devices": "what is known of GPUs",
    "writing": "files written whole or not at all",
}

WIDTH, LEFT, GAP, HEIGHT, LINE = 800, 26, 6, 30, 18
INK, OUTSIDE, INSIDE, EDGE, ARROW = "#1f2937", "#e5e7eb", "#dbeafe", "#64748b", "#7c8796"
"""Boxes have a fill of their own under dark text, and the arrow is a middle grey: readable on white and on black."""


def layers() -> tuple[list[list[str]], list[list[str]]]:
    """The layers from the top down, the members of each, and those within ``ops``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    package, operators = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [list(_members(layer)) for layer in package], [list(_members(layer)) for layer in operators]


def _members(layer: str) -> Iterator[str]:
    """Those that exist: a name in parentheses is one of a package that may be missing."""
    for optional, name in re.findall(r"(\(?)([\w.]+)", layer):
        path = ROOT / name.replace(".", "/")
        if not optional or path.is_dir() or path.with_suffix(".py").exists():
            yield name.removeprefix("rlrr_kernels.")


def draw() -> str:
    """The picture as SVG."""
    package, operators = layers()
    parts, top = [], GAP
    for members in package:
        lines = textwrap.wrap(" > ".join(", ".join(names) for names in operators), 80) if members == ["ops"] else []
        height = HEIGHT + LINE * len(lines)
        wide = (WIDTH - LEFT - GAP * len(members)) / len(members)
        for index, name in enumerate(members):
            left = LEFT + index * (wide + GAP)
            parts += _box(name, left, top, wide, height, lines)
        top += height + GAP
    arrow = f'<path d="M12 {GAP}V{top - GAP - 10}" stroke="{ARROW}" stroke-width="2"/>'
    arrow += f'<path d="M12 {top - GAP}l-5-11h10z" fill="{ARROW}"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
    )
    title = "<title>The layers of the project: each imports what is below it only</title>"
    return "\n".join([head, title, arrow, *parts, "</svg>\n"])


def _box(name: str, left: float, top: float, width: float, height: int, lines: list[str]) -> list[str]:
    fill = INSIDE if name not in ("tests", "benchmarks") else OUTSIDE
    shape = f'x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="5"'
    label = f'<tspan font-weight="700">{name}</tspan><tspan dx="10">{escape(PURPOSE[name])}</tspan>'
    texts = [label, *map(escape, lines)]
    return [
        f'<rect {shape} fill="{fill}" stroke="{EDGE}"/>',
        *(f'<text x="{left + 10:g}" y="{top + 20 + LINE * row}">{text}</text>' for row, text in enumerate(texts)),
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
