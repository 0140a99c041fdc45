"""What is wrong with a report: spills that cost, and what got worse than it was accepted with this Triton.

A compiler's register allocation changes from version to version, so the few bytes that it spills here and there are
data: ``accepted.json`` has, for each minor version of Triton and each architecture, the rows that spill and how much,
as they were when somebody last looked. :func:`limit` says what nobody may accept, and why. With a Triton or for an
architecture without figures nothing is wrong: what would be is said, for somebody to look at and to record by
``python -m benchmarks.compile_report --accept``. Nor for a GPU that ``auto`` does not trust Triton with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton

from rlrr_kernels import devices
from rlrr_kernels.ops.host import guard

ACCEPTED = Path(__file__).with_name("accepted.json")

Row = dict[str, Any]
Figures = dict[str, dict[str, int]]
"""Bytes spilled a thread, by architecture and by :func:`name`; rows that spill nothing are not in it."""


class Limit(NamedTuple):
    """Bytes a thread that a row may spill."""

    bytes: int
    reason: str


ONCE = Limit(4 * guard.SPILLED_ONCE, "even once a program, outside its loops, that is much beside what it reads")
SLOW_STEPS = Limit(64, "a step of these products takes hundreds of clocks, only a few loads hide behind it")
FAST_STEPS = Limit(0, "a step of a 16-bit product takes so few clocks that each access to local memory is seen")


def limit(row: Row) -> Limit:
    """The limit that holds for a row."""
    if not row["spills_in_loops"]:
        return ONCE
    return SLOW_STEPS if row["dtype"] in ("fp32", "tf32", "fp64") else FAST_STEPS


def version() -> str:
    """Major and minor version of the installed Triton: the key of its figures."""
    return ".".join(triton.__version__.split(".")[:2])


def name(row: Row) -> str:
    """By which a row's figure is kept, among those of its architecture."""
    return f"{row['kernel']}, {row['dtype']}: {row['config']}"


def accepted() -> Figures:
    """What was accepted with the installed Triton; empty where it is a new one."""
    return json.loads(ACCEPTED.read_text(encoding="utf-8")).get(version(), {})


def accept(rows: Iterable[Row]) -> None:
    """Records what the rows spill within the limits, in place of earlier figures of Triton and architecture."""
    everything = json.loads(ACCEPTED.read_text(encoding="utf-8"))
    figures = everything.setdefault(version(), {})
    rows = list(rows)
    for arch in {row["arch"] for row in rows}:
        kept = (row for row in rows if row["arch"] == arch and 0 < row["spills"] <= limit(row).bytes)
        figures[arch] = {name(row): row["spills"] for row in kept}
    ordered = {
        key: dict(sorted(everything[key].items()))
        for key in sorted(everything, key=lambda key: [*map(int, key.split("."))])
    }
    ACCEPTED.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def problems(row: Row, figures: Figures | None = None) -> list[str]:
    """What is wrong with a row: a spill that costs or was not there, too much shared memory, no tensor cores, no TMA.

    Without ``figures`` any spill up to its limit is let pass, with them only one that was accepted.
    """
    found, most = [], limit(row)
    if row["spills"] > most.bytes:
        found.append(f"spills {row['spills']} bytes a thread, over {most.bytes}: {most.reason}")
    elif figures is not None and row["spills"] > (was := figures.get(row["arch"], {}).get(name(row), 0)):
        found.append(f"spills {row['spills']} bytes a thread, {was} when it was accepted")
    device = devices.SHARED_BYTES.get(row["arch"], devices.LEAST_SHARED_BYTES)
    if row["shared_bytes"] > min(device, row["shared_bound"] or device):
        bound = f"of {device}, and at most {row['shared_bound']} by the sum"
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, {bound}")
    if row["dtype"].split("/")[0] in ("bf16", "fp16") and row["uses_dot"]:
        if row["matrix_instruction"] is None:
            found.append("uses no matrix instruction")
        elif row["arch"] == "sm_90" and row["matrix_instruction"] != "wgmma":
            found.append(f"uses {row['matrix_instruction']}, not wgmma")
    if row["tma"] is False:
        found.append("is given descriptors and does not load by TMA")
    return found


def judge(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """What is wrong, and what somebody should look at, a line each.

    The latter where nothing was accepted yet, and for GPUs that ``auto`` leaves to the library's products.
    """
    figures, wrong, remarks = accepted(), [], []
    for row in rows:
        served = devices.distrust_of_triton(row["arch"]) is None
        lines = wrong if served and row["arch"] in figures else remarks
        lines += [f"{row['arch']} {name(row)}: {problem}" for problem in problems(row, figures)]
    if remarks:
        remarks.insert(0, f"Triton {version()}, to look at, {len(remarks)}:")
    return wrong, remarks
