"""Units run in a process of their own, which may die, hang or lose its GPU without taking the session along.

One process serves all units, because its start takes some ten seconds on a GPU; only after a failure that it does not
survive another one takes its place. It is told the number of a unit and answers with the unit's rows; before anything
runs for the first time it says what that is, so that the session can name it, should nothing more be heard.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.launch_model import Ceilings
from benchmarks.gpu.measurements.ceilings import ceilings_of
from benchmarks.gpu.plan import RunPlan
from benchmarks.gpu.timing import ContextLost, describe, explain, release
from benchmarks.gpu.work import Row, Unit, listen
from benchmarks.support.baselines import peft_module

MakeUnits = Callable[[], tuple[RunPlan, list[Unit]]]
"""Gives the same units in every process; picklable."""


class Bench:
    """What the units of a process share: the plan, the checks, and what earlier rows say, other processes' too."""

    def __init__(self, plan: RunPlan, earlier: list[Row]) -> None:
        self.plan = plan
        self.checks = Checks(plan, earlier)
        self._rows = list(earlier)

    @property
    def ceilings(self) -> Ceilings | None:
        """The measured ceilings of this device, None where nothing measured them."""
        return ceilings_of(self._rows)

    def run(self, unit: Unit) -> tuple[list[Row], bool]:
        """The rows of a unit, or one that says why it has none; and whether the device still answers."""
        known, answers = len(self.checks.rows), True
        try:
            rows = unit.run(self)
        except Exception as error:
            try:
                reason = explain(error, self.plan.device)
            except ContextLost as lost:
                reason, answers = describe(lost), False
            rows = [{"section": unit.section, "label": unit.label, "error": reason}]
        if answers:
            release(self.plan.device)
        rows = [*self.checks.rows[known:], *rows]
        self._rows += rows
        return rows, answers


def serve(connection: Any, make_units: MakeUnits, earlier: list[Row], environment: dict[str, str]) -> None:
    """The process: runs the units whose numbers it receives, until it receives None or loses its device."""
    os.setpgid(0, 0)  # so that processes it starts, compilers for instance, end with it; and not by an interrupt
    os.environ.update(environment)
    plan, units = make_units()
    bench = Bench(plan, earlier)
    listen(lambda row: connection.send(("running", row)))
    if plan.device == "cuda":
        torch.zeros(1, device=plan.device)
    peft_module()
    gc.freeze()  # what the imports made need not be searched again after every unit
    connection.send(("ready", None))
    answers = True
    while answers:
        try:
            number = connection.recv()
        except EOFError:
            return
        if number is None:
            return
        rows, answers = bench.run(units[number])
        connection.send(("rows", (rows, answers)))


class Worker:
    """The session's end of a process of :func:`serve`."""

    def __init__(self, make_units: MakeUnits, earlier: list[Row], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make_units, earlier, environment))
        self._process.start()
        theirs.close()
        self.running: Row | None = None
        """What it said it runs, since the last unit began."""

    def wait_until_ready(self, seconds: float) -> None:
        """Raises ``TimeoutError`` or ``EOFError`` where it does not get ready."""
        self._receive("ready", seconds)

    def run(self, number: int, seconds: float) -> tuple[list[Row], bool]:
        """What :meth:`Bench.run` gives for the unit of this number.

        Raises:
            TimeoutError: it took longer than ``seconds``.
            EOFError: the process died.
        """
        self.running = None
        try:
            self._connection.send(number)
        except OSError as error:
            raise EOFError from error
        return self._receive("rows", seconds)

    def _receive(self, kind: str, seconds: float) -> Any:
        end = time.perf_counter() + seconds
        while self._connection.poll(max(0.0, end - time.perf_counter())):
            try:
                found, content = self._connection.recv()
            except ConnectionError as error:
                raise EOFError from error
            if found == kind:
                return content
            self.running = content
        raise TimeoutError

    def end(self, seconds: float = 0.0) -> str:
        """Ends the process, by force if it has not ended after ``seconds``; says how it ended if by itself."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(seconds)
        code = self._process.exitcode
        for kill in (lambda: os.killpg(self._process.pid, signal.SIGKILL), self._process.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill()
        self._process.join(10.0)
        self._connection.close()
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"
