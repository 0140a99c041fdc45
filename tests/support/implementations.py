"""The backends that this process can test, and problems on which they are tried.

With Triton's interpreter on (``TRITON_INTERPRET=1``) these are the Triton kernels, without it all others: the same
tests run in both processes. What the interpreter computes wrongly in bfloat16, ``interpreter_bf16`` puts right.
"""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels import backends

BACKENDS = (
    ("triton.fused", "triton.merge")
    if backends.INTERPRETING
    else tuple(name for name in ("torch", "cpp") if backends.unavailable(name, "cpu") is None)
)

ONE_PATH = tuple(
    pytest.param(name, marks=pytest.mark.slow_interpreted) if name == "triton.merge" else name for name in BACKENDS
)
"""For tests of what Triton's paths share: strides, which gradients are wanted, repeated bits. One path is quick."""

DTYPES = (
    (torch.float32, torch.float16, torch.bfloat16)
    if backends.INTERPRETING
    else (torch.float32, torch.float16, torch.bfloat16, torch.float64)
)

# M, N, K, rank, groups, bias, residual: nothing is a multiple of anything. The error rule wants many values, which cost
# the interpreter minutes; there the small cases are left to the tests by bounds, which need no statistics.
SHAPES = (
    ((197, 51, 70, 1, 3, True, True), (60, 66, 67, 4, 1, False, False), (80, 34, 67, 17, 1, True, True))
    if backends.INTERPRETING
    else (
        (1, 66, 131, 1, 1, True, True),
        (7, 99, 70, 4, 3, False, True),
        (60, 33, 70, 1, 3, True, False),
        (40, 51, 67, 17, 1, True, True),
        (197, 99, 131, 1, 3, True, True),
    )
)

PROBLEMS = [
    pytest.param(shape, dtype, marks=[pytest.mark.slow_interpreted] if i % 2 != j else [])
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
    if dtype != torch.bfloat16 or shape == SHAPES[0] or not backends.INTERPRETING
]
"""Shapes with dtypes: to the interpreter another 16-bit dtype is another rounding alone, and one shape shows it."""

HALF = (torch.bfloat16,) if backends.INTERPRETING else (torch.float16, torch.bfloat16)
"""The 16-bit dtypes where there are others besides."""
