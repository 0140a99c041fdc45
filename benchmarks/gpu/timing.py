"""Timing: CUDA-graph replay for the kernels, eager wall time beside it, interleaved, medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.support.common import Problem, Step, synchronize

MAX_COPIES = 64
MAX_WALL_COPIES = 16
"""Of the sets of tensors, how many an eager round uses: small calls wait for the host, not for memory."""

MAX_ROUNDS = 60
MIN_ROUNDS = 7

GRAPH_SECONDS = 1e-3
"""A graph repeats its steps until eager calls would take this long: starting it costs the time of a small kernel."""

QUEUE_CYCLES = 1_000_000
"""About half a millisecond of waiting on the device, in which the host queues a round of replays without gaps."""


class ContextLost(RuntimeError):
    """The device answers no longer: everything that follows in this process would fail as well."""


class Timing(NamedTuple):
    """Medians in microseconds of one step: replayed from a CUDA graph (None without), and called eagerly."""

    graph_us: float | None
    wall_us: float
    note: str = ""


def copies_for(problem: Problem) -> int:
    """How many sets of tensors rotate, so that together they are larger than twice the L2 cache; 2 on a CPU."""
    if problem.device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(problem.device).L2_cache_size
    tensors = problem.empty("meta")
    size = sum(tensors[name].nbytes for name in ("x", "weight", "grad_y"))
    return max(1, min(MAX_COPIES, -(-2 * cache // size)))


def capture(steps: list[Step], pool: object | None, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """One graph of all steps, ``repeats`` times, after warming the first up on a side stream, as autograd requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps[:1] * 2:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for step in steps * repeats:
            step()
    return graph


def interleave(
    implementations: dict[str, list[Step]],
    device: str,
    seconds: float,
    graphs: bool,
    starting: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times every implementation: its steps (one per set of rotating tensors) once a round, all of them in turn.

    Args:
        implementations: name → steps.
        device: ``cpu`` or ``cuda``.
        seconds: for all rounds; at least 7 are made, at most 60. 0, where times mean nothing: one round.
        graphs: whether steps are also replayed from a CUDA graph.
        starting: told the name of each implementation before its first call.

    Returns:
        Timings, and the error of every implementation that raised. What cannot be captured is timed eagerly, with a
        note.

    Raises:
        ContextLost: an implementation broke the device's context.
    """
    failures: dict[str, str] = {}
    notes: dict[str, str] = {}
    captured: dict[str, torch.cuda.CUDAGraph] = {}
    calls: dict[str, int] = {}  # in a graph
    pool = torch.cuda.graph_pool_handle() if graphs else None  # shared: no graph's results are read
    for name, steps in implementations.items():
        starting(name)
        try:
            for step in steps[:2] * 2:  # compilation and first-touch costs are no one's run time
                step()
            synchronize(device)
            before = time.perf_counter()
            steps[0]()
            synchronize(device)
            once = time.perf_counter() - before
        except Exception as error:
            failures[name] = explain(error, device)
            continue
        if graphs:
            repeats = max(1, round(GRAPH_SECONDS / (once * len(steps))))
            try:
                captured[name] = capture(steps, pool, repeats)
                calls[name] = repeats * len(steps)
            except Exception as error:
                notes[name] = f"no CUDA graph: {explain(error, device)}"
    running = {name: steps for name, steps in implementations.items() if name not in failures}
    wall: dict[str, list[float]] = {name: [] for name in running}
    replay: dict[str, list[float]] = {name: [] for name in captured}
    for graph in captured.values():
        graph.replay()
    synchronize(device)
    started, rounds, least = time.perf_counter(), 0, MIN_ROUNDS if seconds else 1
    while rounds < least or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds):
        rounds += 1
        for name, steps in running.items():
            before = time.perf_counter()
            for step in steps[:MAX_WALL_COPIES]:
                step()
            synchronize(device)
            wall[name].append((time.perf_counter() - before) / min(len(steps), MAX_WALL_COPIES))
        events = {
            name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in captured
        }
        if events:
            torch.cuda._sleep(QUEUE_CYCLES)
        for name, (start, end) in events.items():
            start.record()
            captured[name].replay()
            end.record()
        synchronize(device)
        for name, (start, end) in events.items():
            replay[name].append(start.elapsed_time(end) / calls[name])
    timings = {
        name: Timing(
            1e3 * median(replay[name]) if name in replay else None, 1e6 * median(wall[name]), notes.get(name, "")
        )
        for name in running
    }
    return timings, failures


def timing_rows(
    head: dict,
    steps_of: dict[str, Callable[[], list[Step]]],
    skipped: dict[str, str],
    device: str,
    seconds: float,
    graphs: bool,
    starting: Callable[[str], object],
) -> list[dict]:
    """One row for every implementation, timed by :func:`interleave`, or with the reason why it was not.

    Args:
        head: what all rows begin with.
        steps_of: name → what makes its steps; one that raises is no one else's failure.
        skipped: name → why it is not to be timed.
        device: as the following, of :func:`interleave`.
        seconds: for all rounds.
        graphs: whether steps are also replayed.
        starting: told the name of each before its steps are made and before they are called.
    """
    steps, skipped = {}, dict(skipped)
    for name, make in steps_of.items():
        if name not in skipped:
            try:
                starting(name)
                steps[name] = make()
            except Exception as error:
                skipped[name] = explain(error, device)
    timings, failures = interleave(steps, device, seconds, graphs, starting)
    skipped |= failures
    rows = []
    for name in steps_of:
        row = {**head, "implementation": name}
        if name in skipped:
            rows.append(row | {"skipped": skipped[name]})
        else:
            graph_us, wall_us, note = timings[name]
            rows.append(row | {"graph_us": graph_us, "wall_us": wall_us} | ({"note": note} if note else {}))
    return rows


def host_us(call: Callable[[], object], device: str, calls: int, rounds: int) -> float:
    """Median microseconds the host takes to issue one call, without waiting for the device."""
    for _ in range(10):
        call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        before = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - before) / calls)
    return 1e6 * median(times)


def describe(error: BaseException) -> str:
    """The error on one short line, for a row."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def explain(error: Exception, device: str) -> str:
    """:func:`describe`, where the device still answers.

    Raises:
        ContextLost: it does not.
    """
    if isinstance(error, ContextLost):
        raise error
    if device != "cpu":
        try:
            synchronize(device)
        except Exception as lost:
            raise ContextLost(describe(error)) from lost
    return describe(error)


def release(device: str) -> None:
    """Gives the memory of finished problems back, so that graph pools do not add up."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
