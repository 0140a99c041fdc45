"""One run of the command: its units in order of value, the rows so far, where they go, and the time that is left."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.session.worker import MakeUnits, Worker
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.work import Row, Unit
from rlrr_kernels import backends
from rlrr_kernels.ops.host import cache

REPORT_SECONDS = 10.0
"""Kept back for the last report."""

HERE_ALONE = {"RLRR_EXPERIMENTAL": "on", "RLRR_CHECK": "off"}
"""Tiles that this session found serve it, whatever their schedule; its own checks are more thorough."""

START_SECONDS = 180.0
"""In which a process must be ready: it imports torch and the models, and creates its context."""

LEAST_LIMIT = 30.0
LIMIT_RATIO = 4.0
"""A unit is given up after so many times its estimate, at least 30 seconds: a deadlock must not take the whole time."""

TINY_LIMIT = 600.0
"""The same for the CPU's run, in which seconds mean nothing."""

STARTS = 3
"""So often in a row a process may fail to get ready."""


class Session:
    """Runs the units of ``make_units`` in a :class:`Worker`, until the time is up."""

    def __init__(self, make_units: MakeUnits, folder: Path, here: Row, minutes: float) -> None:
        self.make_units, self.folder, self.here = make_units, folder, here
        self.plan, self.units = make_units()
        self.deadline = time.perf_counter() + 60 * minutes - REPORT_SECONDS
        self.rows: list[Row] = []
        self.file = report.RowFile(folder / report.JSON, here)
        (folder / report.TILES).unlink(missing_ok=True)  # an earlier run's tiles are not this one's
        self._worker: Worker | None = None
        self._aot_compile: Any = None  # benchmarks.gpu.session.aot_compile.AotCompile

    def add(self, rows: list[Row]) -> None:
        """Keeps rows, in memory and on the disk."""
        self.rows += rows
        self.file.write(rows)

    def run(self) -> None:
        """Everything, until the time is up; a failing unit leaves a row that says why.

        Raises:
            RuntimeError: no process gets ready to run units.
        """
        tier = None
        if self.plan.device == "cuda" and backends.HAS_TRITON:
            from benchmarks.gpu.session.aot_compile import AotCompile  # imports Triton

            self._aot_compile = AotCompile()
        for number, unit in enumerate(self.units):
            if unit.tier != tier and tier is not None:
                self._report(with_pictures=False)
            tier = unit.tier
            left = self.deadline - time.perf_counter()
            if left < (0 if self.plan.tiny else unit.seconds):
                self.add([{"section": unit.section, "label": unit.label, "skipped": report.NO_TIME}])
            else:
                self._run_unit(number, unit)

    def _run_unit(self, number: int, unit: Unit) -> None:
        worker = self._ready_worker()
        left = self.deadline - time.perf_counter()
        usual = TINY_LIMIT if self.plan.tiny else max(LEAST_LIMIT, LIMIT_RATIO * unit.seconds)
        limit = max(0.0, min(usual, left))
        started = time.perf_counter()
        try:
            rows, answers = worker.run(number, limit)
        except TimeoutError:
            self._end_worker()
            in_time = limit < left
            reason = f"killed after {limit:.0f} s" if in_time else "killed when the time was up"
            self._add_death(unit, worker.running, reason, blame=in_time)
        except EOFError:
            self._add_death(unit, worker.running, f"its process died by {self._end_worker(5.0)}", blame=True)
        else:
            if answers:
                self.add(rows)
            else:
                self._end_worker()
                self.add(rows[:-1])
                self._add_death(unit, worker.running, rows[-1]["error"], blame=True)
            self._print_winners(rows)
        seconds = time.perf_counter() - started
        print(f"{seconds:6.1f} s  tier {unit.tier}  {unit.section}: {unit.label}", flush=True)

    def _print_winners(self, rows: list[Row]) -> None:
        for row in rows:
            if "table_row" in row:
                print(f"          fastest on {row['arch']}, {row['precision']}: {row['table_row']}", flush=True)
            if "proven_row" in row:
                print(f"          a line for PROVEN in ops/choice/tiles.py: {row['proven_row']}", flush=True)

    def _ready_worker(self) -> Worker:
        for _ in range(STARTS):
            if self._worker is not None:
                return self._worker
            self._start_worker()
        if self._worker is None:
            raise RuntimeError(f"{STARTS} processes did not get ready to run anything; their own output says why")
        return self._worker

    def _start_worker(self) -> None:
        # The user's own tiles are left alone, in both directions.
        environment = {cache.DIRECTORY_VARIABLE: str(self.folder.resolve()), **HERE_ALONE}
        self._worker = Worker(self.make_units, self.rows, environment)
        try:
            self._worker.wait_until_ready(START_SECONDS)
        except TimeoutError:
            self._end_worker()
            print(f"a process was not ready after {START_SECONDS:.0f} s", flush=True)
        except EOFError:
            print(f"a process ended by {self._end_worker(5.0)} before it was ready", flush=True)

    def _end_worker(self, seconds: float = 0.0) -> str:
        worker, self._worker = self._worker, None
        return worker.end(seconds) if worker else ""

    def _add_death(self, unit: Unit, running: Row | None, reason: str, blame: bool) -> None:
        """The unit's row, and one for the checks, so that the next process knows what not to run again."""
        what = f", running {running['backend']}" if running else ""
        print(f"          {reason}{what}", flush=True)
        if blame and running:
            head = {"section": "correctness", "check": "survival", **running}
            self.add([{**head, "passed": False, "reason": f"{reason} ({unit.section}: {unit.label})"}])
        self.add([{"section": unit.section, "label": unit.label, "error": reason + what}])

    def _report(self, with_pictures: bool) -> None:
        """Never stops the measuring: the rows are safe, and ``--report-only`` can repeat it."""
        try:
            report.write_report(self.rows, self.plan, self.here, self.folder, with_pictures)
        except Exception:
            traceback.print_exc()

    def finish(self) -> None:
        """The last report, and the verdicts on the terminal."""
        self._end_worker()
        if self._aot_compile is not None:
            self._aot_compile.end()
        self.file.close()
        self._report(with_pictures=True)
        for verdict in verdicts(self.rows, self.plan):
            value = (
                "" if verdict.value is None else f"  {verdict.value:.3g} (bound {verdict.bound:.3g}; {verdict.where})"
            )
            print(f"{verdict.text:13s} {verdict.target}{value}")
        if self.here["meaningless"]:
            print("This was a CPU: the timings and verdicts above mean nothing.")
