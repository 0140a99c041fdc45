"""What the threads of a warp do together: shuffles, elections, matrices between registers and shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.memory import gather
from tests.support.ptx.parser import Instruction, Operand, Several

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine

_LANE = np.arange(32)


def _check_members(machine: Machine, members: Operand, lanes: Lanes) -> None:
    """Refuses what is not for all threads of a warp."""
    machine.whole_warps(lanes)
    if (machine.bits(members, 32, lanes) != 0xFFFFFFFF).any():
        raise Fault("an instruction for some threads of a warp")


@instruction("shfl sync mode=bfly|idx|up|down b32")
def _shuffle(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    result, source, distance, clamp, members = current.operands
    _check_members(machine, members, lanes)
    if clamp.value != (0 if current.modifiers["mode"] == "up" else 31):
        raise Fault("a shuffle within parts of a warp")
    given = machine.bits(source, 32, lanes).reshape(-1, 32)
    by = machine.bits(distance, 32, lanes).reshape(-1, 32).astype(np.int64)
    source_lane = {
        "bfly": _LANE ^ by,
        "idx": by & 31,
        "up": np.where(by > _LANE, _LANE, _LANE - by),
        "down": np.where(_LANE + by > 31, _LANE, _LANE + by),
    }[current.modifiers["mode"]]
    if isinstance(result, Several):
        raise Fault("a shuffle that tells whether its source exists")
    machine.write(result, np.take_along_axis(given, source_lane, 1).reshape(-1), "b32", lanes)


@instruction("elect sync")
def _elect(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    number, elected = current.operands[0].parts
    machine.whole_warps(lanes)
    machine.write(number, np.zeros(machine.threads_of(lanes).size, np.uint32), "b32", lanes)
    machine.write(elected, machine.threads_of(lanes) % 32 == 0, "pred", lanes)


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux sync operation=add|min|max type=s32|u32", "redux sync operation=and|or|xor type=b32")
def _reduce(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    result, source, members = current.operands
    _check_members(machine, members, lanes)
    given = machine.read(source, current.type, lanes).reshape(-1, 32)
    reduced = _REDUCE[current.modifiers["operation"]].reduce(given, axis=1, dtype=given.dtype)
    machine.write(result, np.repeat(reduced, 32), current.type, lanes)


@instruction("activemask b32")
def _active(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    count = machine.whole_warps(lanes).size
    machine.write(current.operands[0], np.full(count, 0xFFFFFFFF, np.uint32), "b32", lanes)


def _row_offsets(machine: Machine, current: Instruction, lanes: Lanes, address: int, count: int) -> list[np.ndarray]:
    """Of each matrix, where the rows of all warps begin: 8 threads of a warp hold the addresses of one."""
    threads = machine.whole_warps(lanes)
    addresses = machine.address(current.operands[address], lanes, shared=True).reshape(-1, 32)
    blocks = np.repeat(machine.block[threads[:, 0]], 8)
    parts = [addresses[:, 8 * matrix : 8 * matrix + 8].reshape(-1) for matrix in range(count)]
    return [machine.shared.offsets(part, 16, blocks, current.opcode) for part in parts]


@instruction("ldmatrix sync aligned m8n8 count=x1|x2|x4 ?trans shared|shared::cta b16")
def _load(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    results = current.operands[0].parts
    for result, offsets in zip(results, _row_offsets(machine, current, lanes, 1, len(results)), strict=True):
        rows = gather(machine.shared.bytes, offsets, 16).reshape(-1, 8, 16).view(np.uint16)
        if "trans" in current.modifiers:
            rows = rows.transpose(0, 2, 1)
        machine.write(result, np.ascontiguousarray(rows).view(np.uint32).reshape(-1), "b32", lanes)


@instruction("stmatrix sync aligned m8n8 count=x1|x2|x4 ?trans shared|shared::cta b16")
def _store(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    sources, threads = current.operands[1].parts, machine.whole_warps(lanes)
    for index, offsets in enumerate(_row_offsets(machine, current, lanes, 0, len(sources))):
        rows = machine.bits(sources[index], 32, lanes).reshape(-1, 8, 4)
        rows = np.ascontiguousarray(rows).view(np.uint16)
        if "trans" in current.modifiers:
            rows = rows.transpose(0, 2, 1)
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16)
        machine.shared.store(offsets, data, threads[:, 8 * index : 8 * index + 8].reshape(-1))
