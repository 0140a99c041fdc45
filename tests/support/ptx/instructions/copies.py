"""``cp.async``: copies from global to shared memory that land when their thread waits for their group, no earlier.

From its start on a copy's destination is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.memory import gather, scatter
from tests.support.ptx.parser import Instruction

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine


class _Copy(NamedTuple):
    """What one instruction copies: by thread its group, where to, and the bytes."""

    threads: np.ndarray
    groups: np.ndarray
    offsets: np.ndarray
    data: np.ndarray

    def part(self, chosen: np.ndarray) -> _Copy:
        return _Copy(*(array[chosen] for array in self))


class AsyncCopies:
    """Copies that are under way."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._group = np.zeros(machine.count, np.int64)  # by thread, the number of the group that is open
        self._pending: list[_Copy] = []

    def start(self, threads: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
        scatter(self._machine.shared.bytes, offsets, np.full_like(data, 0xFF))
        self._pending.append(_Copy(threads, self._group[threads], offsets, data))

    def commit(self, threads: np.ndarray) -> None:
        self._group[threads] += 1

    def wait(self, threads: np.ndarray, newest: int) -> None:
        """All groups of these threads land but the ``newest`` ones."""
        landing = np.full(self._machine.count, -1)
        landing[threads] = self._group[threads] - newest
        left = []
        for copy in self._pending:
            lands = copy.groups < landing[copy.threads]
            if lands.any():
                landed = copy if lands.all() else copy.part(lands)
                scatter(self._machine.shared.bytes, landed.offsets, landed.data)
            if not lands.all():
                left.append(copy.part(~lands))
        self._pending = left


@instruction("cp async cache=ca|cg shared|shared::cta global ?L2::128B|L2::64B|L2::256B")
def _start(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    where, source, size, *valid = current.operands
    if current.modifiers["cache"] == "cg" and size.value != 16:
        raise Fault("cp.async.cg copies 16 bytes")
    offsets = machine.shared_offsets(where, size.value, lanes)
    addresses = machine.address(source, lanes)
    count = machine.bits(valid[0], 32, lanes) if valid else np.full(offsets.size, size.value)
    if ((count != 0) & (count != size.value)).any():
        raise Fault("cp.async of some bytes only")
    data = np.zeros((offsets.size, size.value), np.uint8)
    found = machine.memory.offsets(addresses[count != 0], size.value, "cp.async")
    data[count != 0] = gather(machine.memory.bytes, found, size.value)
    machine.copies.start(machine.threads_of(lanes), offsets, data)


@instruction("cp async commit_group")
def _commit(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    machine.copies.commit(machine.threads_of(lanes))


@instruction("cp async what=wait_group|wait_all")
def _wait(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    threads = machine.threads_of(lanes)
    if current.modifiers["what"] == "wait_all":
        machine.copies.commit(threads)
    machine.copies.wait(threads, current.operands[0].value if current.operands else 0)
