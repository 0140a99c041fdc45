"""Every backend against float64, by the error rule of ``rlrr_kernels.numerics``."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrr_kernels import backends, devices, numerics, rlrr_linear
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.reference import rlrr_linear_reference
from tests.support.implementations import BACKENDS, DTYPES, HALF, ONE_PATH, PROBLEMS

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned_memory")]

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_one_path = pytest.mark.parametrize("backend", ONE_PATH)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@on_every_backend
@pytest.mark.parametrize(("shape", "dtype"), PROBLEMS, ids=lambda part: str(part).removeprefix("torch."))
def test_error_rule(backend: str, dtype: torch.dtype, shape: tuple):
    numerics.check_error_rule(partial(rlrr_linear, backend=backend), Case(*shape, dtype=dtype))


@on_one_path
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("scales", ["scales in the compute dtype", "fp32 weight"])
def test_error_rule_of_mixed_dtypes(backend: str, dtype: torch.dtype, scales: str):
    options = {"scale_dtype": dtype} if scales.startswith("scales") else {"weight_dtype": torch.float32}
    numerics.check_error_rule(partial(rlrr_linear, backend=backend), Case(40, 99, 70, 1, 3, dtype=dtype, **options))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_where_the_rescaled_weight_cancels(backend: str, dtype: torch.dtype):
    for rows, rank in ((3, 1), (60, 4)):
        tensors = numerics.cancelling(Case(rows, 99, 70, rank, dtype=dtype).draw(0))
        numerics.check_bound(partial(rlrr_linear, backend=backend), tensors)


@on_every_backend
@pytest.mark.parametrize("zero", ["scale_row", "scale_col"])
def test_scales_of_zero_leave_the_weight_and_have_gradients(backend: str, zero: str):
    tensors = Case(9, 33, 70, 1, 3).draw(1)
    tensors[zero].zero_()
    numerics.check_bound(partial(rlrr_linear, backend=backend), tensors)
    gradients = numerics.outputs(partial(rlrr_linear, backend=backend), tensors, True)
    assert gradients[zero].abs().max() > 0


def exact_case(**changes) -> dict[str, torch.Tensor]:
    """A float64 problem: layouts and masks are tried where rounding cannot hide a wrong index."""
    return Case(
        **{"rows": 40, "out_features": 99, "in_features": 70, "groups": 3, "dtype": torch.float64} | changes
    ).draw(0)


@on_every_backend
@pytest.mark.parametrize(("rows", "cols", "count"), [(99, 70, 0), (0, 70, 5), (99, 0, 5), (1, 1, 1), (3, 1, 300)])
@pytest.mark.parametrize("rank", [1, 4])
def test_extreme_shapes(backend: str, rows: int, cols: int, count: int, rank: int):
    tensors = exact_case(rows=count, out_features=rows, in_features=cols, groups=1, rank=rank)
    numerics.check_bound(partial(rlrr_linear, backend=backend), tensors)


@pytest.mark.skipif(not backends.INTERPRETING, reason="Triton's kernels alone split products")
@pytest.mark.parametrize(("count", "rows", "cols"), [(7, 33, 500), (16, 130, 30), (5, 96, 320), (1, 40, 200)])
@pytest.mark.parametrize("rank", [1, 4])
def test_products_that_fill_no_gpu_are_computed_in_parts(
    count: int, rows: int, cols: int, rank: int, monkeypatch: pytest.MonkeyPatch
):
    from rlrr_kernels.ops.host import launch
    from rlrr_kernels.ops.linear.triton import kernels as linear_kernels

    started, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda launch: started.append(launch.plan.kernel) or run(launch))
    groups = 1 if rows % 3 else 3
    tensors = exact_case(rows=count, out_features=rows, in_features=cols, groups=groups, rank=rank)
    for problem in (tensors, {name: tensor for name, tensor in tensors.items() if name != "bias"}):
        numerics.check_bound(partial(rlrr_linear, backend="triton.fused"), problem)
    assert linear_kernels.sum_splits_kernel in started


@pytest.mark.skipif(not backends.INTERPRETING, reason="Triton's kernels alone split products")
def test_error_rule_in_parts():
    case = Case(16, 40, 260, dtype=torch.float16)
    gpu = devices.typical("interpreter")
    tiles = configs.tiles_for("forward", gpu, case.dtype, case.rows)
    assert configs.contraction_splits(5, 2, tiles, gpu) == 2
    numerics.check_error_rule(partial(rlrr_linear, backend="triton.fused"), case)


@on_one_path
def test_strides(backend: str):
    tensors = exact_case(rank=2)
    reference = numerics.exact_outputs(tensors, True)

    def every_other(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(2, dim=-1)[..., ::2]

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT

    for layout in (every_other, transposed):
        for name in tensors:
            if name == "bias" and layout is transposed:
                continue
            strided = tensors | {name: layout(tensors[name])}
            assert strided[name].numel() <= 1 or not strided[name].is_contiguous()
            actual = numerics.outputs(partial(rlrr_linear, backend=backend), strided, True)
            for key, value in actual.items():
                torch.testing.assert_close(value, reference[key], rtol=1e-12, atol=1e-12, msg=f"{layout} {name} {key}")


@on_one_path
def test_expanded_gradient_and_leading_dimensions(backend: str):
    tensors = exact_case(rows=24)
    x = tensors["x"].view(2, 3, 4, 70).transpose(0, 2).requires_grad_()
    parameters = [tensors[name].requires_grad_() for name in ("scale_row", "scale_col", "bias")]
    results = []
    for function in (partial(rlrr_linear, backend=backend), rlrr_linear_reference):
        y = function(x, tensors["weight"], *parameters)
        assert y.shape == (4, 3, 2, 99)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *parameters])])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize(
    ("row_shape", "col_shape"),
    [((99,), (70,)), ((99,), (3, 70)), ((99, 4), (4, 70)), ((99, 4), (3, 4, 70)), (None, (70,)), (None, (3, 70)),
     ((99,), None), ((99, 4), None), (None, None)],
)  # fmt: skip
def test_every_form_of_the_scales(backend: str, row_shape, col_shape):
    tensors = exact_case()
    row = None if row_shape is None else torch.randn(row_shape, dtype=torch.float64, requires_grad=True)
    col = None if col_shape is None else torch.randn(col_shape, dtype=torch.float64, requires_grad=True)
    wide_row = torch.ones(99, dtype=torch.float64) if row is None else row
    wide_col = torch.ones(70, dtype=torch.float64) if col is None else col
    if col is None and wide_row.dim() == 2:
        wide_col = wide_col.expand(wide_row.shape[1], 70)
    leaves = [leaf for leaf in (row, col) if leaf is not None]
    y = rlrr_linear(tensors["x"], tensors["weight"], row, col, backend=backend)
    exact = rlrr_linear_reference(tensors["x"], tensors["weight"], wide_row, wide_col)
    torch.testing.assert_close(y, exact)
    if leaves:
        ours = torch.autograd.grad(y, leaves, tensors["grad_y"])
        for mine, theirs in zip(ours, torch.autograd.grad(exact, leaves, tensors["grad_y"]), strict=True):
            torch.testing.assert_close(mine, theirs)


@on_one_path
def test_every_pattern_of_needed_gradients(backend: str):
    tensors = exact_case()
    names = ("x", "scale_row", "scale_col", "bias")
    full = numerics.outputs(partial(rlrr_linear, backend=backend), tensors, True)
    for pattern in itertools.product((False, True), repeat=4):
        leaves = {name: tensors[name].detach().requires_grad_(need) for name, need in zip(names, pattern, strict=True)}
        y = rlrr_linear(leaves["x"], tensors["weight"], *list(leaves.values())[1:], backend=backend)
        assert y.requires_grad == any(pattern)
        if any(pattern):
            y.backward(tensors["grad_y"])
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[name], rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


@on_one_path
def test_same_input_same_bits(backend: str):
    tensors = Case(197, 99, 131, 2, 3).draw(0)
    first = numerics.outputs(partial(rlrr_linear, backend=backend), tensors, True)
    again = numerics.outputs(partial(rlrr_linear, backend=backend), tensors, True)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@on_every_backend
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("count", "rank", "groups"), [(3, 1, 1), (3, 2, 3), (80, 1, 3)])
def test_gradcheck(backend: str, residual: bool, count: int, rank: int, groups: int):
    if backends.INTERPRETING and count > 3:
        pytest.skip("thousands of interpreted launches")
    size = (6, 5)
    tensors = Case(count, *size, rank, groups, dtype=torch.float64).draw(0)
    leaves = [tensors[name].requires_grad_() for name in ("x", "scale_row", "scale_col", "bias")]

    def function(x, scale_row, scale_col, bias):
        return rlrr_linear(x, tensors["weight"], scale_row, scale_col, bias, residual=residual, backend=backend)

    torch.autograd.gradcheck(function, leaves, fast_mode=backends.INTERPRETING or count > 3)


@on_one_path
@settings(max_examples=8 if backends.INTERPRETING else 150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject):
    check_drawn(backend, data, (1, 2, 5, 17 if backends.INTERPRETING else 64))


@pytest.mark.slow
@pytest.mark.skipif(not backends.INTERPRETING, reason="all that the quick test does not draw is the interpreter's")
@on_every_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_more_shapes_strides_and_dtypes(backend: str, data: st.DataObject):
    check_drawn(backend, data, (1, 2, 5, 64))


def check_drawn(backend: str, data: st.DataObject, ranks: tuple[int, ...]) -> None:
    groups = data.draw(st.integers(1, 4), "groups")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    case = Case(
        rows=data.draw(st.integers(0, 70), "M"),
        out_features=groups * data.draw(st.integers(1, 40), "N / G"),
        in_features=data.draw(st.integers(1, 80), "K"),
        rank=data.draw(st.sampled_from(ranks), "rank"),
        groups=groups,
        bias=data.draw(st.booleans(), "bias"),
        residual=data.draw(st.booleans(), "residual"),
        dtype=dtype,
        weight_dtype=data.draw(st.sampled_from((dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)), "weight"),
        scale_dtype=data.draw(st.sampled_from((torch.float32, dtype)), "scales"),
    )
    tensors = case.draw(data.draw(st.integers(0, 1000), "seed"))
    for name in ("x", "grad_y", "weight"):
        if data.draw(st.booleans(), f"{name} transposed"):
            tensors[name] = tensors[name].t().contiguous().t()
    numerics.check_bound(partial(rlrr_linear, backend=backend), tensors, case.residual)
