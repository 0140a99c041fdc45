"""Checks and measures everything a GPU is needed for, most valuable first, within the minutes given.

    python -m benchmarks.gpu --out DIR [--minutes 8]

Every row is in DIR/gpu.json as soon as it is measured; DIR/gpu.md follows after each stage, pictures at the end, and
DIR/tiles.json holds tiles that were found faster. What crashes or hangs takes its own process along, not the command.
Without a CUDA GPU the command runs on tiny shapes as a test of itself (with TRITON_INTERPRET=1 through the Triton
kernels too); its rows are marked meaningless. ``--dry-run`` lists what a GPU would do, and how long it is thought to
take.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import platform
import signal
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.plan import cpu_plan, gpu_plan
from benchmarks.gpu.session.session import Session
from benchmarks.gpu.session.units import SECTIONS, default_device, make_units
from benchmarks.gpu.timing import describe
from benchmarks.gpu.work import Row, Unit
from benchmarks.support.common import environment as common_environment


def environment(device: str, commit: str | None) -> Row:
    """What every row says about where it was measured."""
    here: Row = dict(common_environment())
    here["commit"] = commit or here["commit"]
    here["python"] = platform.python_version()
    here["triton"] = _version("triton")
    here["peft"] = _version("peft")
    here["timm"] = _version("timm")
    here["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "none"
    here["cuda"] = torch.version.cuda or torch.version.hip or "none"
    here["driver"] = _driver() if device == "cuda" else "none"
    here["meaningless"] = device != "cuda"
    return here


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer[0] if answer else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns the exit status: 1 where the run was cut short by an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder of the results; at most 6 files are written")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these (default: all of them)"
    )
    parser.add_argument("--commit", help="what the rows say, where the checkout has no git history")
    parser.add_argument("--dry-run", action="store_true", help="list the units for a GPU and run none")
    parser.add_argument("--report-only", action="store_true", help="write the report of an earlier run's rows again")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes}")
    sections = tuple(options.sections)
    if options.dry_run:
        print("\n".join(_plan_lines(make_units(sections, "cuda")[1], options.minutes)))
        return 0
    if options.out is None:
        parser.error("--out is required: the folder of the results")
    if options.report_only:
        return _report_only(options.out)
    device = default_device()
    options.out.mkdir(parents=True, exist_ok=True)
    here = environment(device, options.commit)
    session = Session(functools.partial(make_units, sections, device), options.out, here, options.minutes)
    signal.signal(signal.SIGTERM, _interrupt)
    status = 0
    try:
        session.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    except Exception as error:
        print(f"stopped: {describe(error)}", file=sys.stderr)
        status = 1
    session.finish()
    return status


def _plan_lines(units: list[Unit], minutes: float) -> list[str]:
    """The units by tier with estimated seconds, and how far the given minutes are thought to reach."""
    lines, total = [], 0.0
    for tier, group in groupby(units, key=lambda unit: unit.tier):
        here = list(group)
        seconds = sum(unit.seconds for unit in here)
        reach = "" if total + seconds <= 60 * minutes else f"; beyond {minutes:g} minutes"
        total += seconds
        lines.append(f"tier {tier}: {len(here)} units, {seconds:.0f} s, {total:.0f} s with all before{reach}")
        lines += [f"  {unit.seconds:5.0f} s  {unit.section}: {unit.label}" for unit in here]
    return lines


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _report_only(folder: Path) -> int:
    path = folder / report.JSON
    if not path.is_file():
        print(f"--out must be a folder with {report.JSON}; got {folder}", file=sys.stderr)
        return 2
    rows = report.read_rows(path)
    keys = ("gpu", "driver", "cuda", "torch", "triton", "python", "peft", "timm", "cpu", "threads", "commit")
    here = {key: rows[0][key] for key in (*keys, "meaningless")}
    report.write_report(rows, cpu_plan() if here["meaningless"] else gpu_plan(), here, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
