"""Checks and measures everything a GPU is needed for, most valuable first, within the minutes given.

    python -m benchmarks.gpu --out DIR [--minutes 8]

Every row is in DIR/gpu.json as soon as it is measured; DIR/gpu.md and three pictures follow after each stage. Without a
CUDA GPU the command runs on tiny shapes as a test of itself (with TRITON_INTERPRET=1 through the Triton kernels too);
its rows are marked meaningless.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.common import environment as common_environment
from benchmarks.gpu import report
from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.gate import Gate
from benchmarks.gpu.layers import layer_units
from benchmarks.gpu.measure import describe
from benchmarks.gpu.memory import memory_units
from benchmarks.gpu.plan import Plan, cpu_plan, gpu_plan
from benchmarks.gpu.rivals import peft_module
from benchmarks.gpu.steps import step_units
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.tune import tune_units
from benchmarks.gpu.work import Row, Unit

SECTIONS = ("layers", "host", "memory", "steps", "tune")
"""The order within a tier."""

REPORT_SECONDS = 10.0
"""Kept back for the last report."""


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


class Session:
    """One run: the rows so far, where they go, and the time that is left."""

    def __init__(self, plan: Plan, folder: Path, here: Row, minutes: float, sections: list[str]) -> None:
        self.plan, self.folder, self.here, self.sections = plan, folder, here, sections
        self.deadline = time.perf_counter() + 60 * minutes - REPORT_SECONDS
        self.rows: list[Row] = []
        self.file = report.RowFile(folder / report.JSON, here)

    def add(self, rows: list[Row]) -> None:
        """Keeps rows, in memory and on the disk."""
        self.rows += rows
        self.file.write(rows)

    def run(self) -> None:
        """Everything, until the time is up; a failing unit leaves a row that says why."""
        gate = Gate(self.plan)
        peft_module()
        gc.freeze()  # what the imports made need not be searched again after every unit
        print("ceilings", flush=True)
        ceilings, rows = measure_ceilings(self.plan)
        self.add(rows)
        units = [
            *layer_units(self.plan, gate, ceilings),
            *memory_units(self.plan, gate),
            *step_units(self.plan, gate),
            *tune_units(self.plan),
        ]
        units = [unit for unit in units if unit.section in self.sections]
        units.sort(key=lambda unit: (unit.tier, SECTIONS.index(unit.section)))
        tier = units[0].tier if units else 0
        for unit in units:
            if unit.tier != tier:
                tier = unit.tier
                self._report(with_pictures=False)
            self._run_unit(unit, gate)

    def _run_unit(self, unit: Unit, gate: Gate) -> None:
        left = self.deadline - time.perf_counter()
        head = {"section": unit.section, "label": unit.label}
        if left < (0 if self.plan.tiny else unit.seconds):
            self.add([{**head, "skipped": report.NO_TIME}])
            return
        started, known = time.perf_counter(), len(gate.rows)
        try:
            rows = unit.run()
        except Exception as error:
            if "CUDA error" in str(error):
                self.add([*gate.rows[known:], {**head, "error": describe(error)}])
                raise  # the context is lost: everything after it would fail as well
            rows = [{**head, "error": describe(error)}]
        self.add([*gate.rows[known:], *rows])
        print(f"{time.perf_counter() - started:6.1f} s  tier {unit.tier}  {unit.section}: {unit.label}", flush=True)
        for row in rows:
            if "table_row" in row:
                print(f"          fastest on {row['arch']}, {row['precision']}: {row['table_row']}", flush=True)

    def _report(self, with_pictures: bool) -> None:
        """Never stops the measuring: the rows are safe, and ``--report-only`` can repeat it."""
        try:
            report.write_report(self.rows, self.plan, self.here, self.folder, with_pictures)
        except Exception:
            traceback.print_exc()

    def finish(self) -> None:
        """The last report, and the verdicts on the terminal."""
        gc.unfreeze()
        self.file.close()
        self._report(with_pictures=True)
        for verdict in verdicts(self.rows, self.plan):
            value = (
                "" if verdict.value is None else f"  {verdict.value:.3g} (bound {verdict.bound:.3g}; {verdict.where})"
            )
            print(f"{verdict.text:13s} {verdict.target}{value}")
        if self.here["meaningless"]:
            print("This was a CPU: the timings and verdicts above mean nothing.")


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns the exit status: 1 where the run was cut short by an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; at most 5 files are written")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these (default: all of them)"
    )
    parser.add_argument("--commit", help="what the rows say, where the checkout has no git history")
    parser.add_argument("--report-only", action="store_true", help="write the report of an earlier run's rows again")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes}")
    if options.report_only:
        return _report_only(options.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = gpu_plan() if device == "cuda" else cpu_plan()
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(plan, options.out, environment(device, options.commit), options.minutes, options.sections)
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
