"""Launches of the package, executed: the one place where the machine and the package know of each other.

    with executed("sm_90"):
        y = rlrr_linear(x, weight, scale_row, scale_col, backend="triton.fused")

Triton compiles as it would for a GPU, but for the assembler, and keeps the results in its own cache.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import compile_report
from rlrr_kernels import backends, devices
from rlrr_kernels.ops.host.launch import OPTIONS, Launch, Plan
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.multi import triton_backend as multi_triton
from tests.support.ptx.faults import Fault
from tests.support.ptx.instructions.tensor_copies import TensorMap
from tests.support.ptx.machine import Machine
from tests.support.ptx.memory import GlobalMemory
from tests.support.ptx.parser import Program, parse

TARGETS = ("sm_80", "sm_90")


def by_arch(cases: Sequence[Any]) -> list[Any]:
    """``pytest.param`` with an id each, on one architecture after another; on the others the same case is slow."""
    found = []
    for i, case in enumerate(cases):
        for j, arch in enumerate(TARGETS):
            marks = case.marks if i % len(TARGETS) == j else [pytest.mark.slow]
            found.append(pytest.param(arch, *case.values, id=f"{case.id}-{arch}", marks=marks))
    return found


_THREADS = 1 << 14
"""Blocks run at once until they have as many: NumPy's cost of a call is then small beside that of its work."""


class Compiled(NamedTuple):
    """A kernel for one signature; ``arguments``: the positions of those that are no constants."""

    program: Program
    ptx: str
    shared: int
    descriptors: list[dict[str, Any]]  # Triton's own description of each
    arguments: list[int]


_compiled: dict[tuple, Compiled] = {}


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """The PTX of a launch for ``sm_80`` or ``sm_90``, parsed; each is compiled once in a process."""
    kernel, meta = launch.plan.kernel, launch.plan.meta
    specialised = signature, constants, _ = compile_report.specialised(launch)
    key = (kernel.cache_key, arch, *map(repr, (*specialised, [meta.get(name) for name in OPTIONS])))
    if key not in _compiled:
        with _without_assembler():
            found = compile_report.compile_launch(launch, arch)
        ptx, metadata = found.asm["ptx"], found.metadata
        descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        arguments = [index for index, name in enumerate(signature) if name not in constants]
        program = parse(ptx, metadata.name)
        _compiled[key] = Compiled(program, ptx, metadata.shared, descriptors, arguments)
    return _compiled[key]


@contextmanager
def _without_assembler() -> Iterator[None]:
    """Triton without ``ptxas``, which takes longer than all else; its own cache keeps such results apart."""
    version = CUDABackend.hash
    with (
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
        mock.patch.object(CUDABackend, "hash", lambda backend: f"{version(backend)}-ptx"),
    ):
        yield


def execute(launch: Launch, arch: str, seed: int | None = None, edit: Callable[[str], str] | None = None) -> None:
    """Executes a launch on tensors of the CPU.

    Args:
        launch: the launch.
        arch: ``sm_80`` or ``sm_90``.
        seed: of an adversarial order of events.
        edit: makes other PTX of the compiled text, a fault to be found.

    Raises:
        Fault: the kernel did what has no defined result on a GPU, or never ends.
    """
    compiled = compile_launch(launch, arch)
    program = parse(edit(compiled.ptx), compiled.program.name) if edit else compiled.program
    storages = [_storage(tensor) for tensor in launch.tensors if _size(tensor)]
    memory = GlobalMemory((storage.ctypes.data, storage) for storage in storages)
    parameters, maps = _parameters(compiled, launch.args, memory)
    at_once = max(1, _THREADS // program.threads)
    blocks = range(math.prod(launch.plan.grid))
    for first in blocks[::at_once]:
        running = blocks[first : first + at_once]
        Machine(program, parameters, memory, compiled.shared, launch.plan.grid, running, maps, seed).run()
    memory.write_back()


def _size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.numel() else 0


def _storage(tensor: torch.Tensor) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _address(tensor: torch.Tensor, memory: GlobalMemory) -> int:
    if not _size(tensor):
        return 0
    storage = tensor.untyped_storage().data_ptr()
    return memory.address(storage) + tensor.data_ptr() - storage


def _parameters(
    compiled: Compiled, args: Sequence[Any], memory: GlobalMemory
) -> tuple[list[int], dict[int, TensorMap]]:
    """One number for each parameter of the PTX, and the tensors that descriptors among them stand for."""
    found, maps, descriptions = [], {}, iter(compiled.descriptors)
    for value in (args[index] for index in compiled.arguments):
        if isinstance(value, torch.Tensor):
            found.append(_address(value, memory))
        elif hasattr(value, "block_shape"):
            description, handle = next(descriptions), (1 << 20) + 64 * len(maps)
            base, shape, strides = value.base, tuple(value.shape), tuple(value.strides)
            block, swizzle = tuple(description["block_size"]), description["swizzle"]
            maps[handle] = TensorMap(_address(base, memory), shape, strides, base.element_size(), block, swizzle)
            found += [handle, *shape, *strides]
        elif isinstance(value, float):
            found.append(int.from_bytes(struct.pack("<f", value), "little"))
        else:
            found.append(value)
    scratch = len(compiled.program.parameters) - len(found)
    if not 0 <= scratch <= 2:  # pointers to scratch memory, which these kernels do not use
        raise Fault(f"{compiled.program.name} has {scratch} parameters that are not known")
    return found + [0] * scratch, maps


@contextmanager
def executed(arch: str, seed: int | None = None) -> Iterator[list[Launch]]:
    """Within the block the package executes its launches on tensors of the CPU, as on a GPU of ``arch``.

    Gives a list to which they are added.
    """
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        execute(launch, arch, seed)

    with (
        mock.patch.object(Launch, "run", run),
        mock.patch.object(linear_triton, "gpu_of", return_value=devices.typical(arch)),
        mock.patch.object(multi_triton, "gpu_of", return_value=devices.typical(arch)),
        mock.patch.object(backends, "unavailable", return_value=None),
    ):
        yield launches


def changed(
    launch: Launch, folder: Path, *changes: tuple[str, str], grid: tuple[int, ...] | None = None, **meta: Any
) -> Launch:
    """The launch with another kernel, grid or constants.

    Args:
        launch: what it is like.
        folder: where the module of a changed kernel is written.
        changes: (old, new) text to replace in the module of the kernel, each old one once in it: a fault to be found.
        grid: instead of the launch's own.
        meta: instead of the constants of these names.
    """
    plan, kernel = launch.plan, launch.plan.kernel
    if changes:
        text = Path(kernel.fn.__code__.co_filename).read_text(encoding="utf-8")
        for old, new in changes:
            if text.count(old) != 1:
                raise ValueError(f"{old!r} occurs {text.count(old)} times")
            text = text.replace(old, new)
        path = folder / "changed_kernels.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, kernel.fn.__name__)
    plan = Plan(kernel, grid or plan.grid, plan.numbers, plan.meta | meta, plan.blocks)
    return Launch(plan, launch.tensors)
