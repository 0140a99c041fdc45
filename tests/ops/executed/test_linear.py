"""``rlrr_linear`` executed from compiled PTX, forward and backward, against float64 by the error rule."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, numerics, rlrr_linear

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import Case
from tests.support.matmul_precision import switched
from tests.support.ptx.launcher import by_arch, executed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

poisoned = pytest.mark.usefixtures("poisoned_memory")


def case(name: str, *sizes: int, slow: bool = False, **options):
    return pytest.param(Case(*sizes, **options), id=name, marks=[pytest.mark.slow] if slow else [])


CASES = [  # M, N, K, rank, groups
    case("bf16", 96, 160, 144, 1, 1, dtype=BF16),
    case("bf16 groups", 72, 144, 160, 4, 3, dtype=BF16),
    case("bf16 ragged", 67, 99, 70, 17, 3, dtype=BF16),
    case("bf16 rank 32", 136, 128, 160, 32, 1, dtype=BF16),
    case("fp32 rank 8", 67, 96, 80, 8, 3, dtype=FP32),
    case("bf16 rank 5", 136, 128, 160, 5, 1, dtype=BF16),
    case("bf16 rank 64 ragged", 40, 99, 70, 64, 1, dtype=BF16, slow=True),
    case("fp32 rank 32", 67, 96, 80, 32, 3, dtype=FP32, slow=True),
    case("bf16 in parts", 16, 64, 2048, 1, 1, dtype=BF16),
    case("bf16 many rows", 300, 192, 136, 1, 3, dtype=BF16, residual=False),
    case("bf16, W in fp32", 130, 96, 80, 1, 1, dtype=BF16, weight_dtype=FP32),
    case("fp16", 130, 96, 80, 4, 1, dtype=FP16, residual=False),
    case("fp16 ragged", 67, 99, 70, 1, 3, dtype=FP16, bias=False),
    case("fp32", 67, 96, 80, 1, 3, dtype=FP32),
    case("fp32 ragged", 67, 99, 70, 17, 1, dtype=FP32, residual=False),
    case("fp64", 37, 66, 72, 1, 1, dtype=torch.float64, slow=True),
    case("bf16 ragged, rank 4", 67, 99, 70, 4, 3, dtype=BF16, slow=True),
    case("fp16 in parts", 16, 64, 2048, 1, 1, dtype=FP16, slow=True),
    case("fp32 rank 4", 130, 96, 80, 4, 3, dtype=FP32, slow=True),
    case("fp16, W in fp32", 130, 96, 80, 1, 1, dtype=FP16, weight_dtype=FP32, slow=True),
]


@poisoned
@pytest.mark.parametrize(("arch", "case"), by_arch(CASES))
def test_fused(arch: str, case: Case):
    with executed(arch):
        numerics.check_error_rule(partial(rlrr_linear, backend="triton.fused"), case, seeds=3)


@poisoned
@pytest.mark.parametrize(("arch", "dtype"), by_arch([pytest.param(BF16, id="bf16"), pytest.param(FP32, id="fp32")]))
def test_the_merge(arch: str, dtype: torch.dtype):
    with executed(arch) as launches:
        case = Case(33, 99, 70, 4, 3, dtype=dtype)
        numerics.check_error_rule(partial(rlrr_linear, backend="triton.merge"), case, seeds=8)
    assert {launch.plan.kernel.__name__ for launch in launches} >= {"merge_kernel"}


TF32_SIZES = (69, 96, 144, 4, 3), (16, 64, 160, 1, 1), (67, 99, 70, 17, 3)


@poisoned
@pytest.mark.parametrize(("arch", "sizes"), by_arch([pytest.param(sizes, id=str(sizes)) for sizes in TF32_SIZES]))
def test_tf32_products(arch: str, sizes: tuple[int, ...]):
    """Operands keep 10 bits of fp32's 23; half a unit of these is the roundoff."""
    with switched("high"), executed(arch) as launches:
        errors = numerics.bound_errors(partial(rlrr_linear, backend="triton.fused"), Case(*sizes).draw(0))
    assert {launch.plan.meta.get("PRECISION") for launch in launches} >= {"tf32"}
    assert errors["bias"] <= numerics.BOUND
    assert all(error <= numerics.BOUND * 2**13 for error in errors.values()), errors
    assert errors["y"] > numerics.BOUND, "the products are exact, so they are not TF32's"


@poisoned
def test_the_order_of_warps_does_not_matter():
    drawn = Case(40, 96, 80, 1, 3, dtype=BF16).draw(0)
    found = []
    for seed in (None, 0, 1):
        with executed("sm_80", seed):
            found.append(numerics.outputs(partial(rlrr_linear, backend="triton.fused"), drawn, True))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name
