"""``rlrr_linear`` on the CPU against its rivals; `make bench` runs it and `benchmarks.report` draws the result.

One test is one problem. pytest-benchmark times the C++ operator; before each of its rounds every rival and the operator
run once, timed the same way and in an order drawn anew, so that all of them see the same machine and the same caches.
Medians of these, kept and peak bytes go into the row's ``extra_info``.
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
    once = len(rivals) * (time.perf_counter() - started)
    times = {name: [] for name in names}

    order = random.Random(0)

    def run_all():
        order.shuffle(names)
        for name in names:
            before = time.perf_counter()
            rivals[name]()
            times[name].append(time.perf_counter() - before)

    benchmark.pedantic(ours, setup=run_all, rounds=max(3, min(100, int(SECONDS / once))))
    medians = {name: median(values) for name, values in times.items()}
    count_bytes = threads == max(THREADS)  # the same for every number of threads
    benchmark.extra_info.update(
        common.environment(),
        dtype=dtype,
        rows=rows,
        in_features=shape[0],
        out_features=shape[1],
        backward=backward,
        seconds=medians,
        peak_bytes={name: common.peak_bytes(step) for name, step in rivals.items() if count_bytes and rows <= 1576},
        kept_bytes={
            name: common.rival_kept_bytes(problem, name)
            for name in rivals
            if count_bytes and backward and name not in ("floor", "compiled")
        },
    )
