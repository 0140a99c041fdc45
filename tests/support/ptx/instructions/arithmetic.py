"""Arithmetic, logic and comparisons. Approximate instructions (``ex2.approx``, ``div.full``) are as good as exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.forms import instruction
from tests.support.ptx.parser import Instruction, Several

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine


def _read(machine: Machine, current: Instruction, index: int, lanes: Lanes) -> np.ndarray:
    found = machine.read(current.operands[index], current.type, lanes)
    return values.flush(found) if "ftz" in current.modifiers else found


def _write(machine: Machine, current: Instruction, result: np.ndarray, lanes: Lanes) -> None:
    if "ftz" in current.modifiers:
        result = values.flush(result.astype(np.float32))
    machine.write(current.operands[0], result, current.type, lanes)


def _elementwise(function: Callable[..., np.ndarray], *forms: str) -> None:
    """Registers forms whose result is a function of all their sources, of one type."""

    @instruction(*forms)
    def execute(machine: Machine, current: Instruction, lanes: Lanes) -> None:
        sources = (_read(machine, current, index, lanes) for index in range(1, len(current.operands)))
        _write(machine, current, function(*sources), lanes)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c; the product is exact but in float64."""
    return a.astype(np.float64) * b + c


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; what a GPU gives for a zero divisor is undefined, here all bits are set."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":  # NumPy rounds down
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, -1, quotient) if a.dtype.kind == "i" else np.where(b == 0, ~a.dtype.type(0), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))


_elementwise(np.add, "add type=INT", "add ?rn ?ftz type=FLOAT")
_elementwise(np.subtract, "sub type=INT", "sub ?rn ?ftz type=FLOAT")
_elementwise(np.multiply, "mul lo type=INT", "mul ?rn ?ftz type=FLOAT")
_elementwise(lambda a, b, c: a * b + c, "mad lo type=INT")
_elementwise(_fused, "fma rn ?ftz type=FLOAT")
_elementwise(_divide, "div type=INT")
_elementwise(np.divide, "div rn|full|approx ?ftz type=f32", "div rn type=f64")
_elementwise(_remainder, "rem type=INT")
_elementwise(np.fmin, "min type=INT", "min ?ftz type=FLOAT")
_elementwise(np.fmax, "max type=INT", "max ?ftz type=FLOAT")
_elementwise(np.minimum, "min ?ftz NaN type=FLOAT")
_elementwise(np.maximum, "max ?ftz NaN type=FLOAT")
_elementwise(np.negative, "neg type=s16|s32|s64", "neg ?ftz type=FLOAT")
_elementwise(np.abs, "abs type=s16|s32|s64", "abs ?ftz type=FLOAT")
_elementwise(np.bitwise_and, "and type=pred|b16|b32|b64")
_elementwise(np.bitwise_or, "or type=pred|b16|b32|b64")
_elementwise(np.bitwise_xor, "xor type=pred|b16|b32|b64")
_elementwise(np.invert, "not type=pred|b16|b32|b64")
_elementwise(lambda a: 1 / a, "rcp rn|approx ?ftz type=f32|f64")
_elementwise(np.sqrt, "sqrt rn|approx ?ftz type=f32|f64")
_elementwise(lambda a: 1 / np.sqrt(a.astype(np.float64)), "rsqrt approx ?ftz type=f32|f64")
_elementwise(np.exp2, "ex2 approx ?ftz type=f32")
_elementwise(np.log2, "lg2 approx ?ftz type=f32")
_elementwise(np.tanh, "tanh approx type=f32")


@instruction("mul what=wide|hi type=s16|s32|u16|u32")
def _multiply_wide(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    size = values.width(current.type)
    wide = f"{current.type[0]}{2 * size}"
    a, b = (machine.read(operand, current.type, lanes) for operand in current.operands[1:])
    product = a.astype(_integer(wide)) * b.astype(_integer(wide))
    if current.modifiers["what"] == "wide":
        machine.write(current.operands[0], product, wide, lanes)
    else:
        machine.write(current.operands[0], product >> _integer(wide)(size), current.type, lanes)


@instruction("mad wide type=s16|s32|u16|u32")
def _multiply_add_wide(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    wide = f"{current.type[0]}{2 * values.width(current.type)}"
    a, b = (machine.read(operand, current.type, lanes).astype(_integer(wide)) for operand in current.operands[1:3])
    machine.write(current.operands[0], a * b + machine.read(current.operands[3], wide, lanes), wide, lanes)


def _integer(kind: str) -> type[np.integer]:
    return (values.SIGNED if kind[0] == "s" else values.UNSIGNED)[values.width(kind)]


@instruction("shl type=b16|b32|b64", "shr type=b16|b32|b64|INT")
def _shift(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """By more than all bits: zero, or all of the sign."""
    size, shifted = values.width(current.type), machine.read(current.operands[1], current.type, lanes)
    by = machine.bits(current.operands[2], 32, lanes)
    within = np.minimum(by, size - 1).astype(shifted.dtype)
    result = shifted << within if current.opcode == "shl" else shifted >> within
    if current.type[0] != "s":
        result = np.where(by >= size, shifted.dtype.type(0), result)
    machine.write(current.operands[0], result, current.type, lanes)


@instruction("shf side=l|r wrap b32")
def _funnel_shift(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    low, high, by = (machine.bits(operand, 32, lanes).astype(np.uint64) for operand in current.operands[1:])
    both, by = low | high << np.uint64(32), by & np.uint64(31)
    result = (both << by) >> np.uint64(32) if current.modifiers["side"] == "l" else both >> by
    machine.write(current.operands[0], result & np.uint64(0xFFFFFFFF), "b32", lanes)


@instruction("bfe type=s32|u32")
def _extract(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Bits from a position on; a signed result keeps the sign of the highest."""
    source = machine.read(current.operands[1], current.type, lanes).astype(np.int64)
    first, count = (machine.bits(operand, 32, lanes).astype(np.int64) & 255 for operand in current.operands[2:])
    found = (source >> np.minimum(first, 63)) & ((np.int64(1) << np.minimum(count, 32)) - 1)
    if current.type == "s32":
        negative = (count > 0) & (found >> np.maximum(count - 1, 0) & 1 == 1)
        found = np.where(negative, found - (np.int64(1) << np.minimum(count, 32)), found)
    machine.write(current.operands[0], found, current.type, lanes)


@instruction("bfi b32")
def _insert(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    inserted, into, first, count = (machine.bits(part, 32, lanes).astype(np.int64) for part in current.operands[1:])
    mask = ((np.int64(1) << np.minimum(count, 32)) - 1) << np.minimum(first, 32)
    result = (into & ~mask) | (inserted << np.minimum(first, 32) & mask)
    machine.write(current.operands[0], result & 0xFFFFFFFF, "b32", lanes)


@instruction("prmt b32")
def _permute(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Each byte of the result is one of eight, or eight times its highest bit."""
    low, high, chosen = (machine.bits(operand, 32, lanes).astype(np.uint64) for operand in current.operands[1:])
    both, result = low | high << np.uint64(32), np.zeros(low.size, np.uint64)
    for index in range(4):
        which = chosen >> np.uint64(4 * index) & np.uint64(15)
        byte = both >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(which & np.uint64(8), sign, byte) << np.uint64(8 * index)
    machine.write(current.operands[0], result, "b32", lanes)


@instruction("lop3 b32")
def _logic(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Any function of three bits, by its table."""
    sources = [machine.bits(operand, 32, lanes) for operand in current.operands[1:4]]
    result = np.zeros_like(sources[0])
    for row in range(8):
        if current.operands[4].value >> row & 1:
            a, b, c = (source if row >> 2 - place & 1 else ~source for place, source in enumerate(sources))
            result |= a & b & c
    machine.write(current.operands[0], result, "b32", lanes)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_OR_NAN = {f"{name}u": name for name in _COMPARE}


@instruction(
    "setp comparison=eq|ne type=b16|b32|b64",
    "setp comparison=eq|ne|lt|le|gt|ge type=INT",
    "setp comparison=lo|ls|hi|hs type=u16|u32|u64",
    "setp comparison=eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan ?ftz type=FLOAT",
)
def _compare(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Of packed types there are two results, for the low and the high value."""
    a, b = (_read(machine, current, index, lanes) for index in (1, 2))
    name = current.modifiers["comparison"]
    if values.is_float(current.type):
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            result = nan == (name == "nan")
        elif name in _OR_NAN:
            result = _COMPARE[_OR_NAN[name]](a, b) | nan
        else:
            result = _COMPARE[name](a, b) & ~nan
    else:
        result = _COMPARE[_OF_UNSIGNED.get(name, name)](a, b)
    target = current.operands[0]
    if current.type in values.PACKED:
        for index, part in enumerate(target.parts):
            machine.write(part, result[:, index], "pred", lanes)
    elif isinstance(target, Several):
        for part, found in zip(target.parts, (result, ~result), strict=True):
            machine.write(part, found, "pred", lanes)
    else:
        machine.write(target, result, "pred", lanes)
