"""``Replay``: the kernel launches of one call, started again for other tensors of the same layout.

What a call does before its kernels start, the choice of path and tiles, plans and views, depends on shapes, strides and
dtypes alone. A replay keeps the outcome: compiled kernels and, of each tensor that one takes, its place in the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import triton
from torch import Tensor

from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.host import launch as launching
from rlrr_kernels.ops.host.launch import Launch, StartKernel
from rlrr_kernels.ops.tuning import store as tuned_tiles

_ALIGNMENT = 256
"""Bytes, between the buffers of a call's scratch memory."""

_address = Tensor.data_ptr


class Replay:
    """Starts kernels that ran before, past all that chose them and built their launches."""

    __slots__ = ("_changes", "_device", "_driver", "_kernels", "_offsets", "_precision", "_scratch", "_steps")

    def __init__(self, launches: Sequence[Launch], positions: dict[int, int], starts: Sequence[StartKernel]) -> None:
        """``positions`` of the call's tensors, by address; all others are scratch, which the call made for itself."""
        positions, self._offsets, self._scratch = dict(positions), [], 0
        self._steps: list[tuple[StartKernel, Callable]] = []
        for launch, start in zip(launches, starts, strict=True):
            for tensor in launch.tensors:
                if tensor.data_ptr() not in positions:
                    positions[tensor.data_ptr()] = len(positions)
                    self._offsets.append(self._scratch)
                    self._scratch += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            taken = operator.itemgetter(*(positions[tensor.data_ptr()] for tensor in launch.tensors))
            self._steps.append((start, taken))
        first = launches[0].tensors[0]
        self._device, self._driver, self._changes = (
            first.get_device(),
            triton.runtime.driver.active,
            tuned_tiles.changes,
        )
        self._precision = matmul_precision() if first.dtype == torch.float32 else None
        self._kernels = tuple({launch.plan.kernel for launch in launches})

    @classmethod
    def of(cls, launches: Sequence[Launch], tensors: Sequence[Tensor]) -> Replay | None:
        """A replay of ``launches``, which a call with ``tensors``, inputs and results, has just run.

        None where there can be none: a kernel that Triton's launcher must start, a tensor of which a kernel was given a
        copy or which no kernel took (another library had a part in the call), two that are one, or an empty one.
        """
        positions = {tensor.data_ptr(): position for position, tensor in enumerate(tensors)}
        taken = {tensor.data_ptr() for launch in launches for tensor in launch.tensors}
        starts = [launch.plan.known_start(launch.tensors) for launch in launches]
        if len(positions) < len(tensors) or not taken.issuperset(positions) or 0 in taken or None in starts:
            return None
        return cls(launches, positions, starts)

    def outdated(self) -> bool:
        """Whether a call would choose anew: other tiles are in force, another precision of fp32 products, or driver."""
        return (
            self._changes != tuned_tiles.changes
            or self._driver is not triton.runtime.driver.active
            or (self._precision is not None and self._precision != matmul_precision())
        )

    def ready(self) -> bool:
        """Whether it may run: it is not outdated, nothing watches launches, and its device is current."""
        device = self._device
        return not (
            self.outdated()
            or launching.watched(*self._kernels)
            or (device >= 0 and device != launching.current_device())
        )

    def run(self, tensors: Sequence[Tensor]) -> bool:
        """Starts the kernels for ``tensors`` of the recorded layout; False, and none of them, where one is not aligned.

        It must be :meth:`ready`.
        """
        pointers = list(map(_address, tensors))
        if self._scratch:
            scratch = tensors[0].new_empty(self._scratch, dtype=torch.uint8)  # kept until the kernels are in the stream
            base = scratch.data_ptr()
            pointers += [base + offset for offset in self._offsets]
        if reduce(operator.or_, pointers) & 15:
            return False
        stream = self._driver.get_current_stream(self._device)
        for start, taken in self._steps:
            start(stream, taken(pointers))
        return True
