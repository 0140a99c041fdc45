"""``rlrr_linear_multi``: every form of its arguments against the formula in float64, errors, and what calls it."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels import rlrr_linear_multi
from rlrr_kernels.reference import rlrr_linear_multi_reference
from tests.support.implementations import BACKENDS

N, K, T = 66, 40, 5
INDICES = {
    "unsorted": [3, -1, 0, 3, 0, -1, 4],
    "grouped": [4, 4, 4, -1, 0, 0, 2],
    "bare": [-1] * 7,
    "one": [2] * 7,
    "all": [0, 1, 2, 3, 4, -1, 0],
}


@pytest.fixture(params=BACKENDS)
def backend(request, poisoned_memory):
    return request.param


def draw(index, *shape, rank=None, groups=None, dtype=torch.float64, tasks=T, bias=True, shift=True):
    """Arguments of a call: x [S, *shape, K] and stacks of one of the forms."""
    generator = torch.Generator().manual_seed(len(index) + tasks)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    ranks = () if rank is None else (rank,)
    return {
        "x": normal(len(index), *shape, K),
        "weight": normal(N, K, scale=K**-0.5),
        "scale_row": normal(tasks, N, *ranks),
        "scale_col": normal(tasks, *(() if groups is None else (groups,)), *ranks, K),
        "bias": normal(N) if bias else None,
        "shift": normal(tasks, N) if shift else None,
    }


def run(function, tensors, **options):
    """y and the gradients of all but the weight under a fixed upstream gradient."""
    leaves = {k: None if v is None else v.detach().clone().requires_grad_(k != "weight") for k, v in tensors.items()}
    y = function(*leaves.values(), **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    wanted = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream, allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, wanted.values(), strict=True)
    )
    return {"y": y.detach(), **dict(zip(wanted, zeros, strict=True))}


def exact(tensors, **options):
    """The formula in float64. Its scales are in the long form where there are none."""
    return run(rlrr_linear_multi_reference, {k: v if v is None else v.double() for k, v in tensors.items()}, **options)


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize(("rank", "groups"), [(None, None), (None, 3), (3, None), (17, 2)])
def test_equals_the_formula_with_gradients(backend, name, rank, groups):
    index = INDICES[name]
    tensors = draw(index, 3, rank=rank, groups=groups)
    expected = exact(tensors, index=torch.tensor(index))
    actual = run(rlrr_linear_multi, tensors, index=torch.tensor(index), backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
