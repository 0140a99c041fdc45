"""``Replays``: from the second call of a layout on, a call's kernels are started past all that chose them.

What a call does before its kernels start, the choice of path and tiles, plans and views, depends on the layout of its
tensors alone (:func:`layout`) and takes the host several times as long as starting the kernels does. A replay keeps the
outcome: compiled kernels and, of each tensor that one takes, its place in the call. So there is one of calls that
compute by kernels of ours alone: a copy, a product of the library, ones in place of None are not in it.

Whatever a replay takes for granted is in its key or is checked when it runs. This file needs no Triton to be imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlrr_kernels.ops.host import private

if TYPE_CHECKING:
    from rlrr_kernels.ops.host.launch import Launch
    from rlrr_kernels.ops.host.private import StartKernel

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
"""Types of tensors whose memory kernels may be handed; those of another type go through the operator."""

_PLAIN_OR_NONE = frozenset((*PLAIN_TYPES, type(None)))

_MOST_ATTEMPTS = 8
"""Calls of a layout that are recorded for a replay: where none can be made, the reason seldom goes away. Not fewer: a
gradient scaler's first steps overflow, and of kernels whose first results are not finite nothing is known."""

_WITHOUT_COMPUTING = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "squeeze"),
        *("t", "transpose", "unsqueeze", "view"),
    )
)
"""Operators that give memory or another view of it."""

_ALIGNMENT = 256
"""Bytes, between the buffers of a call's scratch memory."""

_choices = 0
"""How often what calls choose by, tiles and paths, may have changed."""

_address = Tensor.data_ptr
_precision = private.fp32_precision
_is_wrapped = private.is_transformed


def layout(*tensors: Tensor | None) -> tuple | None:
    """All that a computation depends on but the values in its tensors; None for a tensor without strides.

    A lazily negated tensor has another layout than a plain one: kernels are handed addresses, and what lies there has
    the other sign.
    """
    try:
        return tuple(
            [
                None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device, t.is_neg())  # its parts hash
                for t in tensors
            ]
        )
    except (AttributeError, RuntimeError):  # no tensor at all, or a sparse or nested one
        return None


def plain_layout(*tensors: Tensor | None) -> tuple | None:
    """:func:`layout`; None where a tensor is of another type than :data:`PLAIN_TYPES` or a transform has wrapped it."""
    if not _PLAIN_OR_NONE.issuperset(map(type, tensors)) or _is_wrapped(tensors[0]):  # left over from a transform
        return None
    return layout(*tensors)


def choose_anew() -> None:
    """Has the next call of every layout choose its tiles and path, and replays be made of what it chose."""
    global _choices
    _choices += 1


class Replays:
    """The replays of calls, by all that each depends on but the values in its tensors."""

    __slots__ = ("_attempts", "_replays")

    def __init__(self) -> None:
        self._replays: dict[Any, Replay] = {}
        self._attempts: dict[Any, tuple[int, int]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._replays

    def run(
        self,
        key: tuple | None,
        tensors: Sequence[Tensor | None],
        allocate: Callable[[], tuple[Tensor | None, ...]],
        compute: Callable[[], tuple[Tensor | None, ...]],
    ) -> tuple[Tensor | None, ...]:
        """The results of a call: by its replay where there is one, else computed, and recorded for a replay.

        Args:
            key: the layout of ``tensors`` and what else the call depends on; None: it is computed.
            tensors: what the call reads.
            allocate: makes the results' tensors, in the layout that ``compute`` gives them.
            compute: computes the results.
        """
        if key is None:
            return compute()
        replay = self._replays.get(key)
        if replay is not None and replay.ready():
            results = allocate()
            if replay.run([tensor for tensor in (*tensors, *results) if tensor is not None]):
                return results if replay.checked else self._checked(key, results, compute)
        elif replay is None or replay.outdated():
            return self._recorded(key, tensors, compute)
        return compute()

    def _checked(self, key: tuple, results: tuple[Tensor | None, ...], compute: Callable) -> tuple[Tensor | None, ...]:
        """The results of a first replay, if they are those of the call that it repeats; else these."""
        from rlrr_kernels.ops.host import guard

        if guard.capturing():
            return results
        expected = compute()
        self._replays[key].checked = guard.same_bits(results, expected)
        return expected

    def _recorded(self, key: tuple, tensors: Sequence[Tensor | None], compute: Callable) -> tuple[Tensor | None, ...]:
        from rlrr_kernels.ops.host import launch

        # Other tiles or another path may be in force than at earlier attempts, with which a replay can be made.
        changes, attempts = self._attempts.get(key, (_choices, 0))
        if changes != _choices:
            attempts = 0
        if attempts == _MOST_ATTEMPTS or launch.thread.record is not None:
            return compute()
        with launch.recorded() as launches, _Watch() as watch:
            results = compute()
        present = [tensor for tensor in (*tensors, *results) if tensor is not None]
        replay = Replay.of(launches, present) if launches and not watch.computed else None
        if replay is None:
            self._attempts[key] = _choices, attempts + 1
        else:
            self._replays[key] = replay
        return results


class _Watch(private.Watching):
    """Notes whether PyTorch computes a part of a call."""

    computed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.computed |= func.overloadpacket not in _WITHOUT_COMPUTING
        return func(*args, **(kwargs or {}))


class Replay:
    """Starts kernels that ran before, past all that chose them and built their launches."""

    __slots__ = (
        *("_choices", "_device", "_driver", "_drivers", "_host", "_kernels", "_offsets"),
        *("_precision", "_scratch", "_steps", "checked"),
    )

    def __init__(self, launches: Sequence[Launch], positions: dict[int, int], starts: Sequence[StartKernel]) -> None:
        """``positions`` of the call's tensors, by address; all others are scratch, which the call made for itself."""
        import triton

        from rlrr_kernels.ops.host import guard
        from rlrr_kernels.ops.host import launch as host

        first = launches[0].tensors[0]
        self.checked = not guard.enabled(first.device)  # else when its first results were those of the call it repeats
        positions, self._offsets, self._scratch = dict(positions), [], 0
        self._steps: list[tuple[StartKernel, Callable]] = []
        for launch, start in zip(launches, starts, strict=True):
            for tensor in launch.tensors:
                if tensor.data_ptr() not in positions:
                    positions[tensor.data_ptr()] = len(positions)
                    self._offsets.append(self._scratch)
                    self._scratch += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
            taken = operator.itemgetter(*(positions[tensor.data_ptr()] for tensor in launch.tensors))
            self._steps.append((start, taken))
        self._host, self._drivers = host, triton.runtime.driver
        self._device, self._driver, self._choices = first.get_device(), self._drivers.active, _choices
        self._precision = _precision("cuda", "matmul") if first.dtype == torch.float32 else None
        self._kernels = tuple({launch.plan.kernel for launch in launches})

    @classmethod
    def of(cls, launches: Sequence[Launch], tensors: Sequence[Tensor]) -> Replay | None:
        """A replay of ``launches``, in which a call with ``tensors``, inputs and results, has just computed all.

        None where there can be none: a kernel that Triton's launcher must start, two tensors that are one, an empty
        one, or a part of memory whose other parts have addresses of their own.
        """
        positions = {tensor.data_ptr(): position for position, tensor in enumerate(tensors)}
        taken = [tensor for launch in launches for tensor in launch.tensors]
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        starts = [launch.known_start for launch in launches]
        if (
            len(positions) < len(tensors)
            or None in starts
            or any(not tensor.numel() for tensor in (*tensors, *taken))
            or any(
                tensor.storage_offset() or tensor.untyped_storage().data_ptr() in memory
                for tensor in taken
                if tensor.data_ptr() not in positions
            )
        ):
            return None
        return cls(launches, positions, starts)

    def outdated(self) -> bool:
        """Whether a call would choose anew: other tiles are in force, another precision of fp32 products, or driver."""
        return (
            self._choices != _choices
            or self._driver is not self._drivers.active
            or (self._precision is not None and self._precision != _precision("cuda", "matmul"))
        )

    def ready(self) -> bool:
        """Whether it may run: it is not outdated, nothing watches launches, and its device is current."""
        device = self._device
        return not (
            self.outdated()
            or self._host.thread.record is not None
            or not self._host.direct
            or self._host.watched(*self._kernels)
            or (device >= 0 and device != self._host.current_device())
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
        try:
            for start, taken in self._steps:
                start(stream, taken(pointers))
        except Exception as error:  # what ran of it wrote to results and scratch alone: the call is made anew
            self._host.give_up_direct(f"a replay failed with {type(error).__name__}: {error}")
            return False
        return True
