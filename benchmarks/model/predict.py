"""What the model says of every layer of the plan, and of every target for a layer, on an H200 that none has measured.

    python -m benchmarks.model.predict [--markdown FILE]

Needs no GPU and no Triton. ``benchmarks/results/gpu_model.md`` is its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from benchmarks.common import Problem
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Plan, gpu_plan, vit_layers
from benchmarks.gpu.report import markdown_table
from benchmarks.gpu.session.work import Row
from benchmarks.gpu.targets import layer_groups, layer_verdicts
from benchmarks.model.layers import H200, model_us

RIVALS = {
    "forward": ("reference", "merged", "floor", "triton.one_pass", "triton.merge", "auto"),
    "step": ("reference", "floor", "triton.one_pass", "triton.merge", "auto"),
    "scales": ("floor", "triton"),
}
"""By work, as the GPU command names them; ``triton`` is the kernel that the paths share."""

SHOWN = ("bf16", "bf16/fp32", "tf32")

VITS = (("ViT-B", 768, 12), ("ViT-L", 1024, 24), ("ViT-H", 1280, 32))
"""Name, width and blocks."""


def predicted_rows(plan: Plan) -> list[Row]:
    """Rows as the section "layers" has them, with the model's time in place of a measured one."""
    rows: list[Row] = [{"section": "ceilings", "what": "copy", "TB_per_s": H200.bandwidth / 1e12}]
    for shape, count, name in dict.fromkeys(entry[1:] for entry in plan.layers):
        precision = PRECISIONS[name]
        sizes = count, shape.in_features, shape.out_features
        problem = Problem(*sizes, precision.dtype, True, "cpu", precision.weight_dtype)
        for work, rivals in RIVALS.items():
            head = {
                "section": "layers", "shape": shape.name, "M": count, "N": sizes[2], "K": sizes[1],
                "precision": name, "work": work, "compile_mode": None, "tiles": "shipped",
            }  # fmt: skip
            for rival in rivals:
                us = model_us("auto" if rival == "triton" else rival, work, problem, name, H200)
                rows.append({**head, "rival": rival, "graph_us": us})
    return rows


Case = tuple[str, int, str, bool | None]
"""A target, M, a shape, and whether it is reached there."""


def _cases(rows: list[Row], plan: Plan, best: bool) -> Iterator[Case]:
    """Every target at every shape; with ``best`` the faster path stands for the one that is chosen."""
    ceilings = [row for row in rows if row["section"] == "ceilings"]
    for head, group in layer_groups(rows):
        here = list(group.values())
        if best and "auto" in group:
            paths = [group[name] for name in ("triton.one_pass", "triton.merge")]
            fastest = min(paths, key=lambda row: row["graph_us"])
            here = [{**fastest, "rival": "auto"} if row["rival"] == "auto" else row for row in here]
        for verdict in layer_verdicts(ceilings + here, plan):
            if verdict.count:
                yield verdict.target, head["M"], head["shape"], verdict.reached


def _where_not(cases: list[Case]) -> str:
    """The shapes where a target is not reached, by M."""
    parts = []
    for count in sorted({case[1] for case in cases}):
        here = [case for case in cases if case[1] == count]
        missed = [shape for _, _, shape, reached in here if not reached]
        if missed:
            parts.append(f"M = {count}: " + ("all" if len(missed) == len(here) > 1 else ", ".join(missed)))
    return "; ".join(parts) or "none"


def target_lines(rows: list[Row], plan: Plan) -> list[list[object]]:
    """For each target for a layer: where the model says that it is not reached, and where by neither path."""
    chosen, best = (list(_cases(rows, plan, best)) for best in (False, True))
    lines = []
    for verdict in layer_verdicts(rows, plan):
        if not verdict.count:
            lines.append([verdict.target, "not modelled", *[""] * 4])
            continue
        reached = [case[3] for case in chosen if case[0] == verdict.target]
        never = _where_not([case for case in best if case[0] == verdict.target])
        share = f"{sum(reached)} of {len(reached)}"
        lines.append([verdict.target, share, verdict.value, verdict.bound, verdict.where, never])
    return lines


def model_lines() -> list[list[object]]:
    """The linear layers of whole models, forward and backward: what a training step can gain on them at most."""
    lines = []
    for (name, width, blocks), batch, precision in product(VITS, (8, 64), ("bf16", "bf16/fp32")):
        dtypes = PRECISIONS[precision].dtype, True, "cpu", PRECISIONS[precision].weight_dtype
        problems = [
            Problem(batch * TOKENS, shape.in_features, shape.out_features, *dtypes) for shape in vit_layers(name, width)
        ]
        times = [
            1e-3 * blocks * sum(model_us(rival, "step", problem, precision, H200) for problem in problems)
            for rival in ("reference", "floor", "frozen", "auto")
        ]
        lines.append([name, batch, precision, *times, times[0] / times[-1]])
    return lines


def report(plan: Plan) -> str:
    """Everything, as Markdown."""
    rows = predicted_rows(plan)
    lines = [
        "# Predicted for an H200, measured by no GPU", "",
        f"From {H200.bandwidth / 1e12:.1f} TB/s and {H200.rates['bf16'] / 1e12:.0f} TFLOP/s in bf16, by",
        "`python -m benchmarks.model`; what is assumed is in `benchmarks/model/layers.py` and `library.py` and in",
        "`rlrr_kernels/ops/linear/tiles.py` and `path.py`. Times are microseconds of kernels replayed from a",
        "CUDA graph. Everything within a kernel overlaps here, so real ones are slower: `python -m",
        "benchmarks.model.tiles` adds to the one-pass kernels what their machine code cannot overlap.", "",
        "## Targets for one layer, bf16", "",
        "The worst case is that of the path which `auto` chooses; the last column names the shapes where neither path",
        "is said to reach the target.", "",
    ]  # fmt: skip
    heads = ["target", "reached", "worst", "bound there", "where", "out of reach by either path"]
    lines += markdown_table(heads, target_lines(rows, plan))
    lines += ["## The linear layers of a training step, ms", ""]
    heads = ["model", "batch", "precision", "eager reference", "floor", "frozen", "auto", "eager / auto"]
    lines += markdown_table(heads, model_lines())
    for precision in SHOWN:
        for work, rivals in RIVALS.items():
            lines += [f"## Layers, {precision}, {work}, µs", ""]
            here = [
                [head["shape"], head["M"], *(group[name]["graph_us"] for name in rivals)]
                for head, group in layer_groups(rows)
                if (head["precision"], head["work"]) == (precision, work)
            ]
            lines += markdown_table(["shape", "M", *rivals], sorted(here, key=lambda line: (line[0], line[1])))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--markdown", type=Path, help="write it to this file instead of the terminal")
    options = parser.parse_args()
    text = report(gpu_plan())
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
