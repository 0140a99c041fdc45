"""Every kernel beside the products, executed from compiled PTX: norm, activations, sampled rows, their draw."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, norm_rescale, numerics, rlrr_mlp, use_backend

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import Case, MlpCase
from rlrr_kernels.ops.activation.functions import ACTIVATIONS
from rlrr_kernels.ops.sampling import triton_draw
from rlrr_kernels.ops.sampling.row_sample import sample_rows, smallest_keys
from rlrr_kernels.reference import norm_rescale_reference, rlrr_mlp_reference
from tests.ops.sampling.test_scale_grad_rows import draw_images, draw_sample, error_rule_of_estimate
from tests.support.ptx.launcher import TARGETS, by_arch, executed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

on_every_arch = pytest.mark.parametrize("arch", TARGETS)
poisoned = pytest.mark.usefixtures("poisoned_memory")
slow = pytest.mark.slow


def names(launches: list) -> set[str]:
    return {launch.plan.kernel.__name__ for launch in launches}


# ---------------------------------------------------------------- the norm


def norm_outputs(function, dtype: torch.dtype, compute: torch.dtype, seed: int, rows: int, size: int, affine: bool):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(compute)

    weight, bias = (draw(size), draw(size)) if affine else (None, None)
    leaves = [draw(rows, size).requires_grad_(), draw(size).requires_grad_(), draw(size).requires_grad_()]
    y = function(leaves[0], weight, bias, *leaves[1:], 1e-6)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw(rows, size))]


@poisoned
@on_every_arch
@pytest.mark.parametrize(
    ("dtype", "rows", "size", "affine"),
    [
        (BF16, 70, 200, True),
        (FP32, 70, 200, True),
        (FP16, 35, 384, False),
        pytest.param(BF16, 33, 1280, True, marks=slow),
    ],
)
def test_norm_rescale(arch: str, dtype: torch.dtype, rows: int, size: int, affine: bool):
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(4):
        given = seed, rows, size, affine
        exact = norm_outputs(norm_rescale_reference, dtype, torch.float64, *given)
        eager = norm_outputs(norm_rescale_reference, dtype, dtype, *given)
        with use_backend("triton"), executed(arch) as launches:
            ours = norm_outputs(norm_rescale, dtype, dtype, *given)
        for index, found in enumerate((ours, eager)):
            errors = [numerics.relative_error(*pair) for pair in zip(found, exact, strict=True)]
            squares[index] += torch.tensor(errors, dtype=torch.float64) ** 2
    assert names(launches) == {
        "_norm_rescale_fwd_kernel", "_norm_rescale_bwd_kernel", "_norm_rescale_bwd_reduce_kernel"
    }  # fmt: skip
    ours, eager = squares.sqrt()
    assert (ours <= numerics.RATIO * eager).all(), f"y, dx, dscale, dshift: {ours.tolist()} against {eager.tolist()}"


# ---------------------------------------------------------------- activations


@poisoned
@pytest.mark.parametrize(("arch", "activation"), by_arch([pytest.param(name, id=name) for name in ACTIVATIONS]))
@pytest.mark.parametrize(
    "dtype", [BF16, pytest.param(FP16, marks=slow), pytest.param(FP32, marks=slow)], ids=["bf16", "fp16", "fp32"]
)
def test_mlp(arch: str, activation: str, dtype: torch.dtype):
    """The backward of the activation, whose value it computes again."""
    case = MlpCase(70, 48, 96, 64, 1, 3, dtype=dtype)
    reference = partial(rlrr_mlp_reference, activation=activation)
    with executed(arch) as launches:
        ours = partial(rlrr_mlp, activation=activation, backend="triton.fused")
        numerics.check_error_rule(ours, case, 3, reference)
    assert "_activation_bwd_kernel" in names(launches)


# ---------------------------------------------------------------- sampled rows


@poisoned
@pytest.mark.parametrize(
    ("arch", "shape", "sample", "dtype"),
    by_arch(
        [
            pytest.param((197, 64, 80, 1, 1), draw_sample(197, 67, 17), BF16, id="plain"),
            pytest.param((200, 99, 70, 1, 3), draw_images(8, 25, 1, 6), BF16, id="images"),
            pytest.param((130, 66, 67, 4, 1), draw_images(2, 65, 0, 33), FP32, id="images, nothing kept"),
            pytest.param((520, 96, 80, 1, 3), draw_images(4, 130, 1, 64), FP16, id="images, many drawn"),
            pytest.param((130, 66, 67, 4, 1), draw_sample(130, 33, 0), FP32, id="plain, nothing kept", marks=slow),
        ]
    ),
)
def test_sampled_scales(arch: str, shape: tuple[int, ...], sample, dtype: torch.dtype):
    with executed(arch) as launches:
        errors = error_rule_of_estimate(Case(*shape, dtype=dtype), sample, "triton.fused", 3)
    expected = {"_rlrr_linear_bwd_sampled_scales_kernel", "rlrr_linear_bwd_reduce_kernel"}
    expected |= {"_rlrr_linear_bwd_image_means_kernel"} if sample.images else set()
    assert names(launches) >= expected
    assert all(ours <= numerics.RATIO * eager for ours, eager in errors.values()), errors


@on_every_arch
@pytest.mark.parametrize(("images", "others", "drawn", "prefix"), [(5, 49, 12, 1), (3, 196, 49, 0), (2, 7, 7, 20)])
def test_the_draw_of_rows(arch: str, images: int, others: int, drawn: int, prefix: int):
    keys = torch.rand(images, others, generator=torch.Generator().manual_seed(0))
    keys[0, 3] = keys[0, 4]  # the first of two alike
    first = torch.arange(0, images * (prefix + others), prefix + others)[:, None]
    with executed(arch):
        found = triton_draw.smallest_keys(keys, drawn, prefix)
    assert torch.equal(found, smallest_keys(keys, first, drawn, prefix))


def test_a_layer_draws_by_the_kernel():
    with use_backend("triton"), executed("sm_90") as launches:
        sample = sample_rows(torch.Size((4, 50, 8)), 0.25, 1, torch.device("cpu"))
    assert names(launches) == {"_smallest_keys_kernel"}
    assert sample.index[:4].tolist() == [0, 50, 100, 150]
