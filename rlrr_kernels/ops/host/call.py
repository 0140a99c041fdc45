"""``Call``: what eager calls of ``rlrr_linear``, and those of compiled code, with tensors of the same layout share.

Checks and the choice of kernels depend on types, shapes, strides, dtypes and devices alone and take the host several
times as long as starting the kernels does. So a layout that was checked once is not checked again, and its kernels are
started by a :class:`rlrr_kernels.ops.host.replay.Replay` from the second call on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.linear.dispatch import compute_gradients, compute_linear

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
"""Types of tensors that eager calls take as they are; those of another type go through the operator."""

_MOST_CALLS = 4096
"""Layouts remembered; a model has a few dozen."""

_MOST_ATTEMPTS = 3
"""Calls of a layout that are recorded for a replay: where none can be made, the reason seldom goes away."""


class Call:
    """What calls of one layout do with tensors that were checked.

    Args:
        backend: resolved, never ``auto``.
        residual: as given.
        dtype: to which x is cast first; None leaves it.

    Attributes:
        eager: whether it is known by its layout, so that all tensors are plain and no transform is at work.
    """

    __slots__ = ("_attempts", "_replays", "backend", "dtype", "eager", "residual")

    def __init__(self, backend: str, residual: bool, dtype: torch.dtype | None = None) -> None:
        self.backend, self.residual, self.dtype, self.eager = backend, residual, dtype, False
        self._replays: dict[Any, Any] = {}
        self._attempts: dict[Any, int] = {}

    def forward(self, x: Tensor, weight: Tensor, scale_row, scale_col, bias: Tensor | None) -> Tensor:
        """y [..., N] of an x [..., K] that was cast."""
        replay = self._replays.get("forward")
        if replay is not None and replay.ready():
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
            own = (x, weight, scale_row, scale_col, y) if bias is None else (x, weight, scale_row, scale_col, bias, y)
            if replay.run(own):
                return y
        y, launches = self._record(
            "forward", compute_linear, x, weight, scale_row, scale_col, bias, self.residual, self.backend, None
        )
        if launches:
            self._keep("forward", launches, x, weight, scale_row, scale_col, bias, y)
        return y

    def gradients(
        self, grad_y: Tensor, x: Tensor | None, weight: Tensor, scale_row, scale_col, needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Those of x, scale_row, scale_col and bias that ``needs`` asks for, as :func:`compute_gradients` has them."""
        key = needs, grad_y.stride(), x is not None and x.stride()
        replay = self._replays.get(key)
        if replay is not None and replay.ready():
            need_x, need_row, need_col, need_bias = needs
            grads = (
                grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if need_x else None,
                torch.empty_like(scale_row) if need_row else None,
                torch.empty_like(scale_col) if need_col else None,
                grad_y.new_empty(weight.shape[0], dtype=accumulate_dtype(grad_y.dtype)) if need_bias else None,
            )
            own = (grad_y, x, weight, scale_row, scale_col, *grads)
            if replay.run(own if all(needs) else _present(own)):
                return grads
        grads, launches = self._record(
            key,
            compute_gradients,
            grad_y,
            x,
            weight,
            scale_row,
            scale_col,
            self.residual,
            self.backend,
            needs,
            None,
            None,
        )
        if launches:
            self._keep(key, launches, grad_y, x, weight, scale_row, scale_col, *grads)
        return grads

    def _record(self, key: Any, compute: Callable, *arguments: Any) -> tuple[Any, list]:
        """The result of ``compute``, and its launches where these may become a replay."""
        replay = self._replays.get(key)
        if (
            not self.backend.startswith("triton")
            or self._attempts.get(key, 0) == _MOST_ATTEMPTS
            or not (replay is None or replay.outdated())
        ):
            return compute(*arguments), []
        with importlib.import_module("rlrr_kernels.ops.host.launch").recorded() as launches:
            return compute(*arguments), launches

    def _keep(self, key: Any, launches: list, *tensors: Tensor | None) -> None:
        replay = importlib.import_module("rlrr_kernels.ops.host.replay").Replay.of(launches, _present(tensors))
        if replay is None:
            self._attempts[key] = self._attempts.get(key, 0) + 1
        else:
            self._replays[key] = replay


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


_calls: dict[tuple, Call] = {}


def layout_of(x, weight, scale_row, scale_col, bias, residual: bool, backend: str) -> tuple | None:
    """All that an eager call depends on but the values in its tensors.

    None where a scale or a tensor is missing, and for an x or weight of another type: its sizes may have no hash.
    """
    if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        return None
    try:
        return (
            type(x), x.shape, x.stride(), x.dtype, x.device,
            type(weight), weight.shape, weight.stride(), weight.dtype, weight.device, weight.requires_grad,
            type(scale_row), scale_row.shape, scale_row.stride(), scale_row.dtype, scale_row.device,
            type(scale_col), scale_col.shape, scale_col.stride(), scale_col.dtype, scale_col.device,
            None if bias is None else (type(bias), bias.shape, bias.stride(), bias.dtype, bias.device),
            residual, backend, backend == "auto" and backends.default_backend(), backends.INTERPRETING,
            torch._C._is_any_autocast_enabled() and _autocast_dtype(x),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # None, no tensor at all, or one without strides
        return None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def known(layout: tuple) -> Call | None:
    """What was remembered for a layout."""
    return _calls.get(layout)


def remember(layout: tuple | None, call: Call, *tensors: Tensor | None) -> None:
    """From now on ``call`` is known by its layout, if there is one and its tensors are of plain types."""
    if layout is None or not all(tensor is None or type(tensor) in PLAIN_TYPES for tensor in tensors):
        return
    call.eager = True
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[layout] = call
