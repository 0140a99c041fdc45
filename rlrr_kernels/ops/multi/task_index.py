"""``TaskIndex``: which adapter each sample of a batch takes, and what grouping the samples by it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.ops.host import private

BARE = -1
"""The index of a sample that takes no adapter."""

Segments = tuple[tuple[int, int, int], ...]
"""(task, first, end) of neighbours that take one adapter, in their order; together they are all samples or rows."""


class TaskRows:
    """The rows of a batch whose samples have ``per_sample`` rows each, grouped by task.

    Attributes:
        segments: (task, first row, end row), none of them empty.
        count: M, how many rows there are.
        counts: how many rows each task has, -1 included; tasks without rows are left out.
        most: the largest of these.
        cache: what a backend makes of the segments once for all layers, such as tables on a device, by its own keys.
    """

    __slots__ = ("cache", "count", "counts", "most", "segments")

    def __init__(self, segments: Segments, per_sample: int) -> None:
        segments = segments if per_sample else ()
        self.segments = tuple((task, first * per_sample, end * per_sample) for task, first, end in segments)
        self.counts: dict[int, int] = {}
        for task, first, end in self.segments:
            self.counts[task] = self.counts.get(task, 0) + end - first
        self.count, self.most = sum(self.counts.values()), max(self.counts.values(), default=0)
        self.cache: dict[Any, Any] = {}


class TaskIndex:
    """Which adapter each sample of a batch takes. Made once for a batch, it serves every layer.

    The samples that take one adapter are grouped where they are not neighbours already; all of that is worked out on
    the host.

    Args:
        index: [S], for each sample the number of its adapter, from 0, or -1 for the bare backbone: a tensor of int32
            or int64, or a sequence of integers. A tensor on a GPU is copied to the host, which waits for the GPU once.
        device: where the layers run, for which the permutation is prepared; default: that of ``index``.

    Attributes:
        index: the same as an int64 tensor on the CPU.
        segments: (task, first sample, end sample) of the grouped samples; samples that were neighbours already keep
            their places, others are sorted, the bare ones first.
        order: [S], the permutation that groups the samples; None where they are neighbours already.
        inverse: [S], the permutation back; None likewise.
        largest: the largest number in ``index``; -1 without samples.

    Raises:
        TypeError: ``index`` is neither, or has another dtype.
        ValueError: it is not one-dimensional.
        IndexError: it holds a number below -1.
        NotImplementedError: inside a ``torch.func`` transform, where tensors have no values to read.
    """

    def __init__(self, index: Tensor | Sequence[int], device: torch.device | str | None = None) -> None:
        check_transforms()
        if not isinstance(index, Tensor):
            index = _tensor(index)
        check_index(index)
        device = index.device if device is None else torch.device(device)
        self.index = index.detach().to("cpu", torch.int64, copy=True)
        tasks = self.index.tolist()
        if tasks and min(tasks) < BARE:
            sample = next(i for i, task in enumerate(tasks) if task < BARE)
            raise IndexError(f"index must hold values from -1; got {tasks[sample]} for sample {sample}")
        self.largest: int = max(tasks, default=BARE)
        self.segments = _segments(tasks)
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if len({task for task, _, _ in self.segments}) < len(self.segments):
            order = sorted(range(len(tasks)), key=tasks.__getitem__)  # stable
            self.segments = _segments([tasks[sample] for sample in order])
            self.order = torch.tensor(order)
            self.inverse = torch.empty_like(self.order)
            self.inverse[self.order] = torch.arange(len(tasks))
        self._rows: dict[tuple[int, bool], TaskRows] = {}
        self._permutations: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.permutation(device)

    def __len__(self) -> int:
        """S, the number of samples."""
        return self.index.shape[0]

    def __repr__(self) -> str:
        return f"TaskIndex({self.index.tolist()})"

    def rows(self, per_sample: int, grouped: bool = True) -> TaskRows:
        """The rows of grouped samples that have ``per_sample`` rows each.

        Not ``grouped``: the rows where they lie, the segments of one task still one after the other.
        """
        key = per_sample, grouped or self.order is None
        found = self._rows.get(key)
        if found is None:
            segments = self.segments if key[1] else tuple(sorted(_segments(self.index.tolist())))
            found = self._rows[key] = TaskRows(segments, per_sample)
        return found

    def permutation(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """``order`` and ``inverse`` on ``device``; None where the samples are grouped already."""
        if self.order is None or self.inverse is None:
            return None
        found = self._permutations.get(device)
        if found is None:
            found = self._permutations[device] = self.order.to(device), self.inverse.to(device)
        return found


def check_transforms() -> None:
    """No ``torch.func`` transform is at work."""
    if private.transforms_active():
        raise NotImplementedError(
            "rlrr_linear_multi does not work inside torch.func transforms; use rlrr_linear for each task there, or "
            "rlrr_kernels.reference.rlrr_linear_multi_reference"
        )


def check_index(index: Tensor) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless it is a one-dimensional tensor of int32 or int64."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a Tensor or a TaskIndex; got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be torch.int32 or torch.int64; got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be [S], one adapter a sample; got shape {tuple(index.shape)}")


def _tensor(index: Any) -> Tensor:
    numbers = list(index) if isinstance(index, Sequence) and not isinstance(index, str | bytes) else None
    if numbers is None or any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        given = type(index).__name__ if numbers is None else repr(index)
        raise TypeError(f"index must be a Tensor or a sequence of integers; got {given}")
    return torch.tensor(numbers, dtype=torch.int64)


def _segments(tasks: list[int]) -> Segments:
    segments: list[tuple[int, int, int]] = []
    for sample, task in enumerate(tasks):
        if segments and segments[-1][0] == task:
            segments[-1] = task, segments[-1][1], sample + 1
        else:
            segments.append((task, sample, sample + 1))
    return tuple(segments)
