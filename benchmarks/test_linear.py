"""``rlrr_linear`` on the CPU against its rivals; `make bench` runs it and `benchmarks.report` draws the result.

One test is one problem. pytest-benchmark times the C++ operator; between any two of its rounds every rival runs once,
so all of them see the same machine. Medians, kept and peak bytes of every rival go into the row's ``extra_info``.
"""

import time
from statistics import median

import pytest
import torch

from benchmarks import common
from rlrr_kernels import backends

ROWS = (1, 16, 64, 197, 1576, 6304)
DTYPES = ("float32", "bfloat16")

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
                    for count in (2, 1):
                        # One thread: a sample, and no minutes-long runs.
                        if count == 1 and (rows > 1576 or shape != (768, 3072)):
                            continue
                        name = (
                            f"{dtype}-M{rows}-{shape[0]}x{shape[1]}-{'step' if backward else 'forward'}-{count}thread"
                        )
                        yield pytest.param(dtype, rows, shape, backward, count, id=name)


@pytest.mark.parametrize(("dtype", "rows", "shape", "backward", "threads"), list(_problems()), indirect=["threads"])
def test_linear(benchmark, dtype, rows, shape, backward, threads):
    problem = common.Problem(rows, *shape, getattr(torch, dtype), backward)
    names = [name for name in common.RIVALS if not (backward and name == "merged")]
    steps = common.rivals(problem, (*names, "cpp"))
    ours = steps.pop("cpp")
    times = {name: [] for name in steps}
    started = time.perf_counter()
    for step in (*steps.values(), ours) * 2:
        step()
    once = (time.perf_counter() - started) / 4  # includes compilation: an upper bound
    started = time.perf_counter()
    for step in (*steps.values(), ours):
        step()
    once = min(once, time.perf_counter() - started)

    def run_rivals():
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - before)

    benchmark.pedantic(ours, setup=run_rivals, rounds=max(7, min(200, int(0.7 / once))), warmup_rounds=1)
    medians = {name: median(values) for name, values in times.items()} | {"cpp": benchmark.stats.stats.median}
    rivals = {"cpp": ours, **steps}
    benchmark.extra_info.update(
        common.environment(),
        dtype=dtype,
        rows=rows,
        in_features=shape[0],
        out_features=shape[1],
        backward=backward,
        seconds=medians,
        peak_bytes={name: common.peak_bytes(step) for name, step in rivals.items() if rows <= 1576},
        kept_bytes={
            name: common.rival_kept_bytes(problem, name)
            for name in rivals
            if backward and name not in ("floor", "compiled")
        },
    )
