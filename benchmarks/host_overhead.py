"""What a call of ``rlrr_linear`` costs the host beyond ``F.linear``, in microseconds; needs a C compiler but no GPU.

    python -m benchmarks.host_overhead

The tensors are tiny and on the CPU; they stand for a GPU's. The Triton backend runs for real, kernels compiled for
sm_90 and Triton's launcher included, on a CUDA driver that does nothing (``fake_cuda.py``): what is missing
is the driver's own work, one call a launch, which ``F.linear`` pays on a GPU as well. "by Triton" takes Triton's own
way to its launcher instead of ours. Where PEFT is installed, its layers are rows too: like F.linear's, their time holds
the tiny operations themselves. Variants are interleaved; median and best are printed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
import triton

from benchmarks.support.baselines import peft_config, peft_module, peft_reason
from benchmarks.support.fake_cuda import fake_cuda
from rlrr_kernels import RLRRLinear, backends, rlrr_linear
from rlrr_kernels.ops.host import launch

CALLS = 200
ROUNDS = 60
BY_TRITON = "rlrr_linear, triton, launched by Triton"


def variants() -> dict[str, Callable[[], torch.Tensor]]:
    """The calls that are compared, each on the same problem with the same tensors trained."""
    layer = RLRRLinear(16, 16)
    x = torch.randn(4, 16, requires_grad=True)
    weight, bias = layer.weight, layer.bias + layer.shift.detach()
    bias.requires_grad_()
    scales = layer.scale_row, layer.scale_col
    ours = functools.partial(rlrr_linear, x, weight, *scales, bias, backend="triton.fused")
    calls = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "rlrr_linear, torch": lambda: rlrr_linear(x, weight, *scales, bias, backend="torch"),
        "rlrr_linear, triton": ours,
        BY_TRITON: ours,
        "RLRRLinear, triton": lambda: layer(x),
    }
    if (peft := peft_module()) is not None:
        for method, label in (("lora", "LoRA r=8"), ("hira", "HiRA r=1")):
            if peft_reason(method) is None:
                model = torch.nn.Sequential(torch.nn.Linear(16, 16))
                adapted = peft.get_peft_model(model, peft_config(method, "0")).base_model.model[0]
                calls[f"PEFT {label}"] = functools.partial(adapted, x)
    return calls


def by_triton() -> AbstractContextManager:
    """Within it Triton's own launcher starts every kernel, as it does where launches are watched."""
    return mock.patch.object(launch, "watched", _always)


def _always(*kernels: object) -> bool:
    return True


def microseconds(call: Callable[[], object]) -> float:
    """The mean of a few hundred calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    calls = variants()
    gradient = torch.ones(4, 16)
    timed: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        timed[f"{name}: forward under no_grad"] = torch.no_grad()(call)
        timed[f"{name}: forward"] = call
        timed[f"{name}: forward + backward"] = lambda call=call: call().backward(gradient)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    # Pretend that the interpreter is on, so that CPU tensors are accepted.
    with fake_cuda(), mock.patch.object(backends, "INTERPRETING", True), backends.use_backend("triton.fused"):
        for _ in range(ROUNDS):
            for name, call in timed.items():
                slow = by_triton() if name.startswith(BY_TRITON) else nullcontext()
                with slow:
                    samples[name].append(microseconds(call))
    print(f"torch {torch.__version__}, triton {triton.__version__}, {ROUNDS} rounds of {CALLS} calls, interleaved")
    print(f"{'µs, and µs over F.linear':60s} {'median':>16s} {'best':>16s}")
    for name, values in samples.items():
        base = samples["F.linear: " + name.split(": ")[1]]
        columns = (f"{of(values):7.1f} ({of(values) - of(base):+6.1f})" for of in (statistics.median, min))
        print(f"{name:60s}", *columns)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
