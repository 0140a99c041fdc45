"""The parameters of a kernel, in an address space of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.parser import Instruction

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine


class Parameters:
    """Numbers by where they lie; what descriptors hold is found by such a number."""

    _FIRST, _SPACING = 1 << 20, 128

    def __init__(self, names: Sequence[str], numbers: Sequence[int]) -> None:
        self.addresses = {name: self._FIRST + self._SPACING * index for index, name in enumerate(names)}
        self._numbers = dict(zip(self.addresses.values(), numbers, strict=True))

    def at(self, address: int) -> int:
        """The number at an address.

        Raises:
            Fault: no parameter begins there.
        """
        if address not in self._numbers:
            raise Fault("what is no parameter, or a part of one, is read as one")
        return self._numbers[address]


@instruction("ld param type=BITS|INT|f32|f64")
def _load(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Threads may read parameters at addresses that they have chosen among."""
    target, source = current.operands
    size = values.width(current.type)
    addresses, places = np.unique(machine.address(source, lanes), return_inverse=True)
    numbers = [machine.parameters.at(int(address)) & ((1 << size) - 1) for address in addresses]
    bits = np.array(numbers, values.UNSIGNED[size])[places.reshape(-1)]
    machine.write(target, values.decode(bits, current.type), current.type, lanes)
