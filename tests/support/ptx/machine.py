"""Executes a :class:`Program` in NumPy: a register is an array over the threads of all blocks that run at once.

Threads at the same instruction execute it together, those furthest behind first. With a seed, any warp (any group of
four, where a kernel has instructions of such a group) may be next, whenever nothing orders it; who is preferred changes
rarely, so that one may be far ahead of another. Whatever is asynchronous happens as late as it can: when it is waited
for; with a seed, at a random time before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.faults import Deadlock, Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.instructions.copies import AsyncCopies
from tests.support.ptx.instructions.mbarrier import Barriers
from tests.support.ptx.instructions.tensor_copies import TensorCopies, TensorMap
from tests.support.ptx.instructions.wgmma import Products
from tests.support.ptx.memory import GlobalMemory, SharedMemory
from tests.support.ptx.parameters import Parameters
from tests.support.ptx.parser import Address, Immediate, Instruction, Operand, Program, Register, Symbol

Lanes = np.ndarray | None
"""Indices of threads; None: all."""

_CONTROL = ("bra", "ret", "exit", "bar", "barrier", "mbarrier")
"""After these a thread need not go on, or not with the others."""

_LIMIT = 10**7
"""Instructions after which a kernel is taken to run for ever."""


class Machine:
    """Blocks of one launch, to be run once.

    Args:
        program: the kernel.
        parameters: one integer for each of its parameters.
        memory: what pointers among them point into.
        shared: bytes of shared memory of a block.
        grid: blocks of the launch along its axes.
        blocks: numbers of those that run here, at once.
        maps: by its value, the tensor that a parameter which is a descriptor describes.
        seed: of the order of events; None: the one described above.
    """

    def __init__(
        self,
        program: Program,
        parameters: Sequence[int],
        memory: GlobalMemory,
        shared: int,
        grid: Sequence[int],
        blocks: Sequence[int],
        maps: Mapping[int, TensorMap] | None = None,
        seed: int | None = None,
    ) -> None:
        self.program, self.memory = program, memory
        self.parameters = Parameters(program.parameters, parameters)
        self.count, self.threads = program.threads * len(blocks), program.threads
        self.all = np.arange(self.count)
        self.block = np.repeat(np.arange(len(blocks)), self.threads)
        self.registers: dict[str, np.ndarray] = {}
        self.special = self._special_registers(grid, np.asarray(blocks, np.uint32))
        self.pc = np.zeros(self.count, np.int64)
        self.done = np.zeros(self.count, bool)
        self.at_barrier = np.full(self.count, -1)  # the number of that it waits at
        self.barrier_threads = np.zeros(self.count, np.int64)  # how many meet there, 0 for all of a block
        self.executed = 0
        self.random = None if seed is None else np.random.default_rng(seed)
        asynchronous = program.has_bulk_copies or "wgmma" in program.opcodes
        self.shared = SharedMemory(len(blocks), shared, asynchronous)
        self.copies = AsyncCopies(self)
        self.barriers = Barriers(self)
        self.tensor_copies = TensorCopies(self, maps or {})
        self.products = Products(self)
        self._unit = 128 if "wgmma" in program.opcodes else 32
        self._rank = np.zeros(0, np.int64)
        # How soon asynchronous work ends is drawn once, so that runs differ by more than jitter.
        self._haste = 0.0 if self.random is None else self.random.choice([0.0, 0.02, 0.3])

    def _special_registers(self, grid: Sequence[int], blocks: np.ndarray) -> dict[str, np.ndarray]:
        thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(blocks))
        block = np.repeat(blocks, self.threads)
        x, y, z = (*grid, 1, 1)[:3]
        zero = np.zeros(self.count, np.uint32)
        found = {
            "%tid.x": thread, "%ntid.x": zero + np.uint32(self.threads),
            "%laneid": thread % np.uint32(32), "%warpid": thread // np.uint32(32),
            "%ctaid.x": block % np.uint32(x), "%ctaid.y": block // np.uint32(x) % np.uint32(y),
            "%ctaid.z": block // np.uint32(x * y),
        }  # fmt: skip
        found |= {f"%nctaid.{axis}": zero + np.uint32(size) for axis, size in zip("xyz", (x, y, z), strict=True)}
        found |= dict.fromkeys(("%tid.y", "%tid.z", "%cluster_ctarank", "%cluster_ctaid.x"), zero)
        return {name: array.astype(np.uint32) for name, array in found.items()}

    # ------------------------------------------------ operands

    def threads_of(self, lanes: Lanes) -> np.ndarray:
        """The indices, of all threads too."""
        return self.all if lanes is None else lanes

    def blocks_of(self, lanes: Lanes) -> np.ndarray:
        """The block of each thread, counted among those that run here."""
        return self.block if lanes is None else self.block[lanes]

    def _unwritten(self, width: int) -> np.ndarray:
        """A register that nothing was written to: NaN as a number, false as a predicate."""
        return np.zeros(self.count, np.bool_) if width == 1 else np.full(self.count, ~values.UNSIGNED[width](0))

    def bits(self, operand: Operand, size: int, lanes: Lanes) -> np.ndarray:
        """``size`` bits of an operand as unsigned integers [lanes]; the low ones of a wider register."""
        if isinstance(operand, Register):
            found = self.registers.get(operand.name)
            found = self._unwritten(operand.width) if found is None else found
            if size > operand.width:
                raise Fault(f"{size} bits are read of a register of {operand.width}")
            found = found if lanes is None else found[lanes]
            return found if size == operand.width else found.astype(values.UNSIGNED[size])
        count = self.count if lanes is None else lanes.size
        if isinstance(operand, Immediate):
            if size == 1:
                return np.full(count, operand.value != 0)
            if operand.is_float and operand.width != size:
                raise Fault(f"a number of {operand.width} bits is read as one of {size}")
            return np.full(count, operand.value & ((1 << size) - 1), values.UNSIGNED[size])
        if isinstance(operand, Symbol):
            if operand.name in self.special:
                found = self.special[operand.name]
                return (found if lanes is None else found[lanes]).astype(values.UNSIGNED[size], copy=False)
            if operand.name == "global_smem":
                return np.zeros(count, values.UNSIGNED[size])
            if operand.name in self.parameters.addresses:
                return np.full(count, self.parameters.addresses[operand.name], values.UNSIGNED[size])
        raise Fault(f"unknown operand {operand}")

    def read(self, operand: Operand, kind: str, lanes: Lanes) -> np.ndarray:
        """Values of a type; [lanes, 2] of a packed one."""
        return values.decode(self.bits(operand, values.width(kind), lanes), kind)

    def write(self, operand: Operand, result: np.ndarray, kind: str, lanes: Lanes) -> None:
        """Sets a register to values of a type, rounded to it; a wider register is extended."""
        if operand == Symbol("_"):
            return
        if not isinstance(operand, Register):
            raise Fault(f"{operand} is written to")
        if values.width(kind) > operand.width:
            raise Fault(f"{kind} is written to a register of {operand.width} bits")
        bits = values.extend(values.encode(result, kind), kind, operand.width)
        if lanes is not None:
            old = self.registers.get(operand.name)
            new = self._unwritten(operand.width) if old is None else old.copy()
            new[lanes] = bits
            bits = new
        self.registers[operand.name] = bits

    def address(self, operand: Address, lanes: Lanes, shared: bool = False) -> np.ndarray:
        """Addresses as signed integers of 64 bits; those of shared memory wrap at 32."""
        narrow = getattr(operand.base, "width", 32) == 32
        kind = ("s32" if shared else "u32") if narrow else "s64"
        return self.read(operand.base, kind, lanes).astype(np.int64) + operand.offset

    def shared_offsets(self, operand: Address, size: int, lanes: Lanes) -> np.ndarray:
        """Where in the shared memory of all blocks accesses of ``size`` bytes are."""
        return self.shared.offsets(self.address(operand, lanes, shared=True), size, self.blocks_of(lanes))

    def whole_warps(self, lanes: Lanes, size: int = 32) -> np.ndarray:
        """Threads as [warps, 32], or [groups, 128], of an instruction that all of each execute together."""
        threads = self.threads_of(lanes)
        whole = threads.size % size == 0 and (threads.reshape(-1, size)[:, 0] % size == 0).all()
        if not whole or (threads.reshape(-1, size) != threads.reshape(-1, size)[:, :1] + np.arange(size)).any():
            raise Fault(f"only some of {size} threads execute what is for all of them")
        return threads.reshape(-1, size)

    # ------------------------------------------------ order

    def run(self) -> None:
        """Executes the blocks to their end.

        Raises:
            Fault: one did something undefined, or ended before its copies.
            Deadlock: none can go on.
        """
        with np.errstate(all="ignore"):
            while not self.done.all():
                self._finish_some()
                ready = ~(self.done | (self.at_barrier >= 0) | (self.barriers.awaited >= 0))
                if ready.any():
                    self._run_group(*self._next_group(ready))
                elif not self.tensor_copies.land_awaited(self.barriers.awaited):
                    raise Deadlock(self._who_waits())
        self.tensor_copies.check_ended()
        self.products.check_ended()

    def _finish_some(self) -> None:
        """With a seed: something asynchronous may end."""
        if self._haste and self.random.random() < self._haste:
            self.tensor_copies.land_any(self.random)
            self.products.end_any(self.random)

    def _next_group(self, ready: np.ndarray) -> tuple[int, Lanes, int]:
        """Where the next threads are, which they are, and where others wait for them to come along."""
        if self.random is not None:
            units = -(-self.count // self._unit)
            if not self._rank.size or self.random.random() < 1 / 128:
                self._rank = self.random.permutation(units)
            able = np.nonzero(ready)[0] // self._unit
            ready = ready & (self.all // self._unit == able[self._rank[able].argmax()])
        pc = int(self.pc[ready].min())
        group = ready & (self.pc == pc)
        if group.all():
            return pc, None, len(self.program.code)
        others = self.pc[ready & ~group]
        return pc, np.nonzero(group)[0], int(others.min()) if others.size else len(self.program.code)

    def _run_group(self, pc: int, group: Lanes, stop: int) -> None:
        """Executes straight on until something may divide the group, or it meets others."""
        while True:
            current = self.program.code[pc]
            self.executed += 1
            if self.executed > _LIMIT:
                raise Fault("too many instructions")
            lanes = self._guarded(current, group)
            try:
                if current.opcode in _CONTROL:
                    self.pc[self.threads_of(group)] = pc + 1
                if lanes is None or lanes.size:
                    current.execute(self, current, lanes)
            except Fault as fault:
                raise type(fault)(f"{fault}\n  at: {current.text}") from None
            if current.opcode in _CONTROL:
                return
            pc += 1
            if pc >= stop:
                self.pc[self.threads_of(group)] = pc
                return

    def _guarded(self, current: Instruction, group: Lanes) -> Lanes:
        """Those of a group whose guard lets them execute an instruction."""
        if current.guard is None:
            return group
        holds = self.bits(current.guard, 1, group) ^ current.negated
        if holds.all():
            return group
        return np.nonzero(holds)[0] if group is None else group[holds]

    def release_barriers(self) -> None:
        """Lets threads go on from every ``bar.sync`` where all have come."""
        shape = (-1, self.threads)
        at, wanted, live = (a.reshape(shape) for a in (self.at_barrier, self.barrier_threads, ~self.done))
        for number in np.unique(self.at_barrier[self.at_barrier >= 0]):
            here = at == number
            expected = np.where(here, wanted, 0).max(1)
            expected = np.where(expected == 0, live.sum(1), expected)
            at[(here.sum(1) >= expected)[:, None] & here] = -1

    def _who_waits(self) -> str:
        waiting = [f"{count} threads at barrier {number}" for number, count in _counts(self.at_barrier)]
        waiting += [
            f"{count} threads for the mbarrier at {key % self.shared.size} of block {key // self.shared.size}"
            for key, count in _counts(self.barriers.awaited)
        ]
        return f"deadlock: {'; '.join(waiting)}"


def _counts(numbers: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in np.unique(numbers[numbers >= 0], return_counts=True)), strict=True))


@instruction("bra ?uni")
def _branch(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    machine.pc[machine.threads_of(lanes)] = current.target


@instruction("ret", "exit")
def _end(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    machine.done[machine.threads_of(lanes)] = True
    machine.release_barriers()


@instruction("bar sync", "barrier sync ?aligned", "bar warp sync")
def _meet(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    if ".warp" in current.text:  # threads of a warp that execute it are together already
        return
    number, *threads = (machine.bits(operand, 32, lanes) for operand in current.operands)
    machine.at_barrier[machine.threads_of(lanes)] = number
    machine.barrier_threads[machine.threads_of(lanes)] = threads[0] if threads else 0
    machine.release_barriers()
