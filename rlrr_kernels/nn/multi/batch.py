"""``TaskBatch``: which samples of a batch belong to which task, and the tensors of these tasks, stacked."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.multi.task_index import TaskIndex


class Form:
    """What adapters must have in common to be stacked: names and shapes of their vectors, and the formula.

    Equal to itself alone: whoever makes tasks shares one between those that are alike.

    Args:
        shapes: (name, shape) of each vector, by state-dict name, in the order of a flat buffer.
        dtype: of the vectors.
        heads: names of the modules of which a task has its own; their shapes may differ between tasks.
        residual: whether the 1 of 1 + s_r s_c is there.
        conv_layout: as in :class:`rlrr_kernels.RLRRConv2d`.

    Attributes:
        modules: names of the modules that these tasks change.
        places: name of a vector → offset in the flat buffer, number of elements, shape.
    """

    def __init__(
        self,
        shapes: tuple[tuple[str, tuple[int, ...]], ...],
        dtype: torch.dtype,
        heads: tuple[str, ...],
        residual: bool,
        conv_layout: str,
    ) -> None:
        self.shapes, self.dtype, self.heads = shapes, dtype, heads
        self.residual, self.conv_layout = residual, conv_layout
        self.modules = frozenset([*(name.rpartition(".")[0] for name, _ in shapes), *heads])
        self.places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        offset = 0
        for name, shape in shapes:
            self.places[name] = offset, math.prod(shape), shape
            offset += math.prod(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskTensors:
    """The tensors of one task; never written once it is made, but by the optimizer that trains them.

    Attributes:
        form: what is in ``vectors``.
        vectors: scales, shifts and SSF: one flat buffer in the order of ``form.shapes``, or, while they are trained,
            name → parameter.
        heads: module name → the task's own module in its place.
    """

    form: Form
    vectors: Tensor | Mapping[str, Tensor]
    heads: Mapping[str, nn.Module]

    def named_vectors(self) -> dict[str, Tensor]:
        """The vectors by state-dict name."""
        if not isinstance(self.vectors, Tensor):
            return dict(self.vectors)
        return {name: _vector(self.vectors, place) for name, place in self.form.places.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = list(self.named_vectors().values())
        for head in self.heads.values():
            tensors += [*head.parameters(), *head.buffers()]
        return sum(tensor.nbytes for tensor in tensors)


class TaskGroup:
    """Adjacent samples of a batch whose tasks have one :class:`Form`; adjacent by task, too.

    Attributes:
        form: of these tasks. tasks: the tasks, each once.
        first, end: the samples, in the sorted batch.
        segments: (task, first, end) for each task, in samples of the group.
        index: of the samples, for :func:`rlrr_kernels.rlrr_linear_multi`.
    """

    def __init__(self, first: int, counted: Mapping[TaskTensors, int]) -> None:
        self.tasks = list(counted)
        self.form = self.tasks[0].form
        self.first, self.end = first, first + sum(counted.values())
        self.segments: list[tuple[int, int, int]] = []
        start = 0
        for task, count in enumerate(counted.values()):
            self.segments.append((task, start, start + count))
            start += count
        self.index = TaskIndex([task for task, start, end in self.segments for _ in range(end - start)])
        self._flat: Tensor | None = None
        self._of_sample: Tensor | None = None

    def stacked(self, name: str) -> Tensor | None:
        """The vectors called ``name`` of all tasks, [T, ...]; None where their form has none."""
        place = self.form.places.get(name)
        if place is None:
            return None
        if any(not isinstance(task.vectors, Tensor) for task in self.tasks):
            return torch.stack([
                _vector(task.vectors, place) if isinstance(task.vectors, Tensor) else task.vectors[name]
                for task in self.tasks
            ])  # fmt: skip
        if self._flat is None:
            buffers = [task.vectors for task in self.tasks if isinstance(task.vectors, Tensor)]
            self._flat = buffers[0][None] if len(buffers) == 1 else torch.stack(buffers)
        offset, size, shape = place
        return self._flat[:, offset : offset + size].unflatten(1, shape)

    def by_sample(self, values: Tensor) -> Tensor:
        """``values`` [T, ...] of the tasks as [S, ...] of the samples."""
        if len(self.tasks) == 1:
            return values
        if self._of_sample is None or self._of_sample.device != values.device:
            self._of_sample = self.index.index.to(values.device)
        return values.index_select(0, self._of_sample)


def _vector(flat: Tensor, place: tuple[int, int, tuple[int, ...]]) -> Tensor:
    offset, size, shape = place
    return flat[offset : offset + size].view(shape)


_WITHOUT_SAMPLES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class TaskBatch:
    """The samples of a batch, sorted so that each task's are adjacent: the bare backbone's first, then form by form.

    Args:
        tasks: of each sample; None: the bare backbone.

    Attributes:
        samples: S.
        sorted: whether the model runs on sorted samples: :meth:`enter` was called and :meth:`leave` not yet.
        widths: what a head of tasks with other numbers of classes gave, by sample in the order of the batch; empty
            until it has run.
    """

    def __init__(self, tasks: Sequence[TaskTensors | None]) -> None:
        self.samples = len(tasks)
        groups: dict[Form, dict[TaskTensors, int]] = {}
        for task in tasks:
            if task is not None:
                counted = groups.setdefault(task.form, {})
                counted[task] = counted.get(task, 0) + 1
        ranks = {id(task): rank for rank, task in enumerate(t for counted in groups.values() for t in counted)}
        keys = [-1 if task is None else ranks[id(task)] for task in tasks]
        order = sorted(range(self.samples), key=keys.__getitem__)
        self._order = None if order == list(range(self.samples)) else torch.tensor(order)
        self._permutations: dict[torch.device, tuple[Tensor, Tensor]] = {}
        first = keys.count(-1)
        self.bare = first
        self.groups: list[TaskGroup] = []
        for counted in groups.values():
            self.groups.append(TaskGroup(first, counted))
            first = self.groups[-1].end
        self.sorted = False
        self._whole = self._in_parts = False
        self._widths: list[int] | None = None

    @property
    def widths(self) -> list[int]:
        if self._widths is None or self._order is None:
            return self._widths or []
        widths = [0] * self.samples
        for place, sample in enumerate(self._order.tolist()):
            widths[sample] = self._widths[place]
        return widths

    @widths.setter
    def widths(self, widths: list[int]) -> None:
        self._widths = widths

    def _permutation(self, device: torch.device, back: bool) -> Tensor | None:
        if self._order is None:
            return None
        if device not in self._permutations:
            self._permutations[device] = self._order.to(device), self._order.argsort().to(device)
        return self._permutations[device][back]

    def permuted(self, tensor: Tensor, back: bool = False) -> Tensor:
        """``tensor`` [S ..., ...], sample by sample in sorted order, or ``back`` in the batch's own."""
        order = self._permutation(tensor.device, back)
        if order is None:
            return tensor
        if tensor.shape[0] == self.samples:
            return tensor.index_select(0, order)
        return tensor.unflatten(0, (self.samples, -1)).index_select(0, order).flatten(0, 1)

    def enter(self, inputs: Any) -> Any:
        """``inputs`` of the model, whatever holds the tensors, with those of S samples sorted.

        Raises:
            ValueError: none has S samples.
            TypeError: there is an object that may hold tensors of samples and that PyTorch's pytree does not know.
        """
        shapes: list[list[int]] = []

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                shapes.append(list(value.shape))
            return self._moved_leaf(value, back=False)

        inputs = private.tree_map(moved, inputs)
        if not any(shape[:1] == [self.samples] for shape in shapes):
            raise ValueError(
                f"the model must get as many samples as tasks were named, {self.samples}; got tensors of {shapes}"
            )
        self.sorted = self._whole = True
        return inputs

    def is_sorted(self) -> bool:
        """Whether a module that runs now gets its samples sorted.

        They are while the model runs, and while a backward computes again what a checkpoint inside the model did not
        keep; else the module is called by itself.

        Raises:
            RuntimeError: in such a backward, where both happened before.
        """
        if self.sorted or self._order is None:
            return True
        if torch.compiler.is_compiling() or private.backward_number() < 0:
            self._in_parts = True
        elif self._whole and self._in_parts:
            raise RuntimeError(
                "of a model that was called as a whole and in parts for the same tasks, a backward cannot compute "
                "checkpointed layers again: enter bank.tasks() once for each"
            )
        return not self._in_parts

    def leave(self, outputs: Any) -> Any:
        """``outputs`` of the model with the samples in the order of the batch.

        Raises:
            TypeError: as for :meth:`enter`.
        """
        self.sorted = False
        return private.tree_map(lambda value: self._moved_leaf(value, back=True), outputs)

    def _moved_leaf(self, value: Any, back: bool) -> Any:
        if isinstance(value, Tensor):
            return self.permuted(value, back) if value.dim() and value.shape[0] == self.samples else value
        if self._order is not None and not isinstance(value, _WITHOUT_SAMPLES):
            raise TypeError(
                f"samples are sorted by task, and a {type(value).__name__} of the model may hold tensors of theirs; "
                "tensors in tuples, lists, dictionaries and classes registered with torch's pytree are put in order"
            )
        return value

    def parts(self) -> Iterator[tuple[int, int, TaskGroup | None]]:
        """(first, end, group) of the sorted samples: the bare ones, where there are any, with None."""
        if self.bare:
            yield 0, self.bare, None
        for group in self.groups:
            yield group.first, group.end, group


_numbers = itertools.count()


class ActiveBatch:
    """The batch that a thread runs through a model; the model's modules share one."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self._key = f"rlrr_kernels.batch.{next(_numbers)}"

    @property
    def batch(self) -> TaskBatch | None:
        """That of this thread; in a thread of autograd's, that of the thread which started the backward."""
        batch = self._thread.batch
        if batch is None and not torch.compiler.is_compiling() and private.backward_number() >= 0:
            return private.seen_by_backward(self._key)
        return batch

    @contextlib.contextmanager
    def running(self, batch: TaskBatch) -> Iterator[None]:
        """Within, ``batch`` is the one of this thread."""
        before, self._thread.batch = self._thread.batch, batch
        private.set_for_backward(self._key, batch)
        try:
            yield
        finally:
            self._thread.batch = before
            private.set_for_backward(self._key, before)

    def __reduce__(self) -> tuple[Any, ...]:  # a copied or pickled model has its own, and no batch
        return type(self), ()


class _Thread(threading.local):
    batch: TaskBatch | None = None
