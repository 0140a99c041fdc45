"""``wgmma``: asynchronous products of groups of four warps, of operands in registers or shared memory.

Descriptors and the registers of the first operand are read when a product is issued, operands in shared memory when
it ends: at the wait for its group, with a seed perhaps before. The registers of its result are NaN in between. Where
the first operand's registers change before the product ends, as in what some versions of Triton write, ``ptxas`` waits
for the product there. Sums are float64, rounded once.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.instructions.tensor_copies import swizzled
from tests.support.ptx.parser import Instruction, Operand, Several

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine

_GROUP = 128

_MODES = {0: (16, 0), 1: (128, 3), 2: (64, 2), 3: (32, 1)}
"""By the swizzling mode of an operand's descriptor: bytes of a row of its core matrix, the mode in a tensor's."""


@functools.cache
def _fragment() -> tuple[np.ndarray, np.ndarray]:
    """Of each thread of a group, the first row and the column pair that it holds of a result."""
    thread = np.arange(_GROUP)
    return thread // 32 * 16 + thread % 32 // 4, thread % 4


@functools.lru_cache(maxsize=4096)
def _places(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
    """Where the elements [rows, depth] of a descriptor's matrix lie in shared memory, in bytes."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, swizzle = _MODES[descriptor >> 62]
    i, j = np.arange(rows)[:, None], np.arange(depth)
    if transposed:
        offsets = i * size // width * leading + j // 8 * stride + j % 8 * width + i * size % width
    elif swizzle == 0:
        offsets = i // 8 * stride + j * size // 16 * leading + i % 8 * 16 + j * size % 16
    else:
        offsets = i // 8 * stride + i % 8 * width + j * size
    return swizzled(start + offsets, swizzle)


@dataclass(eq=False)
class _Product:
    """One instruction of some groups of warps; all arrays begin with these."""

    results: Several
    kind: str
    in_registers: bool  # the first operand
    groups: np.ndarray  # numbers of the groups of warps
    batch: np.ndarray  # numbers of the groups of products that they belong to
    first: np.ndarray  # places in shared memory [64, depth], or the registers' bits [128, registers]
    second: np.ndarray  # places [columns, depth]
    accumulates: np.ndarray  # whether the result is added to

    def part(self, chosen: np.ndarray) -> _Product:
        arrays = ("groups", "batch", "first", "second", "accumulates")
        return replace(self, **{name: getattr(self, name)[chosen] for name in arrays})


@dataclass
class _Result:
    """What lies in the registers of a result while products are under way: [groups of warps, 128, registers]."""

    values: np.ndarray
    pending: np.ndarray  # products under way, by group of warps


class Products:
    """Products under way."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._batch = np.zeros(-(-machine.count // _GROUP), np.int64)  # by group of warps, that which is open
        self._pending: list[_Product] = []
        self._results: dict[Several, _Result] = {}

    def issue(self, product: _Product) -> None:
        product.batch = self._batch[product.groups]
        self._hold(product)
        self._pending.append(product)

    def commit(self, groups: np.ndarray) -> None:
        self._batch[groups] += 1

    def wait(self, groups: np.ndarray, newest: int) -> None:
        """All products of these warps end but those of the ``newest`` batches."""
        ending = np.full(self._batch.size, -1)
        ending[groups] = self._batch[groups] - newest
        left = []
        for product in self._pending:
            ends = product.batch < ending[product.groups]
            if ends.any():
                self._end(product if ends.all() else product.part(ends))
            if not ends.all():
                left.append(product.part(~ends))
        self._pending = left

    def end_any(self, random: np.random.Generator) -> None:
        """Ends the oldest product of one of the groups of warps; the products of one end in order."""
        able = {int(group): product for product in reversed(self._pending) for group in product.groups}
        if not able:
            return
        group, product = tuple(able.items())[random.integers(len(able))]
        chosen = product.groups == group
        if product.batch[chosen] < self._batch[group]:
            self._end(product.part(chosen))
            place = next(index for index, other in enumerate(self._pending) if other is product)
            self._pending[place : place + 1] = [] if chosen.all() else [product.part(~chosen)]

    def check_ended(self) -> None:
        """Refuses an end of the kernel while products are under way."""
        if self._pending:
            raise Fault("the kernel ends before its products")

    def _lanes(self, groups: np.ndarray) -> np.ndarray:
        return (groups[:, None] * _GROUP + np.arange(_GROUP)).reshape(-1)

    def _hold(self, product: _Product) -> None:
        """Takes the results' registers, which are NaN until the last product on them has ended."""
        machine, parts = self._machine, product.results.parts
        held = self._results.get(product.results)
        if held is None:
            shape = self._batch.size, _GROUP, len(parts)
            held = self._results[product.results] = _Result(
                np.zeros(shape, np.float32), np.zeros(self._batch.size, np.int64)
            )
        new = product.groups[held.pending[product.groups] == 0]
        held.pending[product.groups] += 1
        if new.size:
            lanes = self._lanes(new)
            nothing = np.full(lanes.size, np.nan, np.float32)
            for index, part in enumerate(parts):
                held.values[new, :, index] = machine.read(part, "f32", lanes).reshape(-1, _GROUP)
                machine.write(part, nothing, "f32", lanes)

    def _end(self, product: _Product) -> None:
        machine, held = self._machine, self._results[product.results]
        first = self._first(product)
        second = self._load(product.second, product.kind)
        sums = first @ second.transpose(0, 2, 1)
        rows, pairs = _fragment()
        index = np.arange(len(product.results.parts))
        row = rows[:, None] + 8 * (index // 2 % 2)
        column = index // 4 * 8 + pairs[:, None] * 2 + index % 2
        before = np.where(product.accumulates[:, None, None], held.values[product.groups], np.float32(0))
        held.values[product.groups] = before + sums[:, row, column]
        held.pending[product.groups] -= 1
        ended = product.groups[held.pending[product.groups] == 0]
        if ended.size:
            lanes = self._lanes(ended)
            for number, part in enumerate(product.results.parts):
                machine.write(part, held.values[ended, :, number].reshape(-1), "f32", lanes)

    def _load(self, places: np.ndarray, kind: str) -> np.ndarray:
        """Elements of shared memory in float64."""
        size = 4 if kind == "tf32" else 2
        found = self._machine.shared.bytes.view(values.UNSIGNED[8 * size])[places // size]
        return values.decode(found.reshape(-1), kind).reshape(places.shape).astype(np.float64)

    def _first(self, product: _Product) -> np.ndarray:
        """The first operand [groups, 64, depth]."""
        if not product.in_registers:
            return self._load(product.first, product.kind)
        per = 1 if product.kind == "tf32" else 2
        elements = product.first.view(values.UNSIGNED[32 // per]).reshape(-1)
        elements = values.decode(elements, product.kind).reshape(-1, _GROUP, 4, per)
        matrix = np.zeros((product.groups.size, 64, 8 * per))
        rows, pairs = _fragment()
        for register in range(4):
            for element in range(per):
                column = pairs * per + element + 4 * per * (register // 2)
                matrix[:, rows + 8 * (register % 2), column] = elements[:, :, register, element]
        return matrix


def _groups(machine: Machine, lanes: Lanes) -> np.ndarray:
    return machine.whole_warps(lanes, _GROUP)[:, 0] // _GROUP


_SHAPES = "|".join(f"m64n{columns}k{depth}" for columns in range(8, 257, 8) for depth in (8, 16))


@instruction(
    *(f"wgmma mma_async sync aligned shape={_SHAPES} f32 kind={kind} {kind}" for kind in ("bf16", "f16", "tf32"))
)
def _multiply(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    results, first, second, accumulates, *numbers = current.operands
    kind, groups = current.modifiers["kind"], _groups(machine, lanes)
    columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", current.modifiers["shape"]).groups())
    if depth != (8 if kind == "tf32" else 16):
        raise Fault("a product of a depth that its type does not have")
    numbers = [number.value for number in numbers]
    if any(number != 1 for number in numbers[:2]):
        raise Fault("a product of negated operands")
    in_registers = isinstance(first, Several)
    transposed = numbers[2:] if kind != "tf32" else []  # of the operands in shared memory
    transposed = [False] * (2 - len(transposed)) + [number == 1 for number in transposed]

    def places(operand: Operand, rows: int, is_transposed: bool) -> np.ndarray:
        descriptors = machine.bits(operand, 64, lanes).reshape(-1, _GROUP)
        if (descriptors != descriptors[:, :1]).any():
            raise Fault("descriptors of an operand differ within a group of warps")
        size = 4 if kind == "tf32" else 2
        found = [_places(int(descriptor), rows, depth, size, is_transposed) for descriptor in descriptors[:, 0]]
        found, blocks = np.stack(found), machine.block[groups * _GROUP]
        if (found < 0).any() or (found + size > machine.shared.size).any():
            raise Fault("out of bounds: a product's operand in shared memory")
        found = found + blocks[:, None, None] * machine.shared.size
        machine.shared.check_fenced(found, "a product's operand")
        return found

    added = machine.bits(accumulates, 1, lanes).reshape(-1, _GROUP)[:, 0]
    if in_registers:
        bits = [machine.bits(part, 32, lanes).reshape(-1, _GROUP) for part in first.parts]
        first = np.ascontiguousarray(np.stack(bits, -1))
    else:
        first = places(first, 64, transposed[0])
    second = places(second, columns, transposed[1])
    machine.products.issue(_Product(results, kind, in_registers, groups, groups, first, second, added))


@instruction("wgmma fence sync aligned")
def _order_registers(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Registers are read and written in the order of the program here."""


@instruction("wgmma commit_group sync aligned")
def _commit(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    machine.products.commit(_groups(machine, lanes))


@instruction("wgmma wait_group sync aligned")
def _wait(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    machine.products.wait(_groups(machine, lanes), current.operands[0].value)
