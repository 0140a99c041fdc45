"""Traces calls of ``rlrr_linear`` through this package: how many functions and files they cross.

    python -m benchmarks.walks                # a table: backends, first and second call of a layout
    python -m benchmarks.walks triton         # the functions of one backend's first call, in order, indented by depth

Only Python functions of ``rlrr_kernels`` count, as ``sys.setprofile`` reports them; comprehensions are part of the
function around them. A call of another layout has run before, so that imports are not traced. The Triton backend runs
on a CUDA driver that does nothing (``fake_cuda.py``), which needs a C compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple
from unittest import mock

import torch

import rlrr_kernels
from rlrr_kernels import backends, rlrr_linear

PACKAGE = str(Path(rlrr_kernels.__file__).parent) + "/"
BACKENDS = ("torch", "cpp", "triton")
STEPS = ("first forward", "first backward", "second forward", "second backward")
_COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")


class Call(NamedTuple):
    """A function of the package that was called."""

    file: str
    name: str
    depth: int
    switch: bool
    """Whether the function of the package that was running is in another file."""


def walk(call: Callable[[], object]) -> tuple[list[Call], object]:
    """Runs ``call``; returns the package's functions in the order of their calls, and what ``call`` returned."""
    calls: list[Call] = []
    running: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name in _COMPREHENSIONS:
            return
        if event == "call":
            file = code.co_filename.removeprefix(PACKAGE)
            calls.append(Call(file, code.co_name, len(running), bool(running) and running[-1] != file))
            running.append(file)
        elif event == "return":
            running.pop()

    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return calls, result


def counts(calls: list[Call]) -> tuple[int, int, int]:
    """Calls, files, and calls that lead from one file to another."""
    return len(calls), len({call.file for call in calls}), sum(call.switch for call in calls)


def walks(backend: str) -> dict[str, list[Call]]:
    """The walks of :data:`STEPS` through ``backend``."""
    found = []
    for m, n, k in ((8, 32, 32), (24, 64, 48), (24, 64, 48)):  # the first call imports
        tensors = torch.randn(m, k), torch.randn(n, k), torch.ones(n, 1), torch.zeros(1, 1, k), torch.zeros(n)
        arguments = [tensor.requires_grad_(i != 1) for i, tensor in enumerate(tensors)]  # all train but the weight
        forward, y = walk(lambda arguments=arguments: rlrr_linear(*arguments, backend=backend))
        backward, _ = walk(lambda y=y: y.backward(torch.ones_like(y)))
        found += [forward, backward]
    return dict(zip(STEPS, found[2:], strict=True))


@contextmanager
def cpu_tensors_for(backend: str) -> Iterator[None]:
    """Lets CPU tensors take the way of ``backend``."""
    if backend != "triton" or backends.INTERPRETING:
        yield
        return
    from benchmarks.support.fake_cuda import fake_cuda

    with fake_cuda(), mock.patch.object(backends, "INTERPRETING", True):
        yield


def main(arguments: list[str]) -> None:
    """Prints the counts of every backend, or the calls of the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=BACKENDS, help="prints its calls in place of the table")
    name = parser.parse_args(arguments).backend
    if not name:
        print(f"{'':28s}{'calls':>8s}{'files':>8s}{'switches':>10s}")
    for backend in [name] if name else BACKENDS:
        try:
            with cpu_tensors_for(backend):
                found = walks(backend)
        except (OSError, ImportError, ValueError) as error:
            print(f"{backend}: {error}")
            continue
        for step, calls in found.items():
            if not name:
                number, files, switches = counts(calls)
                print(f"{f'{backend}, {step}':28s}{number:8d}{files:8d}{switches:10d}")
            elif step.startswith("first"):
                print(f"{backend}, {step}:")
                for call in calls:
                    print(f"{'  ' * (call.depth + 1)}{call.file}: {call.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
