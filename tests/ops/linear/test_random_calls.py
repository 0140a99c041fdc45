"""Seeded random calls of ``rlrr_linear``: layouts, types of scales, autocast, what is trained, hooks, repeated layouts.

Each is held to the bound of ``rlrr_kernels.numerics`` against float64. A case is named by its number, which is its
seed: ``pytest -k "[17-"`` repeats one.
"""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from rlrr_kernels import backends, numerics, rlrr_linear
from rlrr_kernels.ops.checks import canonical
from rlrr_kernels.reference import rlrr_linear_reference
from tests.support.implementations import BACKENDS, DTYPES

pytestmark = pytest.mark.interpreted

CASES = 40 if backends.INTERPRETING else 1000
MANY = 400 if backends.INTERPRETING else 10_000
TRAINED = ("x", "scale_row", "scale_col", "bias")


def strided(draw: random.Random, tensor: Tensor) -> Tensor:
    """Equal values in another layout: transposed, every second element, elsewhere in memory, lazily negated."""
    kind = draw.choice(("as it is", "as it is", "transposed", "sliced", "shifted", "negated"))
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if kind == "shifted":
        memory = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
        return memory[3:].view(tensor.shape).copy_(tensor)
    if kind == "negated" and tensor.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    return tensor


class RandomCall:
    """One layout of a call; :meth:`values` fills it with other numbers each time."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backend = draw.choice(BACKENDS)
        self.groups, self.rank = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 1, 2, 4, 5, 17))
        self.n, self.k = self.groups * draw.randint(1, 24), draw.randint(1, 48)
        self.lead = draw.choice(((), (1,), (draw.randint(2, 40),), (2, draw.randint(1, 7)), (0, 3), (2, 1, 3)))
        self.dtype = draw.choice(DTYPES)
        half = self.dtype in (torch.float16, torch.bfloat16)
        self.weight_dtype = torch.float32 if half and draw.random() < 0.3 else self.dtype
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.scale_dtype = self.dtype if draw.random() < 0.2 else wide
        self.vectors = self.rank == 1 and draw.random() < 0.5
        self.missing = draw.choice((None, None, None, None, "scale_row", "scale_col")) if self.rank == 1 else None
        self.vectors |= self.missing == "scale_row"  # without its rows, s_c has one rank
        self.bias, self.residual = draw.random() < 0.7, draw.random() < 0.8
        self.trained = {name for name in TRAINED if draw.random() < 0.6}
        self.expanded = len(self.lead) > 0 and draw.random() < 0.1
        self.hook = draw.choice((None, None, "clone", "offload", "transposed"))
        # Autocast is for float32 inputs; the Triton interpreter has no bfloat16.
        self.autocast = self.dtype == torch.float32 and draw.random() < 0.15 and torch.float16 in DTYPES
        self.seed = seed
        self.memory = draw.getstate()

    def values(self) -> dict[str, Tensor | None]:
        """New numbers in this call's layout."""
        self.draw.setstate(self.memory)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            values = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)
            return strided(self.draw, values)

        lead = (1,) * len(self.lead) if self.expanded else self.lead
        x = normal(*lead, self.k, dtype=self.dtype)
        row = (self.n,) if self.vectors else (self.n, self.rank)
        col = (self.k,) if self.vectors else (self.rank, self.k)
        col = (self.groups, *col) if self.groups > 1 or self.draw.random() < 0.5 else col
        tensors = {
            "x": x.expand(*self.lead, self.k) if self.expanded else x,
            "weight": normal(self.n, self.k, dtype=self.weight_dtype),
            "scale_row": normal(*row, dtype=self.scale_dtype),
            "scale_col": normal(*col, dtype=self.scale_dtype),
            "bias": normal(self.n, dtype=self.scale_dtype) if self.bias else None,
            "grad_y": normal(*self.lead, self.n, dtype=torch.float16 if self.autocast else self.dtype),
        }
        if self.missing is not None:
            tensors[self.missing] = None
        return tensors

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if k not in ("draw", "generator", "memory")}
        return f"case {self.seed}: {shown}"

    def check(self) -> None:
        """Three calls: the first is computed, and the others may be replayed."""
        for _ in range(3):
            tensors = self.values()
            found, expected, bound = self.run(tensors), self.exact(tensors), self.exact(tensors, absolute=True)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                dtypes = {torch.float16} if self.autocast else {self.dtype}
                roundoff = max(torch.finfo(dtype).eps for dtype in dtypes | {value.dtype}) / 2
                error = (value.double() - expected[name]).norm()
                assert error <= numerics.BOUND * roundoff * bound[name].norm() + 1e-300, f"{name} of {self}"

    def run(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        leaves = {
            name: t if t is None else t.detach().requires_grad_(name in self.trained)
            for name, t in tensors.items()
            if name != "grad_y"
        }
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=torch.float16))
            if self.hook == "offload":
                stack.enter_context(torch.autograd.graph.save_on_cpu())
            elif self.hook is not None:
                unpack = torch.clone if self.hook == "clone" else _transposed
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack))
            y = rlrr_linear(**leaves, residual=self.residual, backend=self.backend)
            wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
            grads = torch.autograd.grad(y, list(wanted.values()), tensors["grad_y"]) if wanted else ()
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}

    def exact(self, tensors: dict[str, Tensor | None], absolute: bool = False) -> dict[str, Tensor]:
        """In float64, of what the call was given; or of absolute values, which is the bound."""
        if self.autocast:
            tensors = tensors | {"x": tensors["x"].half()}
        t = {k: None if v is None else v.double().abs() if absolute else v.double() for k, v in tensors.items()}
        leaves = {k: v if v is None else v.requires_grad_(k in self.trained) for k, v in t.items() if k != "grad_y"}
        row, col = canonical(leaves["scale_row"], leaves["scale_col"], leaves["weight"])
        y = rlrr_linear_reference(
            leaves["x"], leaves["weight"], row.double(), col.double(), leaves["bias"], residual=self.residual
        )
        wanted = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), t["grad_y"]) if wanted else ()
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("first", range(0, CASES, CASES // (4 if backends.INTERPRETING else 20)))
def test_random_calls(first: int):
    for seed in range(first, first + CASES // (4 if backends.INTERPRETING else 20)):
        RandomCall(seed).check()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(CASES, MANY, CASES))
def test_many_random_calls(first: int):
    for seed in range(first, first + CASES):
        RandomCall(seed).check()
