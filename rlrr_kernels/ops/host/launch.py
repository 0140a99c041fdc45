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
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels import backends
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.private import StartKernel

TL_ACCUMULATE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), tl.float32),
    torch.float64: tl.float64,
}
"""By dtype, Triton's name of what :func:`rlrr_kernels.ops.dtypes.accumulate_dtype` says of it."""

LAUNCH_VARIABLE = "RLRR_LAUNCH"
"""The one switch: "direct" (default), or "triton" for Triton's own launcher always, and no replays."""

REFUSED_BY_INTERPRETER = frozenset((torch.bfloat16,))
"""What Triton's interpreter computes wrongly: it works on bfloat16's raw bits."""

_dtype = operator.attrgetter("dtype")
_address = Tensor.data_ptr
_make_start = private.start_maker(triton.__version__)
watched = private.watcher()
current_device = private.current_device
if backends.INTERPRETING:
    private.mend_interpreter()

direct: bool | None = None
"""Whether kernels are started past Triton's launcher; None until :func:`direct_allowed` has asked the environment."""


def direct_allowed() -> bool:
    """Whether kernels may be started past Triton's launcher, and calls be replayed.

    Raises:
        ValueError: ``RLRR_LAUNCH`` is neither "direct" nor "triton".
    """
    global direct
    if direct is None:
        value = os.environ.get(LAUNCH_VARIABLE, "direct").lower()
        if value not in ("direct", "triton"):
            raise ValueError(f"environment {LAUNCH_VARIABLE} must be direct or triton; got {value!r}")
        direct = value == "direct"
    return direct


def give_up_direct(reason: str) -> None:
    """Leaves every launch of this process to Triton's launcher from now on, with one warning."""
    global direct
    if direct_allowed():
        direct = False
        warnings.warn(
            f"kernels are started by Triton's own launcher from now on, which costs the host more: {reason}. The "
            f"results are not affected. Please report it with the version of Triton, {triton.__version__}; "
            f"{LAUNCH_VARIABLE}=triton avoids the attempt",
            stacklevel=2,
        )


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""What of a plan's ``meta`` is for the compiler; the rest are the kernel's constants."""


class Plan:
    """A kernel with its grid, numbers and constants: all of a launch but the tensors, its first parameters.

    Making one costs as much as a launch by Triton's way: keep it for as long as shapes and strides are the same.

    ``blocks`` are the shapes in which the kernel loads the first of its tensors by TMA: these are handed over as
    descriptors, made at every launch, since they hold the address. A descriptor reaches the kernel by value, like a
    number, so a CUDA graph keeps it as it keeps the pointers of others.
    """

    __slots__ = ("blocks", "compiled", "grid", "kernel", "meta", "numbers", "starts", "verdicts")

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
        self.meta = meta | {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not said: 3.10's default is False
        self.compiled: Any = None  # what Triton's launcher last ran; None from its interpreter
        # By Launch.key: whether the kernel may serve (rlrr_kernels.ops.host.guard), and how it is started past Triton,
        # with the driver for which that holds; without a start the next launch is done by Triton.
        self.verdicts: dict[tuple, bool] = {}
        self.starts: dict[tuple, tuple[Any, StartKernel]] = {}


class Launch(NamedTuple):
    """One kernel launch. Built from tensors on any device, meta included, so that it can be compiled without a GPU."""

    plan: Plan
    tensors: tuple[Tensor, ...]

    @property
    def args(self) -> tuple[Tensor | TensorDescriptor | int | float, ...]:
        """What the kernel is given, its constants left out."""
        by_tma = [
            TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block))
            for tensor, block in zip(self.tensors, self.plan.blocks, strict=False)
        ]
        return (*by_tma, *self.tensors[len(by_tma) :], *self.plan.numbers)

    @property
    def key(self) -> tuple:
        """What a kernel depends on beside the plan, and where descriptors are made, what these do beside an address."""
        key = (self.tensors[0].get_device(), *map(_dtype, self.tensors))
        for tensor in self.tensors[: len(self.plan.blocks)]:
            key += (tensor.shape, tensor.stride())
        return key

    @property
    def known_start(self) -> StartKernel | None:
        """How the kernel is started past Triton; None before it was launched, or if it cannot be."""
        known = self.plan.starts.get(self.key) if direct else None
        return known[1] if known is not None and known[0] is triton.runtime.driver.active else None

    def run(self) -> None:
        """Launches on the device of the first tensor, which Triton leaves to the caller.

        Raises:
            ValueError: a tensor is bfloat16, which Triton's interpreter, that is on, computes wrongly.
        """
        plan, tensors = self
        device = tensors[0].get_device()
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self.run()
        if backends.INTERPRETING and not REFUSED_BY_INTERPRETER.isdisjoint(map(_dtype, tensors)):
            raise ValueError(
                "a tensor is bfloat16, which Triton's interpreter computes wrongly; use float32 or float16 "
                "under TRITON_INTERPRET=1, or backend 'torch'"
            )
        key, started, failure = self.key, False, None
        known = plan.starts.get(key)
        if known is not None and direct_allowed():
            driver, start = known
            pointers = list(map(_address, tensors))
            if not (
                reduce(operator.or_, pointers) & 15
                or driver is not triton.runtime.driver.active
                or watched(plan.kernel)
            ):
                try:
                    start(driver.get_current_stream(device), pointers)
                    started = True
                except Exception as error:  # a launcher that is not what its version says; a driver's error comes again
                    failure = error
        if not started:
            plan.compiled = plan.kernel[plan.grid](*self.args, **plan.meta)
            if failure is not None:
                give_up_direct(f"a start past it failed with {type(failure).__name__}: {failure}")
            else:
                self._keep_start(key)
        if thread.record is not None:
            thread.record.append(self)
        return None

    def _keep_start(self, key: tuple) -> None:
        """Starts the kernel that Triton just launched without it from now on, where that can be done."""
        plan, tensors = self
        if (
            not direct_allowed()
            or _make_start is None
            or not isinstance(plan.kernel, triton.JITFunction)
            or triton.runtime.driver.active.get_current_target().backend != "cuda"
            or any(tensor.data_ptr() % 16 for tensor in tensors)
            or watched(plan.kernel)
        ):
            return None
        try:
            start = _make_start(plan, plan.compiled)
        except Exception as error:
            return give_up_direct(f"a compiled kernel is not as expected: {type(error).__name__}: {error}")
        if start is not None:
            start = _by_tma(start, tensors[: len(plan.blocks)]) if plan.blocks else start
            plan.starts[key] = triton.runtime.driver.active, start
        return None


class _Thread(threading.local):
    record: list[Launch] | None = None
    """The launches that this thread has run within :func:`recorded`; None outside."""


thread = _Thread()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Lists the launches that this thread runs within the block, and so keeps their tensors; blocks may be nested.

    Within it no call is replayed, so that none is missing.
    """
    outer = thread.record
    thread.record = launches = []
    try:
        yield launches
    finally:
        thread.record = outer
        if outer is not None:
            outer += launches


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
