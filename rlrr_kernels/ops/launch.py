"""``Launch``: a Triton kernel with its grid and arguments, as a value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels import backends

TL_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's name of a dtype of sums."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; ``triton.cdiv`` takes 2 µs on the host, several times a launch."""
    return -(-a // b)


class Launch(NamedTuple):
    """One kernel launch. Built from tensors on any device, meta included, so that it can be compiled without a GPU."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Tensor | int | float, ...]
    meta: dict[str, Any]

    def run(self) -> None:
        """Launches on the device of the first tensor, which Triton leaves to the caller."""
        device = self.args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.args, **self.meta)
        else:
            self.kernel[self.grid](*self.args, **self.meta)


def check_interpreter(*dtypes: torch.dtype) -> None:
    """Refuses bfloat16 under Triton's interpreter, which works on its raw bits.

    Raises:
        ValueError: a dtype is bfloat16 and the interpreter is on.
    """
    if backends.INTERPRETING and torch.bfloat16 in dtypes:
        raise ValueError(
            "a tensor is bfloat16, which Triton's interpreter computes wrongly; use float32 or float16 "
            "under TRITON_INTERPRET=1, or backend 'torch'"
        )
