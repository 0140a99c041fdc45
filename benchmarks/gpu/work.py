"""The unit of work: what can be started only whole, and yields rows; and what runs at the moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.support.common import Problem

Row = dict[str, Any]


def sizes_of(problem: Problem) -> Row:
    """M, N, K and r of a row."""
    return {"M": problem.m, "N": problem.n, "K": problem.k, "rank": problem.rank}


class Unit(NamedTuple):
    """Some rows of one section. ``tier``: lower is more valuable; ``seconds``: an estimate, to stop in time.

    ``run`` is given the :class:`benchmarks.gpu.session.worker.Bench` of its process, which is killed after a few times
    the estimate.
    """

    tier: int
    section: str
    label: str
    seconds: float
    run: Callable[[Any], list[Row]]


_listener: Callable[[Row], object] | None = None


def listen(listener: Callable[[Row], object] | None) -> None:
    """Who is told by :func:`announce`."""
    global _listener
    _listener = listener


def announce(implementation: str, precision: str, **problem: Any) -> None:
    """Says what is about to run for the first time, so that it can be named if this process does not survive it."""
    if _listener is not None:
        _listener({"backend": implementation, "precision": precision, **problem})
