"""What a call of ``rlrr_linear`` costs the host beyond ``F.linear``, in microseconds; needs no GPU.

    python -m benchmarks.host_overhead

The tensors are tiny and on the CPU. The Triton backend runs for real (checks, choice of tiles, allocation, arguments of
every launch), only ``Launch.run`` does nothing: what Triton's own launcher adds per kernel (6 to 13 µs are reported for
it; one launch forward, three backward) is measured on a GPU alone. Variants are interleaved; median and best are
printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

from rlrr_kernels import RLRRLinear, backends, rlrr_linear
from rlrr_kernels.ops.launch import Launch

CALLS = 200
ROUNDS = 60


def variants() -> dict[str, Callable[[], torch.Tensor]]:
    """The calls that are compared, each on the same problem with the same tensors trained."""
    layer = RLRRLinear(16, 16)
    x = torch.randn(4, 16, requires_grad=True)
    weight, bias = layer.weight, layer.bias + layer.shift.detach()
    bias.requires_grad_()
    scales = layer.scale_row, layer.scale_col
    return {
        "F.linear": lambda: F.linear(x, weight, bias),
        "rlrr_linear, torch": lambda: rlrr_linear(x, weight, *scales, bias, backend="torch"),
        "rlrr_linear, triton without launches": lambda: rlrr_linear(
            x, weight, *scales, bias, backend="triton.one_pass"
        ),
        "RLRRLinear, triton without launches": lambda: layer(x),
    }


def no_launch(launch: Launch) -> None:
    """Stands for ``Launch.run``; a mock would cost more than what is measured."""


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    calls = variants()
    gradient = torch.ones(4, 16)
    timed = {
        f"{name}: {what}": (call if what == "forward" else lambda call=call: call().backward(gradient))
        for name, call in calls.items()
        for what in ("forward", "forward + backward")
    }
    samples: dict[str, list[float]] = {name: [] for name in timed}
    # Pretend that the interpreter is on, so that CPU tensors are accepted; nothing is launched.
    with (
        mock.patch.object(backends, "INTERPRETING", True),
        mock.patch.object(Launch, "run", no_launch),
        backends.use_backend("triton.one_pass"),
    ):
        for _ in range(ROUNDS):
            for name, call in timed.items():
                samples[name].append(microseconds(call))
    print(f"torch {torch.__version__}, {ROUNDS} rounds of {CALLS} calls, interleaved; µs, and µs over F.linear")
    print(f"{'':58s} {'median':>16s} {'best':>16s}")
    for name, values in samples.items():
        base = samples["F.linear: " + name.split(": ")[1]]
        columns = (f"{of(values):7.1f} ({of(values) - of(base):+6.1f})" for of in (statistics.median, min))
        print(f"{name:58s}", *columns)


if __name__ == "__main__":
    main()
