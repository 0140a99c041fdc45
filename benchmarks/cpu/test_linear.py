"""``rlrr_linear`` on the CPU against its baselines; `make bench` runs it, `benchmarks.cpu.report` reports the result.

One test is one problem. pytest-benchmark times the C++ operator; before each of its rounds every implementation takes a
turn, timed the same way and in an order drawn anew, so that all of them see the same machine. A short call is made
twice in its turn: the first ("cold") finds the caches full of the others' data, the second its own. ``extra_info`` is
the row of the report.
"""

import random
import time
from statistics import median

import pytest
import torch

from benchmarks.cpu.report import BASELINES, TIMES
from benchmarks.support import common
from rlrr_kernels import backends

M = (1, 16, 64, 197, 1576, 6304)
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
        for m in M:
            for n, k in common.LAYER_SHAPES:
                for backward in (False, True):
                    for count in THREADS:
                        name = f"{dtype}-M{m}-{k}x{n}-{'step' if backward else 'forward'}-{count}thread"
                        yield pytest.param(dtype, m, n, k, backward, count, id=name)


@pytest.mark.parametrize(("dtype", "m", "n", "k", "backward", "threads"), list(_problems()), indirect=["threads"])
def test_linear(benchmark, dtype, m, n, k, backward, threads):
    problem = common.Problem(m, n, k, getattr(torch, dtype), backward)
    names = [*(name for name in BASELINES if not (backward and name == "merged")), "cpp"]
    steps = common.steps(problem, tuple(names))
    for step in steps.values():
        step()  # compiles, allocates
    ours = steps["cpp"]
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
                steps[name]()
                times[name][call].append(time.perf_counter() - before)

    benchmark.pedantic(ours, setup=run_all, rounds=max(3, min(100, int(SECONDS / seconds / len(steps) / calls))))
    first, last = ({name: 1e6 * median(values[call]) for name, values in times.items()} for call in (0, -1))
    row = {"dtype": dtype, "threads": threads, "backward": backward, "M": m, "N": n, "K": k}
    row |= {name: last[name] for name in last if name in TIMES}
    if calls > 1:
        row |= {f"cold {name}": first[name] for name in ("cpp", "reference")}
    if threads == max(THREADS):  # bytes are the same for every number of threads
        for name in ("cpp", "reference"):
            if m <= 1576:
                row[f"peak {name}"] = common.peak_bytes(steps[name])
            if backward:
                row[f"kept {name}"] = common.layer_kept_bytes(problem, name)
    here = common.environment()
    benchmark.extra_info.update(row, **{"cpu": here["cpu"], "torch version": here["torch"], "commit": here["commit"]})
