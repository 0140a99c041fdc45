"""AOT compilation: every kernel that is measured, under the keys of the just-in-time compiler."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
from benchmarks.gpu.plan import PRECISIONS, Shape, gpu_plan
from benchmarks.gpu.session import aot_compile
from benchmarks.support.common import Problem
from benchmarks.support.fake_cuda import fake_cuda
from rlrr_kernels import backends, devices, rlrr_linear
from rlrr_kernels.ops.host import guard
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.linear.triton import kernels as linear_kernels

pytestmark = pytest.mark.skipif(backends.INTERPRETING, reason="with Triton's interpreter on, nothing compiles")

KERNELS = [value for value in vars(linear_kernels).values() if isinstance(value, triton.JITFunction)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder for compiled kernels, and no compiled kernels in memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    active = triton.runtime.driver._active
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield tmp_path
    triton.runtime.driver._active = active
    for kernel in KERNELS:
        kernel.device_caches.clear()


def compiled(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/*.cubin")}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_was_compiled_is_found_by_the_launches(cache: Path):
    problem = Problem(24, 48, 64, torch.float32, True, "cpu", None, 1, 3)
    arch = mock.patch.object(linear_triton, "gpu_of", return_value=devices.typical("sm_90"))
    with arch, mock.patch.object(Launch, "run", aot_compile._compile_only):
        triton.runtime.driver.set_active(aot_compile.Driver(90))
        for job in aot_compile.linear_jobs(problem, PRECISIONS["fp32"]):
            job()
    before = compiled(cache)
    assert len(before) >= 5  # forward, ∂x, scale gradients, their sum, the merge
    for kernel in KERNELS:
        kernel.device_caches.clear()
    t = problem.tensors()
    with fake_cuda(), arch, mock.patch.object(backends, "INTERPRETING", True):  # CPU tensors stand for a GPU's
        for path in ("triton.fused", "triton.merge"):
            y = rlrr_linear(t["x"], t["weight"], t["scale_row"], t["scale_col"], t["bias"], backend=path)
            torch.autograd.grad(y, [t["x"], t["scale_row"], t["scale_col"], t["bias"]], t["grad_y"])
        for kernel in KERNELS:
            kernel.device_caches.clear()  # unloaded by the driver that loaded them
    assert compiled(cache) == before


def test_every_job_of_the_plan_can_be_compiled(monkeypatch: pytest.MonkeyPatch):
    launched = []
    monkeypatch.setattr(aot_compile, "_compile_only", lambda launch: launched.append(launch.plan.kernel.__name__))
    monkeypatch.setattr(triton.runtime.driver, "set_active", lambda driver: None)
    monkeypatch.setattr(guard, "enabled", lambda device: True)  # as it is on a GPU
    plan = gpu_plan()
    counts = [aot_compile.compile_part(90, part, 5, plan) for part in range(5)]
    assert sum(count["failed"] for count in counts) == 0
    assert not guard.given_up()
    assert sum(count["done"] for count in counts) == len(aot_compile.jobs(plan, devices.typical("sm_90")))
    assert {name.removeprefix("_").removeprefix("rlrr_linear_") for name in launched} >= {
        "fwd_kernel", "bwd_dx_kernel", "bwd_scales_kernel", "bwd_reduce_kernel", "merge_kernel", "sum_splits_kernel",
        "bwd_sampled_scales_kernel", "norm_rescale_fwd_kernel", "norm_rescale_bwd_kernel", "activation_bwd_kernel",
    }  # fmt: skip


def test_the_first_jobs_are_those_needed_first():
    shape = Shape("it", 64, 64)
    plan = gpu_plan()._replace(
        layers=[(3, shape, 99, "bf16"), (1, shape, 16, "bf16")], tuned=[], check_cases=[], models=[]
    )  # fmt: skip
    seen = []
    with mock.patch.object(aot_compile, "linear_jobs", lambda problem, *rest: iter([lambda: seen.append(problem.m)])):
        for job in aot_compile.jobs(plan, devices.typical("sm_90")):
            job()
    assert seen == [16, 99]


def test_without_a_gpu_nothing_is_started_and_with_one_it_ends(monkeypatch: pytest.MonkeyPatch):
    assert aot_compile.AotCompile()._processes == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    started = aot_compile.AotCompile(processes=2)
    assert len(started._processes) == 2
    started.end()
    assert all(process.returncode is not None for process in started._processes)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "sizes", [(2**21 + 64, 64, 1024), (50_000_000, 16, 16), (64, 2_000_000, 64), (64, 64, 2_000_000)], ids=str
)
def test_no_launch_is_larger_than_a_gpu_allows(sizes: tuple[int, int, int], precision: str):
    m, n, k = sizes
    case = PRECISIONS[precision]
    launched = []
    problem = Problem(m, n, k, case.dtype, True, "meta")
    with (
        mock.patch.object(linear_triton, "gpu_of", return_value=devices.typical("sm_90")),
        mock.patch.object(Launch, "run", lambda launch: launched.append(launch.plan)),
    ):
        for job in aot_compile.linear_jobs(problem, case, 0.25):
            job()
    assert len({plan.kernel.__name__ for plan in launched}) >= 5
    for plan in launched:
        assert plan.grid[0] < 2**31, plan.kernel.__name__
        assert all(size < 2**16 for size in plan.grid[1:]), (plan.kernel.__name__, plan.grid)
