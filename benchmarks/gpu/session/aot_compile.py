"""Compiles the kernels that will be measured, on the processor's other cores, before a GPU waits for them.

Processes of this module walk through the plan in the order of its units, on tensors without memory, and let Triton
compile every launch into the folder that its just-in-time compiler looks into: by that compiler's own code, so that the
keys are the same. They see no GPU. What they have not reached yet is compiled where it is needed, as always.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Precision, RunPlan, Shape, gpu_plan, vit_layers
from benchmarks.support.common import Problem
from benchmarks.support.fake_cuda import Driver
from rlrr_kernels import devices
from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.activation import triton_backward as activation_triton
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.host import guard
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.norm_rescale import triton_backend as norm_rescale_triton
from rlrr_kernels.ops.sampling.row_sample import RowSample
from rlrr_kernels.ops.tuning import tiles as tuning

SPARE_CORES = 4
"""Left to what is measured and to the system."""

Job = Callable[[], object]
WIDTHS = {"base": 768, "large": 1024, "huge": 1280}


def _compile_only(launch: Launch) -> None:
    """Stands for ``Launch.run``."""
    launch.plan.kernel.run(*launch.args, grid=launch.plan.grid, warmup=True, **launch.plan.meta)


def linear_jobs(problem: Problem, precision: Precision, share: float | None = None) -> Iterator[Job]:
    """Both paths of a layer's forward and backward, and with ``share`` the scale gradients of so many of the rows."""
    t = problem.empty("meta")
    given = t["weight"], t["scale_row"], t["scale_col"]

    def paths(path: str) -> None:
        linear_triton.forward(t["x"], *given, t["bias"], True, path=path)
        linear_triton.backward(t["grad_y"], None, *given, True, (True, False, False, False), path=path)

    def scales(x: Tensor, **options: RowSample) -> None:
        linear_triton.backward(t["grad_y"], x, *given, True, (False, True, True, True), **options)

    jobs = [lambda: paths("fused"), lambda: scales(t["x"]), lambda: paths("merge")]
    if share is not None:
        images = max(1, problem.m // TOKENS)
        kept = images if problem.m % TOKENS == 0 else 0
        drawn = max(1, round(share * (problem.m - kept)))
        index = torch.empty(kept + drawn, dtype=torch.int64, device="meta")
        sample = RowSample(index, kept, (problem.m - kept) / drawn)
        jobs.append(lambda: scales(t["x"][: kept + drawn], sample=sample))
    return (precision.applied()(job) for job in jobs)


def tuning_jobs(problem: Problem, precision: Precision, gpu: Gpu) -> Iterator[Job]:
    """The tuner's candidates, experimental ones included."""
    t = problem.empty("meta")

    def candidate(kernel: str, tiles: configs.Tiles) -> None:
        for launch in tuning.launches_of(kernel, t, gpu, tiles):
            launch.run()

    for kernel in configs.KERNELS:
        for tiles in tuning.candidates(kernel, gpu, problem.dtype, problem.m, True):
            if configs.fits(kernel, tiles, problem.dtype, problem.weight_dtype or problem.dtype, gpu):
                yield precision.applied()(partial(candidate, kernel, tiles))


def model_jobs(plan: RunPlan, name: str, batch: int, precision: Precision) -> Iterator[Job]:
    """The layers, norms and activations of a ViT in training."""
    width = next(width for key, width in WIDTHS.items() if key in name)
    tokens = batch * (TOKENS if "patch16" in name else 257)
    for shape in vit_layers("", width):
        shape = shape._replace(groups=3 if shape.n == 3 * width else 1)
        yield from linear_jobs(plan.problem(tokens, shape, precision), precision)
    x = torch.empty(tokens, width, dtype=precision.weight_dtype, device="meta")
    vectors = [torch.empty(width, dtype=precision.weight_dtype, device="meta") for _ in range(2)]
    trained = [torch.empty(width, device="meta") for _ in range(2)]

    def norm() -> None:
        _, mean, rstd = norm_rescale_triton.forward(x, *vectors, *trained, 1e-6, x.dtype)
        norm_rescale_triton.backward(x, x, *vectors, trained[0], torch.float32, mean, rstd, (True, True, True))

    def activation() -> None:
        h = torch.empty(tokens, 4 * width, dtype=precision.dtype, device="meta")
        for need_value in (True, False):
            activation_triton.backward(h, h, "gelu", need_value)

    yield norm
    yield activation


def jobs(plan: RunPlan, gpu: Gpu) -> list[Job]:
    """All compilations of the plan, first needed first; the same launch may be asked for more than once."""
    found: list[tuple[int, Job]] = []

    def add(tier: int, here: Iterator[Job]) -> None:
        found.extend((tier, job) for job in here)

    first: dict[str, int] = {}
    for tier, *_, name in plan.layers:
        first[name] = min(tier, first.get(name, tier))
    for name, tier in first.items():
        for m, n, k, groups, rank in plan.check_cases:
            problem = plan.problem(m, Shape("", n, k, groups, rank), PRECISIONS[name])
            add(tier, linear_jobs(problem, PRECISIONS[name], 0.25))
    for tier, shape, m, name in plan.layers:
        for share in ESTIMATES.values() if m >= TOKENS else (None,):
            add(tier, linear_jobs(plan.problem(m, shape, PRECISIONS[name]), PRECISIONS[name], share))
    for tier, problems, name in plan.tuned:
        for shape, m in problems:
            add(tier, tuning_jobs(plan.problem(m, shape, PRECISIONS[name]), PRECISIONS[name], gpu))
    for tier, name, batch, precision, _ in plan.models:
        add(tier, model_jobs(plan, name, batch, PRECISIONS[precision]))
    return [job for _, job in sorted(found, key=lambda entry: entry[0])]


def compile_part(capability: int, part: int, parts: int, plan: RunPlan | None = None) -> dict[str, int]:
    """Compiles every ``parts``-th job from ``part`` on; how many were done and how many failed."""
    counts = {"done": 0, "failed": 0}
    gpu = devices.typical(f"sm_{capability}")
    with (
        mock.patch.object(Launch, "run", _compile_only),
        mock.patch.object(linear_triton, "gpu_of", return_value=gpu),
        mock.patch.object(guard, "enabled", return_value=False),  # there are no results to look at
    ):
        triton.runtime.driver.set_active(Driver(capability))
        for job in jobs(plan or gpu_plan(), gpu)[part::parts]:
            try:
                job()
                counts["done"] += 1
            except Exception:  # the process that needs the kernel will say what is wrong with it
                counts["failed"] += 1
    return counts


class AotCompile:
    """The processes that compile; none where there is nothing to compile for."""

    def __init__(self, processes: int | None = None) -> None:
        self._processes: list[subprocess.Popen] = []
        if not torch.cuda.is_available() or torch.version.hip:
            return
        major, minor = torch.cuda.get_device_capability()
        count = max(1, (os.cpu_count() or 1) - SPARE_CORES) if processes is None else processes
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RLRR_TUNING": "off", "OMP_NUM_THREADS": "1"}
        command = ["nice", "-n", "10", sys.executable, "-m", "benchmarks.gpu.session.aot_compile"]
        for part in range(count):
            numbers = [str(number) for number in (10 * major + minor, part, count)]
            output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._processes.append(subprocess.Popen(command + numbers, env=environment, **output))

    def end(self) -> None:
        """Ends those that still run."""
        for process in self._processes:
            process.kill()
            process.wait()


if __name__ == "__main__":  # capability (90 for sm_90), part, number of parts
    print(compile_part(*map(int, sys.argv[1:4])))
