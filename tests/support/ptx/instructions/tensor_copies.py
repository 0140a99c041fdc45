"""``cp.async.bulk.tensor``: blocks of matrices from global to shared memory by the tensor memory accelerator.

A load ends when no thread can go on without it, with a seed at times before. What it will overwrite is NaN from its
start on. Stores are not known: no kernel of ours has any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.parser import Instruction
from tests.support.ptx.values import UNSIGNED

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine

SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}
"""By mode (none, 32, 64, 128 bytes), which bits of a row's number trade places of 16 bytes within it."""


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor says of a matrix: where it is, and the blocks in which it is copied."""

    address: int
    shape: tuple[int, int]
    strides: tuple[int, int]  # in elements
    itemsize: int
    block: tuple[int, int]
    swizzle: int = 0  # of SWIZZLES

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.itemsize


@dataclass(eq=False)
class _Copy:
    """One block under way. ``barrier``: the mbarrier that it arrives at."""

    map: TensorMap
    corner: tuple[int, int]  # row, column
    places: np.ndarray  # [rows, columns], in bytes of the shared memory of all blocks
    barrier: int


def swizzled(places: np.ndarray, mode: int) -> np.ndarray:
    """Where bytes that lie in rows of 128 are stored."""
    return places ^ ((places >> 7 & SWIZZLES[mode]) << 4)


class TensorCopies:
    """Blocks that are under way."""

    def __init__(self, machine: Machine, maps: Mapping[int, TensorMap]) -> None:
        self._machine, self._maps = machine, maps
        self._loads: list[_Copy] = []

    def start_load(self, descriptor: int, column: int, row: int, address: int, barrier: int, thread: int) -> None:
        number = self._machine.parameters.at(descriptor)
        if number not in self._maps:
            raise Fault("a copy by what is no descriptor")
        found, shared = self._maps[number], self._machine.shared
        width = found.block[1] * found.itemsize
        if address % 128 or width % 16 or (found.swizzle and width > 16 << found.swizzle):
            raise Fault("a block of a tensor at an address, or of a width, that cannot be copied")
        if address < 0 or address + found.nbytes > shared.size:
            raise Fault("out of bounds: a block of a tensor in shared memory")
        offsets = address + np.arange(found.nbytes // found.itemsize).reshape(found.block) * found.itemsize
        start = int(self._machine.block[thread]) * shared.size
        copy = _Copy(found, (row, column), swizzled(offsets, found.swizzle) + start, barrier)
        shared.check_fenced(copy.places, "a copy in")
        self._elements(copy)[copy.places // found.itemsize] = -1
        self._loads.append(copy)

    def _inside(self, copy: _Copy) -> tuple[np.ndarray, np.ndarray]:
        """Which elements of a block lie in the matrix, and the addresses of these."""
        rows = copy.corner[0] + np.arange(copy.map.block[0])[:, None]
        columns = copy.corner[1] + np.arange(copy.map.block[1])
        inside = (rows >= 0) & (rows < copy.map.shape[0]) & (columns >= 0) & (columns < copy.map.shape[1])
        elements = rows * copy.map.strides[0] + columns * copy.map.strides[1]
        return inside, copy.map.address + elements[inside] * copy.map.itemsize

    def land_awaited(self, awaited: np.ndarray) -> bool:
        """Ends the first load whose mbarrier a thread waits for; False if there is none."""
        wanted = set(awaited[awaited >= 0].tolist())
        load = next((load for load in self._loads if load.barrier in wanted), None)
        if load is not None:
            self._end(load)
        return load is not None

    def land_any(self, random: np.random.Generator) -> None:
        """Ends one of all copies under way."""
        if self._loads:
            self._end(self._loads[random.integers(len(self._loads))])

    def _elements(self, copy: _Copy) -> np.ndarray:
        return self._machine.shared.bytes.view(UNSIGNED[8 * copy.map.itemsize]).view(f"i{copy.map.itemsize}")

    def _end(self, copy: _Copy) -> None:
        memory, size = self._machine.memory, copy.map.itemsize
        inside, addresses = self._inside(copy)
        found = memory.offsets(addresses, size, "a block of a tensor") // size
        elements, matrix = self._elements(copy), memory.bytes.view(f"i{size}")
        elements[copy.places // size] = 0
        elements[copy.places[inside] // size] = matrix[found]
        self._loads.remove(copy)
        self._machine.barriers.change(copy.barrier, 0, -copy.map.nbytes)

    def check_ended(self) -> None:
        """Refuses an end of the kernel while copies are under way."""
        if self._loads:
            raise Fault(f"the kernel ends before {len(self._loads)} loads of blocks")


@instruction("cp async bulk tensor 2d shared::cta|shared::cluster global ?tile mbarrier::complete_tx::bytes")
def _load(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    where, source, barrier = current.operands
    for thread in machine.threads_of(lanes):
        one = np.array([thread])
        descriptor, column, row = _tensor_operands(machine, source, one)
        address = int(machine.address(where, one, shared=True)[0])
        arrives_at = int(machine.shared_offsets(barrier, 8, one)[0])
        machine.tensor_copies.start_load(descriptor, column, row, address, arrives_at, int(thread))


def _tensor_operands(machine: Machine, operand, lanes: np.ndarray) -> tuple[int, int, int]:
    """Address of the descriptor, column and row."""
    column, row = (int(machine.read(part, "s32", lanes)[0]) for part in operand.corner)
    return int(machine.bits(operand.base, 64, lanes)[0]), column, row


@instruction("fence proxy async ?shared::cta|global|shared::cluster", "fence mbarrier_init release cluster")
def _fence(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    if ".proxy" in current.text and ".global" not in current.text:
        machine.shared.fence(machine.threads_of(lanes), machine.count)


@instruction("fence sc|acq_rel cta|gpu|sys|cluster", "membar gl|cta|sys", "griddepcontrol wait|launch_dependents")
def _nothing(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Every access is seen by all threads at once."""
