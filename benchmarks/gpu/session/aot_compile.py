"""Compiles the kernels that will be measured, on the processor's other cores, before a GPU waits for them.

Processes of this module walk through the plan in the order of its units, on tensors without memory, and let Triton
compile every launch into the folder that its just-in-time compiler looks into: by that compiler's own code, so that the
keys are the same. They see no GPU. What they have not reached yet is compiled where it is needed, as always.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.common import Problem
from benchmarks.gpu.measurements.estimates import ESTIMATES
from benchmarks.gpu.plan import PRECISIONS, TOKENS, Plan, Precision, gpu_plan, problem_of
from rlrr_kernels import devices
from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.activation import triton_backward as activation_triton
from rlrr_kernels.ops.host import launch as launch_module
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.norm_rescale import triton_backend as norm_rescale_triton
from rlrr_kernels.ops.sampling.row_sample import RowSample
from rlrr_kernels.ops.tuning import tiles as tuning

SPARE_CORES = 4
"""Left to what is measured and to the system."""

Job = Callable[[], object]
WIDTHS = {"base": 768, "large": 1024, "huge": 1280}


class Driver:
    """Answers what Triton asks a GPU's driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _compile_only(plan: launch_module.Plan, *tensors: Tensor) -> None:
    """Stands for ``Plan.run``."""
    plan.kernel.run(*plan.arguments(tensors), grid=plan.grid, warmup=True, **plan.meta)


def linear_jobs(problem: Problem, precision: Precision, share: float | None = None) -> Iterator[Job]:
    """Both paths of a layer's forward and backward, and with ``share`` the scale gradients of so many of the rows."""
    t = _tensors(problem)
    given = t["weight"], t["scale_row"], t["scale_col"]

    def paths(path: str) -> None:
        with precision.applied():
            linear_triton.forward(t["x"], *given, t["bias"], True, path=path)
            linear_triton.backward(t["grad_y"], None, *given, True, (True, False, False, False), path=path)

    def scales() -> None:
        with precision.applied():
            linear_triton.backward(t["grad_y"], t["x"], *given, True, (False, True, True, True))

    def sampled() -> None:
        images = max(1, problem.rows // TOKENS)
        kept = images if problem.rows % TOKENS == 0 else 0
        drawn = max(1, round(share * (problem.rows - kept)))
        index = torch.empty(kept + drawn, dtype=torch.int64, device="meta")
        with precision.applied():
            linear_triton.backward(
                t["grad_y"], t["x"][: kept + drawn], *given, True, (False, True, True, True),
                sample=RowSample(index, kept, (problem.rows - kept) / drawn),
            )  # fmt: skip

    yield lambda: paths("one_pass")
    yield scales
    yield lambda: paths("merge")
    if share is not None:
        yield sampled


def _tensors(problem: Problem) -> dict[str, Tensor]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    m, n, k, rank, groups = problem.rows, problem.out_features, problem.in_features, problem.rank, problem.groups
    return {
        "x": empty(m, k, dtype=problem.dtype), "weight": empty(n, k, dtype=problem.weight_dtype or problem.dtype),
        "scale_row": empty(n, rank), "scale_col": empty(groups, rank, k), "bias": empty(n),
        "grad_y": empty(m, n, dtype=problem.dtype),
    }  # fmt: skip


def tuning_jobs(problem: Problem, precision: Precision, gpu: Gpu) -> Iterator[Job]:
    """The tuner's candidates, those of schedules that may hang included."""
    t = _tensors(problem)

    def candidate(kernel: str, tiles: linear_configs.Tiles) -> None:
        with precision.applied():
            for launch in tuning.launches_of(kernel, t, gpu, tiles):
                launch.run()

    for kernel in linear_configs.KERNELS:
        for tiles in tuning.candidates(kernel, gpu, problem.dtype, problem.rows, True):
            if linear_configs.fits(kernel, tiles, problem.dtype, problem.weight_dtype or problem.dtype, gpu):
                yield lambda kernel=kernel, tiles=tiles: candidate(kernel, tiles)


def model_jobs(plan: Plan, name: str, batch: int, precision: Precision) -> Iterator[Job]:
    """The layers, norms and activations of a ViT in training."""
    width = next(width for key, width in WIDTHS.items() if key in name)
    tokens = batch * (TOKENS if "patch16" in name else 257)
    for out_features, in_features, groups in ((3, 1, 3), (1, 1, 1), (4, 1, 1), (1, 4, 1)):
        problem = Problem(
            tokens, in_features * width, out_features * width, precision.dtype, True, plan.device,
            precision.weight_dtype, 1, groups,
        )  # fmt: skip
        yield from linear_jobs(problem, precision)
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


def jobs(plan: Plan, gpu: Gpu) -> list[Job]:
    """All compilations of the plan, first needed first; the same launch may be asked for more than once."""
    found: list[tuple[int, Job]] = []

    def add(tier: int, here: Iterator[Job]) -> None:
        found.extend((tier, job) for job in here)

    gated: dict[str, int] = {}
    for tier, *_, name in plan.layers:
        gated[name] = min(tier, gated.get(name, tier))
    for name, tier in gated.items():
        precision = PRECISIONS[name]
        for rows, n, k, groups, rank in plan.gate:
            problem = Problem(
                rows, k, n, precision.dtype, False, plan.device, precision.weight_dtype, rank, groups
            )  # fmt: skip
            add(tier, linear_jobs(problem, precision, 0.25))
    for tier, shape, rows, name in plan.layers:
        for share in ESTIMATES.values() if rows >= TOKENS else (None,):
            add(tier, linear_jobs(problem_of(plan, shape, rows, PRECISIONS[name]), PRECISIONS[name], share))
    for tier, problems, name in plan.tuned:
        for shape, rows in problems:
            add(tier, tuning_jobs(problem_of(plan, shape, rows, PRECISIONS[name]), PRECISIONS[name], gpu))
    for tier, name, batch, precision, _ in plan.models:
        add(tier, model_jobs(plan, name, batch, PRECISIONS[precision]))
    return [job for _, job in sorted(found, key=lambda entry: entry[0])]


def compile_part(capability: int, part: int, parts: int, plan: Plan | None = None) -> dict[str, int]:
    """Compiles every ``parts``-th job from ``part`` on; how many were done and how many failed."""
    counts = {"done": 0, "failed": 0}
    gpu = devices.typical(f"sm_{capability}")
    with (
        mock.patch.object(launch_module.Plan, "run", _compile_only),
        mock.patch.object(linear_triton, "gpu_of", return_value=gpu),
    ):
        triton.runtime.driver.set_active(Driver(capability))
        for job in jobs(plan or gpu_plan(), gpu)[part::parts]:
            try:
                job()
                counts["done"] += 1
            except Exception:  # the process that needs the kernel will say what is wrong with it
                counts["failed"] += 1
    return counts


class Ahead:
    """The processes that compile ahead; none where there is nothing to compile for."""

    def __init__(self, processes: int | None = None) -> None:
        self._processes: list[Any] = []
        if not torch.cuda.is_available() or torch.version.hip:
            return
        major, minor = torch.cuda.get_device_capability()
        count = max(1, (os.cpu_count() or 1) - SPARE_CORES) if processes is None else processes
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RLRR_TUNING": "off", "OMP_NUM_THREADS": "1"}
        for part in range(count):
            arguments = str(10 * major + minor), str(part), str(count)
            command = [sys.executable, "-m", "benchmarks.gpu.session.aot_compile", *arguments]
            self._processes.append(
                subprocess.Popen(
                    ["nice", "-n", "10", *command],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )

    def end(self) -> None:
        """Ends those that still run."""
        for process in self._processes:
            process.kill()
            process.wait()


def main() -> None:
    """One process: capability, part and number of parts are given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("capability", type=int, help="90 for sm_90")
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    options = parser.parse_args()
    print(compile_part(options.capability, options.part, options.parts))


if __name__ == "__main__":
    main()
