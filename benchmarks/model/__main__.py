"""Predicts times on an H200 that no GPU has measured; see ``docs/costs/model.md``.

    python -m benchmarks.model [--markdown FILE]                 # every layer of the plan, every target for a layer
    python -m benchmarks.model --tiles [--kernel grad_scales --m 12608 --candidates]   # tiles, by their machine code

The first needs neither GPU nor Triton and makes ``benchmarks/results/gpu_model.md``. The second compiles for sm_90.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from benchmarks.gpu.launch_model import H200, model_us
from benchmarks.gpu.plan import PRECISIONS, TOKENS, RunPlan, gpu_plan, vit_layers
from benchmarks.gpu.targets import layer_groups, layer_verdicts
from benchmarks.gpu.work import Row, sizes_of
from benchmarks.model import tasks
from benchmarks.support.common import markdown_table
from rlrr_kernels.ops.choice.tiles import KERNELS

IMPLEMENTATIONS = {
    "forward": ("reference", "merged", "floor", "triton.fused", "triton.merge", "auto"),
    "step": ("reference", "floor", "triton.fused", "triton.merge", "auto"),
    "scales": ("floor", "triton"),
}
"""By work, as the GPU command names them; ``triton`` is the kernel that the paths share."""

SHOWN = ("bf16", "bf16/fp32", "tf32")

VITS = (("ViT-B", 768, 12), ("ViT-L", 1024, 24), ("ViT-H", 1280, 32))
"""Name, width and blocks."""

Case = tuple[str, int, str, bool | None]
"""A target, M, a shape, and whether it is reached there."""


def predicted_rows(plan: RunPlan) -> list[Row]:
    """Rows as the section "layers" has them, with the model's time in place of a measured one."""
    rows: list[Row] = [{"section": "ceilings", "what": "copy", "TB_per_s": H200.bandwidth / 1e12}]
    for shape, m, name in dict.fromkeys(entry[1:] for entry in plan.layers):
        problem = plan.problem(m, shape, PRECISIONS[name])
        for work, implementations in IMPLEMENTATIONS.items():
            head = {
                "section": "layers", "shape": shape.name, **sizes_of(problem), "precision": name, "work": work,
                "compile_mode": None, "tiles": "shipped",
            }  # fmt: skip
            for implementation in implementations:
                us = model_us("auto" if implementation == "triton" else implementation, work, problem, name)
                rows.append({**head, "implementation": implementation, "graph_us": us})
    return rows


def _cases(rows: list[Row], plan: RunPlan, best: bool) -> Iterator[Case]:
    """Every target at every shape; with ``best`` the faster path stands for the one that is chosen."""
    ceilings = [row for row in rows if row["section"] == "ceilings"]
    for head, group in layer_groups(rows):
        if best and "auto" in group:
            paths = [group[name] for name in ("triton.fused", "triton.merge")]
            group = group | {"auto": min(paths, key=lambda row: row["graph_us"]) | {"implementation": "auto"}}
        for verdict in layer_verdicts(ceilings + list(group.values()), plan):
            if verdict.count:
                yield verdict.target, head["M"], head["shape"], verdict.reached


def _where_not(cases: list[Case]) -> str:
    """The shapes where a target is not reached, by M."""
    parts = []
    for m in sorted({case[1] for case in cases}):
        here = [case for case in cases if case[1] == m]
        missed = [shape for _, _, shape, reached in here if not reached]
        if missed:
            parts.append(f"M = {m}: " + ("all" if len(missed) == len(here) > 1 else ", ".join(missed)))
    return "; ".join(parts) or "none"


def target_lines(rows: list[Row], plan: RunPlan) -> list[list[object]]:
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


def model_lines(plan: RunPlan) -> list[list[object]]:
    """The linear layers of whole models, forward and backward: what a training step can gain on them at most."""
    lines = []
    for (name, width, blocks), batch, precision in product(VITS, (8, 64), ("bf16", "bf16/fp32")):
        problems = [plan.problem(batch * TOKENS, shape, PRECISIONS[precision]) for shape in vit_layers(name, width)]
        times = [
            1e-3 * blocks * sum(model_us(implementation, "step", problem, precision) for problem in problems)
            for implementation in ("reference", "floor", "frozen", "auto")
        ]
        lines.append([name, batch, precision, *times, times[0] / times[-1]])
    return lines


def report(plan: RunPlan) -> str:
    """Everything about layers, as Markdown."""
    rows = predicted_rows(plan)
    lines = [
        "# Predicted for an H200, measured by no GPU", "",
        f"From {H200.bandwidth / 1e12:.1f} TB/s and {H200.rates['bf16'] / 1e12:.0f} TFLOP/s in bf16, by",
        "`python -m benchmarks.model`; [what is assumed](../../docs/costs/model.md). Times are microseconds of kernels",
        "replayed from a CUDA graph. Everything within a kernel overlaps here, so real ones are slower.", "",
        "## Targets for one layer, bf16", "",
        "The worst case is that of the path which `auto` chooses; the last column names the shapes where neither path",
        "is said to reach the target.", "",
    ]  # fmt: skip
    heads = ["target", "reached", "worst", "bound there", "where", "out of reach by either path"]
    lines += markdown_table(heads, target_lines(rows, plan))
    lines += ["## The linear layers of a training step, ms", ""]
    heads = ["model", "batch", "precision", "eager reference", "floor", "frozen", "auto", "eager / auto"]
    lines += markdown_table(heads, model_lines(plan))
    for precision, (work, names) in product(SHOWN, IMPLEMENTATIONS.items()):
        here = [
            [head["shape"], head["M"], *(group[name]["graph_us"] for name in names)]
            for head, group in layer_groups(rows)
            if (head["precision"], head["work"]) == (precision, work)
        ]
        lines += [f"## Layers, {precision}, {work}, µs", ""]
        lines += markdown_table(["shape", "M", *names], sorted(here, key=lambda line: (line[0], line[1])))
    lines += [
        "## Several tasks in a batch, bf16, rank 1", "",
        "`rlrr_linear_multi` beside the library's product of the same rows with one merged W'. Padding is the share of",
        "the tiles' rows that belong to no sample.", "",
    ]  # fmt: skip
    lines += markdown_table(tasks.HEADS, tasks.lines())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write it to this file instead of the terminal")
    tiles = parser.add_argument_group("--tiles")
    tiles.add_argument("--tiles", action="store_true", help="predict fused kernels from their machine code")
    tiles.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    tiles.add_argument("--precision", nargs="+", choices=SHOWN, default=["bf16"])
    tiles.add_argument("--m", nargs="+", type=int, default=[16, 64, 1576, 12608], help="rows of x")
    tiles.add_argument("--candidates", action="store_true", help="also what rlrr tune --experimental would try")
    tiles.add_argument("--overhead", action="store_true", help="the median overhead over the library's product instead")
    tiles.add_argument("--tasks", action="store_true", help="tiles of 64 images for as many tasks instead")
    options = parser.parse_args(arguments)
    if options.tiles:
        from benchmarks.model import machine_code  # imports Triton

        if options.tasks:
            lines = machine_code.tasks_report()
        else:
            sizes = [] if options.overhead else options.m
            lines = machine_code.report(options.kernel, options.precision, sizes, options.candidates)
    else:
        lines = report(gpu_plan()).splitlines()
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
