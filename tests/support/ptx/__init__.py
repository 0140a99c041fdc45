"""Executes the PTX that Triton compiles, on the CPU: see :mod:`tests.support.ptx.machine` for what that means.

A kernel is compiled for a GPU and its PTX executed thread by thread. The machine is stricter than a GPU: there are
unmapped gaps around every tensor, alignment is checked, shared memory starts as NaN, copies and products are late, and
a seed makes an adversarial order of everything that nothing orders. An instruction it does not know is an error.

Not covered: what ``ptxas`` makes of the PTX, Blackwell's tensor memory (``tcgen05``), the tensor cores' own rounding
(sums are float64, rounded once) and the arithmetic of approximate instructions.
"""

from tests.support.ptx import parameters, warp  # noqa: F401 (they register their instructions)
from tests.support.ptx.faults import Deadlock, Fault, UnknownInstructionError
from tests.support.ptx.instructions import arithmetic, mma, moves  # noqa: F401 (likewise)

__all__ = ["Deadlock", "Fault", "UnknownInstructionError"]
