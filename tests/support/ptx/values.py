"""PTX types as NumPy arrays: bits in registers are unsigned integers, values are what arithmetic works on.

A value of 16 bits is computed in fp32 and rounded once when it is encoded, which for one operation equals arithmetic of
16 bits. A packed type (``bf16x2``) has its two values, the low one first, along a second axis.
"""

from __future__ import annotations

import functools

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {32: np.float32, 64: np.float64}

PACKED = {"f16x2": "f16", "bf16x2": "bf16"}

TF32_MASK = np.uint32(0xFFFFE000)
"""The bits of an fp32 that a product of TF32 reads."""


@functools.cache
def width(kind: str) -> int:
    """Bits of a PTX type; a predicate has 1."""
    if kind == "pred":
        return 1
    if kind in PACKED or kind == "tf32":
        return 32
    return int(kind.lstrip("bfsu"))


@functools.cache
def bits_type(kind: str) -> type[np.generic]:
    """The unsigned integer that holds a type's bits; bool for a predicate."""
    return np.bool_ if kind == "pred" else UNSIGNED[width(kind)]


def is_float(kind: str) -> bool:
    """Whether values of the type are floating-point numbers."""
    return kind.lstrip("b")[0] == "f" or kind == "tf32"


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Values of a type from the bits [n] of registers."""
    if kind in PACKED:
        return decode(np.ascontiguousarray(bits).view(np.uint16), PACKED[kind]).reshape(-1, 2)
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (bits & TF32_MASK).view(np.float32)
    if kind[0] == "f":
        return bits.view(FLOAT[width(kind)])
    if kind[0] == "s":
        return bits.view(SIGNED[width(kind)])
    return bits


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits [n] of registers from values of a type; floating-point values are rounded to it, to the nearest."""
    if kind in PACKED:
        return np.ascontiguousarray(encode(values.reshape(-1), PACKED[kind])).view(np.uint32)
    if kind == "pred":
        return values.astype(np.bool_)
    if kind == "bf16":
        return f32_to_bf16(values)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind[0] == "f":
        return np.ascontiguousarray(values, FLOAT[width(kind)]).view(UNSIGNED[width(kind)])
    if kind[0] == "s":
        return np.ascontiguousarray(values).astype(SIGNED[width(kind)], copy=False).view(UNSIGNED[width(kind)])
    return np.ascontiguousarray(values).astype(bits_type(kind), copy=False)


def extend(bits: np.ndarray, kind: str, to: int) -> np.ndarray:
    """The bits of a type in a register of ``to`` bits: a signed type keeps its sign, others get zeros."""
    if to == 1 or bits.dtype.itemsize * 8 == to:
        return bits
    if kind[0] == "s":
        return bits.view(SIGNED[width(kind)]).astype(SIGNED[to]).view(UNSIGNED[to])
    return bits.astype(UNSIGNED[to])


def flush(values: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal fp32 numbers become zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)
