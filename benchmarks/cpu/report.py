"""Turns pytest-benchmark's JSON of ``benchmarks/cpu/test_linear.py`` into a Markdown table and a picture.

python -m benchmarks.cpu.report RESULTS.json [...] --markdown linear_cpu.md --picture linear_cpu.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RIVALS = {
    "reference": "eager formula",
    "compiled": "torch.compile",
    "torch": "our torch path",
    "floor": "3 products",
    "merged": "merged",
}
"""Whom the table compares with, and their headings; ``floor`` is one product in forward."""

TARGETS = {
    1: {"reference": 6, "compiled": 3, "torch": 1.3},
    16: {"reference": 3, "compiled": 1.8, "torch": 1.3},
    64: {"reference": 2, "compiled": 1.3, "torch": 1.3, "floor": 0.7},
    197: {"reference": 1.5, "compiled": 1.1, "torch": 1.2, "floor": 0.8},
    1576: {"reference": 1.05, "compiled": 1.0, "torch": 1.0, "floor": 0.9},
    6304: {"reference": 1.05, "compiled": 1.0, "torch": 1.0, "floor": 0.9},
}
"""By M: the least times our time that each rival should take in forward + backward, worst shape."""

MERGED_TARGET = 0.8
"""The same for a merged layer in forward at M = 1: inference may take 1.25 times its time."""


def read_rows(paths: list[Path]) -> list[dict]:
    """The ``extra_info`` of every benchmark in the files."""
    return [entry["extra_info"] for path in paths for entry in json.loads(path.read_text())["benchmarks"]]


def worst_ratios(rows: list[dict], seconds: str = "seconds") -> dict[tuple, dict[str, tuple[float, str]]]:
    """By (pass, dtype, threads, M): for every rival the smallest rival time / our time, and its shape."""
    table: dict[tuple, dict[str, tuple[float, str]]] = {}
    for row in rows:
        key = _key(row)
        shape = f"{row['in_features']} → {row['out_features']}"
        worst = table.setdefault(key, {})
        for name, value in row[seconds].items():
            ratio = (value / row[seconds]["cpp"], shape)
            worst[name] = min(worst.get(name, ratio), ratio)
    return table


def targets(rows: list[dict]) -> list[str]:
    """A table of :data:`TARGETS`: what was measured in the worst shape, and the target where it was missed."""
    table, cold = worst_ratios(rows), worst_ratios(rows, "cold_seconds")
    names = ["reference", "compiled", "torch", "floor"]
    headings = [*(RIVALS[name] for name in names), "eager formula, cold", "kept bytes"]
    lines = ["## Targets, forward + backward", ""]
    lines += [
        "A cell with one number reached its target; a missed one names it. Cold: every call right after a rival's,"
    ]
    lines += ["with W out of the nearest cache, as between the layers of a model; else after a call of its own.", ""]
    lines += [f"| dtype, threads | M | {' | '.join(headings)} |", "|---|---|" + "---|" * len(headings)]
    for key in sorted((k for k in table if k[0] and k[3] in TARGETS), key=lambda k: (k[1] != "float32", -k[2], k[3])):
        _, dtype, threads, count = key
        cells = []
        for name in names:
            ratio, least = table[key].get(name, (None,))[0], TARGETS[count].get(name)
            missed = least is not None and ratio is not None and round(ratio, 2) < least
            cells.append("-" if ratio is None else f"{ratio:.2f}" + (f" (**target {least}**)" if missed else ""))
        cells.append(f"{cold[key]['reference'][0]:.2f}" if cold[key] else "-")
        kept = [row["kept_bytes"]["cpp"] for row in rows if _key(row) == key and row["kept_bytes"]]
        lines.append(f"| {dtype}, {threads} | {count} | {' | '.join(cells)} | {max(kept) if kept else '-'} |")
    for key in sorted(k for k in table if not k[0] and k[3] == 1 and "merged" in table[k]):
        ratio = table[key]["merged"][0]
        verdict = "" if round(ratio, 2) >= MERGED_TARGET else f" (**target {1 / MERGED_TARGET:.2f}**)"
        time = f"{1 / ratio:.2f} times that of a merged layer{verdict}"
        lines += ["", f"Inference at M = 1, {key[1]}, {key[2]} thread(s): {time}."]
    return lines


def _key(row: dict) -> tuple:
    return row["backward"], row["dtype"], row["threads"], row["rows"]


def markdown(rows: list[dict]) -> str:
    """One table for each pass, dtype and number of threads."""
    places = sorted({(row["cpu"], row["torch"], row["commit"]) for row in rows})
    lines = ["# `rlrr_linear` in C++ against its rivals, CPU", ""]
    lines += [f"- {cpu}; torch {torch}; commit {commit}" for cpu, torch, commit in places]
    lines += [
        "",
        "Each cell: how many times our time the rival takes, in the worst of the shapes (K → N) measured; medians of",
        "interleaved runs in one process, rank 1. Over 1 is faster than the rival. Bytes: the largest shape.",
        "",
        *targets(rows),
    ]
    table = worst_ratios(rows)
    for key in sorted({key[:3] for key in table}, key=lambda key: (not key[0], key[1] != "float32", -key[2])):
        backward, dtype, threads = key
        names = [name for name in RIVALS if any(name in table[k] for k in table if k[:3] == key)]
        headings = [*(RIVALS[name] for name in names), "µs", "peak MB, eager's", "kept bytes, eager's"]
        lines += ["", f"## {'forward + backward' if backward else 'forward'}, {dtype}, {threads} thread(s)", ""]
        lines += [f"| M | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
        for entry in sorted(k for k in table if k[:3] == key):
            here = [row for row in rows if _key(row) == entry]
            times = [1e6 * row["seconds"]["cpp"] for row in here]
            largest = max(here, key=lambda row: row["in_features"] * row["out_features"])
            both = ("cpp", "reference")
            cells = [
                *(f"{table[entry][name][0]:.2f}" for name in names),
                f"{min(times):.0f} to {max(times):.0f}",
                ", ".join(f"{largest['peak_bytes'][name] / 1e6:.1f}" for name in both if largest["peak_bytes"]) or "-",
                ", ".join(str(largest["kept_bytes"][name]) for name in both if largest["kept_bytes"]) or "-",
            ]
            lines.append(f"| {entry[3]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    """Speed against the eager formula over M, one panel a dtype: geometric mean over the shapes, forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"cpp": "C++ operator", "torch": "plain torch path", "compiled": "torch.compile of the formula"}
    names |= {"floor": "three bare matrix products"}
    dtypes = sorted({row["dtype"] for row in rows}, key=lambda dtype: dtype != "float32")
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.6), sharey=True, squeeze=False)
    most = max(row["threads"] for row in rows)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        chosen = [row for row in rows if row["backward"] and row["dtype"] == dtype and row["threads"] == most]
        counts = sorted({row["rows"] for row in chosen})
        for name, label in names.items():
            means = []
            for count in counts:
                ratios = [r["seconds"]["reference"] / r["seconds"][name] for r in chosen if r["rows"] == count]
                product = 1.0
                for ratio in ratios:
                    product *= ratio
                means.append(product ** (1 / len(ratios)))
            axis.plot(counts, means, marker="o", label=label, linestyle="--" if name == "floor" else "-")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=f"{dtype}, {most} threads")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times faster than the eager formula")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--markdown", type=Path, help="where the table goes (default: the terminal)")
    parser.add_argument("--picture", type=Path, help="where the picture (PNG) goes")
    arguments = parser.parse_args()
    rows = read_rows(arguments.results)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows))
    if arguments.picture:
        picture(rows, arguments.picture)


if __name__ == "__main__":
    main()
