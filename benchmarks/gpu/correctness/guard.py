"""Memory that shows misuse: what nobody wrote is NaN, and what lies around every tensor must stay as it was.

:class:`GuardedMemory` surrounds each tensor that is made within it. :func:`guarded` does the same for a tensor that is
given to a kernel: what is read beyond its ends is NaN, and shows in the results.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PAD_BYTES = 4096
"""On each side; a multiple of all alignments that matter."""


def _strides_like(pattern: Tensor) -> tuple[int, ...]:
    return torch.empty_like(torch.empty_strided(pattern.shape, pattern.stride(), device="meta")).stride()


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format: lambda args, like: (args[0], None),
    _aten.empty_strided.default: lambda args, like: (args[0], args[1]),
    _aten.new_empty.default: lambda args, like: (args[1], None),
    _aten.new_empty_strided.default: lambda args, like: (args[1], args[2]),
    _aten.empty_like.default: lambda args, like: (like.shape, _strides_like(like)),
}
"""Allocating operators: (size, strides or None) from their arguments and the tensor that they take as a pattern."""


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _is_poison(tensor: Tensor) -> bool:
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == _poison(tensor.dtype)).all())


def _surrounded(size, strides, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor and the memory around it with it: both full of poison."""
    size = torch.Size(size)
    if strides is None:
        strides, count = torch.empty(size, device="meta").stride(), size.numel()
    else:
        count = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if size.numel() else 0
    pad = PAD_BYTES // dtype.itemsize
    # A whole number of pads, so that the end of the tensor and of its memory are as well aligned as the start.
    whole = torch.full((2 * pad + count,), _poison(dtype), dtype=dtype, device=device)
    return torch.as_strided(whole, size, strides, pad), whole


def guarded(tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, of the same strides, with NaN before and behind it; it requires no gradient."""
    tensor = tensor.detach()
    copy, _ = _surrounded(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return copy.copy_(tensor)


class GuardedMemory(TorchDispatchMode):
    """Within it, allocations of floating point tensors are poisoned, inside and around; backward passes included.

    What a library allocates for itself, in C++, is not seen: only tensors made by calls from Python are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _ALLOCATIONS or kwargs.get("pin_memory"):
            return function(*args, **kwargs)
        like = args[0] if args and isinstance(args[0], Tensor) else None
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
        device = torch.device(kwargs.get("device") or (like.device if like is not None else "cpu"))
        if not dtype.is_floating_point or device.type == "meta":
            return function(*args, **kwargs)
        size, strides = _ALLOCATIONS[function](args, like)
        tensor, whole = _surrounded(size, strides, dtype, device)
        self._made.append((whole, whole.numel() - PAD_BYTES // dtype.itemsize))
        return tensor

    @property
    def count(self) -> int:
        """How many tensors were surrounded."""
        return len(self._made)

    def damage(self) -> str | None:
        """Which surroundings were written, None where all are as they were."""
        for number, (whole, end) in enumerate(self._made, 1):
            pad = PAD_BYTES // whole.element_size()
            for place, part in (("before", whole[:pad]), ("behind", whole[end:])):
                if not _is_poison(part):
                    return f"memory {place} tensor {number} of {self.count} was written ({end - pad} {whole.dtype})"
        return None
