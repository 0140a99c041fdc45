"""mbarriers: a phase ends when all arrivals have come, and all bytes that were announced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.parser import Address, Instruction

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine


@dataclass
class Barrier:
    """One mbarrier."""

    arrivals: int
    missing: int
    bytes: int = 0
    phase: int = 0


class Barriers:
    """All mbarriers, by where they lie in the shared memory of all blocks."""

    def __init__(self, machine: Machine) -> None:
        self._barriers: dict[int, Barrier] = {}
        self.awaited = np.full(machine.count, -1)  # by thread, the mbarrier that it waits for

    def initialise(self, key: int, arrivals: int) -> None:
        self._barriers[key] = Barrier(arrivals, arrivals)

    def invalidate(self, key: int) -> None:
        self._find(key)
        del self._barriers[key]

    def change(self, key: int, arrivals: int, announced: int) -> None:
        """Counts arrivals, and bytes that are announced (negative: that have come)."""
        barrier = self._find(key)
        barrier.missing -= arrivals
        barrier.bytes += announced
        if barrier.missing < 0 or barrier.bytes < 0:
            raise Fault("an mbarrier counts more arrivals or bytes than it waits for")
        if barrier.missing == barrier.bytes == 0:
            barrier.missing = barrier.arrivals
            barrier.phase ^= 1
            self.awaited[self.awaited == key] = -1

    def ended(self, key: int, parity: int) -> bool:
        """Whether the last phase of a parity is over."""
        return self._find(key).phase != parity

    def _find(self, key: int) -> Barrier:
        if key not in self._barriers:
            raise Fault("an mbarrier is used that was not initialised")
        return self._barriers[key]


def keys(machine: Machine, operand: Address, lanes: Lanes) -> np.ndarray:
    """The mbarriers of threads."""
    return machine.shared_offsets(operand, 8, lanes)


_SPACE = "shared|shared::cta"


@instruction(f"mbarrier init {_SPACE} b64")
def _initialise(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    found, arrivals = keys(machine, current.operands[0], lanes), machine.bits(current.operands[1], 32, lanes)
    for key, count in zip(found, arrivals, strict=True):
        machine.barriers.initialise(int(key), int(count))


@instruction(f"mbarrier inval {_SPACE} b64")
def _invalidate(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    for key in keys(machine, current.operands[0], lanes):
        machine.barriers.invalidate(int(key))


@instruction(f"mbarrier arrive {_SPACE} b64")
def _arrive(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    _, where, *count = current.operands
    found = keys(machine, where, lanes)
    counts = machine.bits(count[0], 32, lanes) if count else np.ones(found.size, np.int64)
    for key, arrivals in zip(found, counts, strict=True):
        machine.barriers.change(int(key), int(arrivals), 0)


@instruction(f"mbarrier arrive=arrive expect_tx {_SPACE} b64", f"mbarrier expect_tx ?relaxed ?cta {_SPACE} b64")
def _announce(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    arrivals = int("arrive" in current.modifiers)
    where, announced = current.operands[arrivals:]
    sizes = machine.bits(announced, 32, lanes)
    for key, size in zip(keys(machine, where, lanes), sizes, strict=True):
        machine.barriers.change(int(key), arrivals, int(size))


@instruction(f"mbarrier try_wait|test_wait parity {_SPACE} b64")
def _wait(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Threads whose phase is not over stop until it is, and then ask again."""
    result, where, parity = current.operands
    found, parities = keys(machine, where, lanes), machine.bits(parity, 32, lanes)
    over = np.zeros(found.size, bool)
    for key in np.unique(found):
        here = found == key
        over[here] = [machine.barriers.ended(int(key), int(value)) for value in parities[here]]
    machine.write(result, over, "pred", lanes)
    machine.barriers.awaited[machine.threads_of(lanes)[~over]] = found[~over]
