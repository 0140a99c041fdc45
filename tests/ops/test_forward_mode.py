"""Forward-mode derivatives: refused by every operator, in the same words, under ``jvp`` and on dual tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rlrr_kernels import NormRescale, RLRRConv2d, RLRRLinear, rlrr_linear_multi, rlrr_mlp
from rlrr_kernels.ops.second_order import ReverseOnly

CONV = RLRRConv2d(1, 2, 3)
LINEAR = RLRRLinear(16, 4)
NORM = NormRescale(nn.LayerNorm(16))


def of_many_tasks(x: Tensor) -> Tensor:
    return rlrr_linear_multi(x, LINEAR.weight, torch.ones(2, 4), torch.ones(2, 16), index=torch.tensor([1, 0, -1]))


def mlp(x: Tensor) -> Tensor:
    first, second = RLRRLinear(16, 4), RLRRLinear(4, 5)
    return rlrr_mlp(x, *(t for fc in (first, second) for t in (fc.weight, fc.scale_row, fc.scale_col, fc.bias)))


FUNCTIONS = {
    "linear": LINEAR,
    "many tasks": of_many_tasks,
    "convolution": lambda x: CONV(x.view(3, 1, 4, 4)),
    "norm": NORM,
    "mlp": mlp,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])  # which turns reverse mode off alone
def test_dual_tensors_are_refused_by_name(name: str, context: type):
    FUNCTIONS[name](torch.ones(3, 16))  # a layout that is known
    with forward_ad.dual_level(), context():
        x = forward_ad.make_dual(torch.ones(3, 16), torch.ones(3, 16))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            FUNCTIONS[name](x)


def test_no_autograd_function_answers_in_words_of_torch():
    inside = [f for f in _functions(torch.autograd.Function) if f.__module__.startswith("rlrr_kernels.")]
    assert inside
    assert [f for f in inside if not issubclass(f, ReverseOnly)] == []


def _functions(base: type) -> list[type]:
    return [f for child in type.__subclasses__(base) for f in (child, *_functions(child))]
