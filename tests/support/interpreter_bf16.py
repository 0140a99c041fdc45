"""Makes bfloat16 right in Triton's interpreter, for the tests.

The interpreter keeps bfloat16 as raw bits in ``uint16`` and computes on these. Here each operation widens them to fp32
first and rounds its result once, to the nearest even. The package refuses bfloat16 under the interpreter, since its
users have no such help.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from rlrr_kernels.ops.host import launch

_CASTS = (
    "create_fp_ext",
    "create_fp_trunc",
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
)


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 of bfloat16's bits, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def install() -> None:
    """Replaces what the interpreter does with bfloat16, in this process, and lifts the package's refusal."""
    builder = InterpreterBuilder
    cast, binary, unary, dot, convert = (
        getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot", "create_fp_to_fp")
    )

    def cast_bf16(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        source = _wide(source)
        if kind.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return source if kind.scalar == source.dtype.scalar else cast(self, source, kind)

    def convert_bf16(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype, rounding) -> TensorHandle:
        if _is_bf16(source) or kind.scalar == tl.bfloat16:
            return cast_bf16(self, source, kind)
        return convert(self, source, kind, rounding)

    def binary_bf16(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, operator: Callable):
        if not _is_bf16(left):
            return binary(self, left, right, operator)
        result = operator(widen(left.data), widen(right.data))
        return TensorHandle(result if result.dtype == bool else narrow(result), tl.bfloat16)

    def unary_bf16(self: InterpreterBuilder, source: TensorHandle, operator: Callable) -> TensorHandle:
        result = unary(self, _wide(source), operator)
        return TensorHandle(narrow(result.data), tl.bfloat16) if _is_bf16(source) else result

    def dot_bf16(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
        return dot(self, _wide(a), _wide(b), *rest)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast_bf16, binary_bf16, unary_bf16
    builder.create_dot, builder.create_fp_to_fp = dot_bf16, convert_bf16
    for name in _CASTS:
        setattr(builder, name, cast_bf16)
    launch.REFUSED_BY_INTERPRETER = frozenset()
