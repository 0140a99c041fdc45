"""The C++ operator's instruction sets in tests: those that run here, and the eager formula that each is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.backends import CPU_LEVELS, cpu_level
from rlrr_kernels.numerics import Function
from rlrr_kernels.reference import rlrr_linear_reference

LEVELS = () if backends.CPP_FAILURE is not None else CPU_LEVELS[: CPU_LEVELS.index(cpu_level()) + 1]

_LANES = {"portable": 4, "avx2": 8}  # 16 for the others
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_EAGER_LANES = 16 if _CAPABILITY.startswith("AVX512") else 8 if _CAPABILITY == "AVX2" else 4
_MANY_ROWS = 64


def eager_for(level: str, formula: Function = rlrr_linear_reference) -> Function:
    """The eager formula that the error rule holds a level to: for what the processor would take, as it is.

    A narrower level is held to what the formula makes of the rows of x among many. Of few rows alone, the library may
    sum a product over all lanes of this processor, more than the level's own processor has.
    """
    if _LANES.get(level, 16) >= _EAGER_LANES:
        return formula

    def of_many_rows(x: Tensor, *args: Tensor, **options: object) -> Tensor:
        rows = x.shape[-2]
        return formula(torch.cat([x] * max(1, _MANY_ROWS // rows), -2), *args, **options)[..., :rows, :]

    return of_many_rows
