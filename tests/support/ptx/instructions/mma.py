"""``mma.sync``: products of one warp, of operands in registers. Sums are float64, rounded once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.forms import instruction
from tests.support.ptx.parser import Instruction, Several

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine

_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4


def _elements(machine: Machine, operand: Several, kind: str, lanes: Lanes) -> np.ndarray:
    """[warps, 32, registers, elements of a register] in float64."""
    size = values.width(kind)
    bits = [machine.bits(part, max(size, 32), lanes).reshape(-1, 32) for part in operand.parts]
    bits = np.ascontiguousarray(np.stack(bits, -1)).view(values.UNSIGNED[size])
    found = values.decode(bits.reshape(-1), kind).astype(np.float64)
    return found.reshape(bits.shape[0], 32, len(operand.parts), -1)


@instruction(
    "mma sync aligned shape=m16n8k16|m16n8k8 row col accumulator=f32 kind=bf16 bf16 f32",
    "mma sync aligned shape=m16n8k16|m16n8k8 row col accumulator=f32 kind=f16 f16 f32",
    "mma sync aligned shape=m16n8k8|m16n8k4 row col accumulator=f32 kind=tf32 tf32 f32",
    "mma sync aligned shape=m8n8k4|m16n8k4|m16n8k8|m16n8k16 row col accumulator=f64 kind=f64 f64 f64",
)
def _multiply(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """A thread holds rows ``_ROW`` (and 8 below) of the first operand and the result, ``_COLUMN`` pairs of columns."""
    machine.whole_warps(lanes)
    rows, columns, depth = map(int, re.findall(r"\d+", current.modifiers["shape"]))
    result, *given = current.operands
    kinds = (current.modifiers["kind"],) * 2 + (current.modifiers["accumulator"],)
    first, second, added = (
        _elements(machine, operand, kind, lanes) for operand, kind in zip(given, kinds, strict=True)
    )
    warps, per = first.shape[0], first.shape[3]
    a, b, c = np.zeros((warps, rows, depth)), np.zeros((warps, depth, columns)), np.zeros((warps, rows, columns))
    halves = rows // 8
    for register in range(first.shape[2]):
        for element in range(per):
            k = _COLUMN * per + element + 4 * per * (register // halves)
            a[:, _ROW + 8 * (register % halves), k] = first[:, :, register, element]
    for register in range(second.shape[2]):
        for element in range(per):
            b[:, _COLUMN * per + element + 4 * per * register, _ROW] = second[:, :, register, element]
    for register in range(added.shape[2]):
        c[:, _ROW + 8 * (register // 2), _COLUMN * 2 + register % 2] = added[:, :, register, 0]
    c += a @ b
    for register, part in enumerate(result.parts):
        found = c[:, _ROW + 8 * (register // 2), _COLUMN * 2 + register % 2]
        machine.write(part, found.reshape(-1), current.modifiers["accumulator"], lanes)
