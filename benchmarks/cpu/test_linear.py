"""``rlrr_linear`` on the CPU against its rivals; `make bench` runs it and `benchmarks.cpu.report` draws the result.

One test is one problem. pytest-benchmark times the C++ operator; before each of its rounds every rival and the operator
take a turn, timed the same way and in an order drawn anew, so that all of them see the same machine. A short call is
made twice in its turn: ``cold_seconds`` is the first, which finds the caches full of the others' data, ``seconds`` the
second, which finds its own. Medians of these, kept and peak bytes go into the row's ``extra_info``.
"""

import random
import time
from statistics import median

import pytest
import torch

from benchmarks import common
from rlrr_kernels import backends

ROWS = (1, 16, 64, 197, 1576, 6304)
DTYPES = ("float32", "bfloat16")
THREADS = (2, 1)
SECONDS = 0.3
"""About how long the rounds of one problem take together; there are at least three."""

SHORT = 0.02
"""Seconds of the operator up to which what lies in the caches matters, and calls are made twice."""

pytestmark = pytest.mark.skipif(backends.CPP_FAILURE is not None, reason=str(backends.CPP_FAILURE))


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _problems():
    for dtype in DTYPES:
        for rows in ROWS:
            for shape in common.LAYER_SHAPES:
                for backward in (False, True):
                    for count in THREADS:
                        name = (
                            f"{dtype}-M{rows}-{shape[0]}x{shape[1]}-{'step' if backward else 'forward'}-{count}thread"
                        )
                        yield pytest.param(dtype, rows, shape, backward, count, id=name)


@pytest.mark.parametrize(("dtype", "rows", "shape", "backward", "threads"), list(_problems()), indirect=["threads"])
def test_linear(benchmark, dtype, rows, shape, backward, threads):
    problem = common.Problem(rows, *shape, getattr(torch, dtype), backward)
    names = [*(name for name in common.RIVALS if not (backward and name == "merged")), "cpp"]
    rivals = common.rivals(problem, tuple(names))
    for step in rivals.values():
        step()  # compiles, allocates
    ours = rivals["cpp"]
    started = time.perf_counter()
    ours()
    seconds = time.perf_counter() - started
    calls = 2 if seconds < SHORT else 1
    times = {name: [[] for _ in range(calls)] for name in names}  # by call of a turn

    order = random.Random(0)

    def run_all():
        order.shuffle(names)
        for name in names:
            for call in range(calls):
                before = time.perf_counter()
                rivals[name]()
                times[name][call].append(time.perf_counter() - before)

    benchmark.pedantic(ours, setup=run_all, rounds=max(3, min(100, int(SECONDS / seconds / len(rivals) / calls))))
    first, last = ({name: median(values[call]) for name, values in times.items()} for call in (0, -1))
    count_bytes = threads == max(THREADS)  # the same for every number of threads
    benchmark.extra_info.update(
        common.environment(),
        dtype=dtype,
        rows=rows,
        in_features=shape[0],
        out_features=shape[1],
        backward=backward,
        seconds=last,
        cold_seconds=first if calls > 1 else {},
        peak_bytes={name: common.peak_bytes(step) for name, step in rivals.items() if count_bytes and rows <= 1576},
        kept_bytes={
            name: common.rival_kept_bytes(problem, name)
            for name in rivals
            if count_bytes and backward and name not in ("floor", "compiled")
        },
    )
