"""``Plan`` and ``Launch``: a Triton kernel with its grid and arguments as a value, and the short way to start it.

Triton's own launcher binds and classifies every argument at every call, 6 to 13 µs of Python. A plan remembers the
compiled kernel instead and calls the launcher's C function with it. That is right as long as all that the just-in-time
compiler specialises on is the same: the numbers and constants are the plan's own, the dtypes are part of the key, and
pointers that are not all multiples of 16 take Triton's way, as do hooks, debugging, instrumentation, AMD devices (there
the size of a tensor counts as well) and versions of Triton whose C function is not known here. Environment variables of
Triton are read when a kernel is compiled, not at later launches.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels import backends

TL_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's name of a dtype of sums."""

_dtype = operator.attrgetter("dtype")
_address = Tensor.data_ptr
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

StartKernel = Callable[[int, Sequence[int]], None]
"""Starts one compiled kernel on a stream, given the addresses of its tensors."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; ``triton.cdiv`` takes 2 µs on the host, several times a launch."""
    return -(-a // b)


class Plan:
    """A kernel with its grid, numbers and constants: all of a launch but the tensors, its first parameters.

    Making one costs as much as a launch by Triton's way: keep it for as long as shapes and strides are the same.

    ``blocks`` are the shapes in which the kernel loads the first of its tensors by TMA: these are handed over as
    descriptors, made at every launch, since they hold the address. A descriptor reaches the kernel by value, like a
    number, so a CUDA graph keeps it as it keeps the pointers of others.
    """

    __slots__ = ("_starts", "blocks", "grid", "kernel", "meta", "numbers")

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...],
        meta: dict[str, Any],
        blocks: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.blocks = blocks
        self.kernel = kernel
        self.grid = grid
        self.numbers = numbers
        self.meta = meta
        self._starts: dict[tuple, tuple[Any, StartKernel]] = {}

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Tensor | TensorDescriptor | int | float, ...]:
        """What the kernel is given, its constants left out."""
        by_tma = [
            TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block))
            for tensor, block in zip(tensors, self.blocks, strict=False)
        ]
        return (*by_tma, *tensors[len(by_tma) :], *self.numbers)

    def run(self, *tensors: Tensor) -> None:
        """Launches on the device of the first tensor, which Triton leaves to the caller."""
        device = tensors[0].get_device()
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self.run(*tensors)
        known = self._starts.get(self._key(tensors))
        if known is not None:
            driver, start = known
            pointers = list(map(_address, tensors))
            if not (
                reduce(operator.or_, pointers) & 15
                or driver is not triton.runtime.driver.active
                or watched(self.kernel)
            ):
                return start(driver.get_current_stream(device), pointers)
        compiled = self.kernel[self.grid](*self.arguments(tensors), **self.meta)
        if self._direct_from_now_on(tensors):
            start = _make_start(self, compiled)
            if start is not None:
                start = _by_tma(start, tensors[: len(self.blocks)]) if self.blocks else start
                self._starts[self._key(tensors)] = triton.runtime.driver.active, start
        return None

    def _key(self, tensors: Sequence[Tensor]) -> tuple:
        """What a kernel depends on beside the plan, and where descriptors are made, what these do beside an address."""
        key = (tensors[0].get_device(), *map(_dtype, tensors))
        for tensor in tensors[: len(self.blocks)]:
            key += (tensor.shape, tensor.stride())
        return key

    def known_start(self, tensors: Sequence[Tensor]) -> StartKernel | None:
        """How the kernel for these tensors is started past Triton; None before it was launched, or if it cannot be."""
        known = self._starts.get(self._key(tensors))
        return known[1] if known is not None and known[0] is triton.runtime.driver.active else None

    def _direct_from_now_on(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernel that Triton just launched may be started without it the next time."""
        return (
            _make_start is not None
            and isinstance(self.kernel, triton.JITFunction)
            and triton.runtime.driver.active.get_current_target().backend == "cuda"
            and not any(tensor.data_ptr() % 16 for tensor in tensors)
            and not watched(self.kernel)
        )


def watched(*kernels: triton.JITFunction) -> bool:
    """Whether anything watches or alters launches of the kernels, so that Triton has to do them."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)  # Triton 3.5 has none
        or knobs.compilation.__dict__
        or any([kernel.pre_run_hooks for kernel in kernels])  # noqa: C419 (a generator costs twice as much)
    )


class Launch(NamedTuple):
    """One kernel launch. Built from tensors on any device, meta included, so that it can be compiled without a GPU."""

    plan: Plan
    tensors: tuple[Tensor, ...]

    @property
    def args(self) -> tuple[Tensor | TensorDescriptor | int | float, ...]:
        """What the kernel is given, its constants left out."""
        return self.plan.arguments(self.tensors)

    def run(self) -> None:
        """Launches on the device of the first tensor."""
        self.plan.run(*self.tensors)
        if (record := getattr(_thread, "record", None)) is not None:
            record.append(self)


_thread = threading.local()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Lists the launches that this thread runs within the block, and so keeps their tensors; blocks may be nested.

    Within it no call is replayed, so that none is missing.
    """
    outer = getattr(_thread, "record", None)
    _thread.record = launches = []
    try:
        yield launches
    finally:
        _thread.record = outer
        if outer is not None:
            outer += launches


def is_recording() -> bool:
    """Whether this thread is within :func:`recorded`."""
    return getattr(_thread, "record", None) is not None


def _arguments_after_tensors(plan: Plan) -> tuple:
    """Numbers, then constants in the order of the kernel's parameters: the launcher skips the latter."""
    names = plan.kernel.arg_names[-sum(name in plan.meta for name in plan.kernel.arg_names) :]
    return (*plan.numbers, *(plan.meta[name] for name in names))


def _grid(plan: Plan) -> tuple[int, int, int]:
    return (*plan.grid, 1, 1)[:3]


def _make_start_3_5(plan: Plan, compiled: triton.compiler.CompiledKernel) -> StartKernel | None:
    """For Triton 3.5 and 3.6, where every signature has a C function of its own."""
    launcher, launch = compiled.run, compiled.run.launch
    x, y, z = _grid(plan)
    function, metadata, rest = compiled.function, compiled.packed_metadata, _arguments_after_tensors(plan)
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None

    def start(stream: int, pointers: Sequence[int]) -> None:
        launch(
            x, y, z, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *pointers, *rest
        )

    return start


def _make_start_3_7(plan: Plan, compiled: triton.compiler.CompiledKernel) -> StartKernel | None:
    """For Triton 3.7 to 3.9, where one C function reads a description of the signature."""
    launcher, launch = compiled.run, compiled.run.launch
    x, y, z = _grid(plan)
    function, metadata, rest = compiled.function, compiled.packed_metadata, _arguments_after_tensors(plan)
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    kinds, signature = launcher.arg_annotations, launcher.kernel_signature
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None

    def start(stream: int, pointers: Sequence[int]) -> None:
        launch(
            x, y, z, stream, function, cooperative, dependent, metadata, None, None, None, None, None,
            kinds, signature, (*pointers, *rest),
        )  # fmt: skip

    return start


class _Descriptor:
    """As much of a ``TensorDescriptor`` of zero padding as Triton's launcher reads, of the memory at an address."""

    __slots__ = ("address", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, address: int, layout: tuple[torch.Size, tuple[int, ...]]) -> None:
        self.address, (self.shape, self.strides) = address, layout

    @property
    def base(self) -> _Descriptor:
        """What has an address."""
        return self

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def _by_tma(start: StartKernel, tensors: Sequence[Tensor]) -> StartKernel:
    """``start`` with descriptors of the first tensors, which are laid out as ``tensors`` are."""
    layouts = [(tensor.shape, tensor.stride()) for tensor in tensors]

    def start_by_tma(stream: int, pointers: Sequence[int]) -> None:
        start(stream, (*map(_Descriptor, pointers, layouts), *pointers[len(layouts) :]))

    return start_by_tma


_make_start = {
    "3.5": _make_start_3_5,
    "3.6": _make_start_3_5,
    "3.7": _make_start_3_7,
    "3.8": _make_start_3_7,
    "3.9": _make_start_3_7,
}.get(".".join(triton.__version__.split(".")[:2]))


REFUSED_BY_INTERPRETER: tuple[torch.dtype, ...] = (torch.bfloat16,)
"""What Triton's interpreter computes wrongly: it works on bfloat16's raw bits."""


def check_interpreter(*dtypes: torch.dtype) -> None:
    """Refuses bfloat16 under Triton's interpreter.

    Raises:
        ValueError: a dtype is bfloat16 and the interpreter is on.
    """
    if backends.INTERPRETING and not set(REFUSED_BY_INTERPRETER).isdisjoint(dtypes):
        raise ValueError(
            "a tensor is bfloat16, which Triton's interpreter computes wrongly; use float32 or float16 "
            "under TRITON_INTERPRET=1, or backend 'torch'"
        )
