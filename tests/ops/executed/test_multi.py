"""The kernels of ``rlrr_linear_multi`` executed from compiled PTX: against float64, in other orders, with faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import TaskIndex, backends, numerics, rlrr_linear_multi

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import MultiCase
from rlrr_kernels.ops.host.launch import Launch, recorded
from rlrr_kernels.ops.multi.triton import path
from rlrr_kernels.reference import rlrr_linear_multi_reference
from tests.ops.multi.test_triton import MIXED, SCALES, SUM, TILES, names
from tests.support.ptx import Fault
from tests.support.ptx.launcher import TARGETS, changed, execute, executed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

on_every_arch = pytest.mark.parametrize("arch", TARGETS)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has rows mixed as soon as that is less work, though a launch more costs more than these tests' products."""
    return lambda: monkeypatch.setattr(path, "KERNEL_US", 0.0)


def case(name: str, kernels: set[str], index: tuple[int, ...], *sizes: int, slow: bool = False, **options):
    """Index, rows a sample, N, K, T, rank and groups."""
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(MultiCase(index, *sizes, **options), kernels, id=name, marks=marks)


CASES = [
    case("bf16", TILES, (2, -1, 0), 37, 96, 144, 3, 1, 1, dtype=BF16),
    case("bf16 mixed, groups", MIXED, (*range(9), -1), 2, 96, 64, 9, 3, 3, dtype=BF16),
    case("bf16 mixed in parts", MIXED, (0, 2, -1, 3, 1), 1, 64, 1040, 4, 1, 1, dtype=BF16, slow=True),
    case("bf16 groups, rank 4", TILES, (2, 0), 70, 144, 80, 3, 4, 3, dtype=BF16, slow=True),
    case("bf16 ragged", TILES, (0, 3, -1, 1), 33, 99, 70, 5, 4, 3, dtype=BF16, residual=False, slow=True),
    case("bf16 mixed, ragged", MIXED, (0, 3, 1, -1, 2), 3, 99, 70, 5, 1, 3, dtype=BF16, residual=False, slow=True),
    case("bf16 rank 17", TILES, (1, 0), 33, 96, 80, 3, 17, 1, dtype=BF16, slow=True),
    case("bf16, W in fp32", TILES, (0, 1), 20, 96, 80, 2, 1, 1, dtype=BF16, weight_dtype=FP32, slow=True),
    case("fp16 mixed, rank 7", MIXED, (0, 3, 1, -1), 1, 64, 144, 4, 7, 1, dtype=FP16, slow=True),
    case("fp32", TILES, (1, 0, -1), 33, 96, 80, 3, 1, 3, dtype=FP32, slow=True),
    # Of a few rows the eager product sums in another order, to half the error of any sum in sequence.
    case("fp32 mixed", MIXED, (1, 0, -1, 2, 3, 4), 8, 96, 80, 5, 1, 3, dtype=FP32, slow=True),
    case("fp64", TILES, (1, 0), 20, 66, 72, 2, 1, 1, dtype=torch.float64, slow=True),
]


@on_every_arch
@pytest.mark.parametrize(("case", "kernels"), CASES)
def test_error_rule(arch: str, case: MultiCase, kernels: set[str], mix: Callable[[], None]):
    index = torch.tensor(case.index)
    if kernels is MIXED:
        mix()
    with executed(arch) as launches:
        numerics.check_error_rule(
            partial(rlrr_linear_multi, index=index, backend="triton.fused"), case, 3,
            partial(rlrr_linear_multi_reference, index=index),
        )  # fmt: skip
    assert names(launches) - SUM == kernels | SCALES


def test_wide_tiles_on_hopper():
    """An image's 197 rows in a tile of 256, by which this GPU alone multiplies them."""
    generator, index = torch.Generator().manual_seed(0), torch.tensor([1, 0])
    x, weight, row, col = (
        torch.randn(shape, generator=generator).to(BF16) for shape in ((2, 197, 128), (128, 128), (2, 128), (2, 128))
    )
    x.requires_grad_()
    with executed("sm_90") as launches:
        y = rlrr_linear_multi(x, weight, row, col, index=index, backend="triton.fused")
        (grad,) = torch.autograd.grad(y, x, y.detach())
    tiles = [launch.plan.meta for launch in launches]
    assert [launch.plan.kernel.__name__ for launch in launches] == [
        "rlrr_linear_multi_fwd_kernel", "rlrr_linear_multi_bwd_dx_kernel"
    ]  # fmt: skip
    assert [meta["BLOCK_M"] for meta in tiles] == [256, 256]
    merged = weight.double() * (1 + row.double()[index][:, :, None] * col.double()[index][:, None])
    exact = x.detach().double() @ merged.mT
    assert numerics.relative_error(y.detach(), exact) < 4e-3
    assert numerics.relative_error(grad, y.detach().double() @ merged) < 4e-3


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_the_order_of_warps_does_not_matter(arch: str, mix: Callable[[], None]):
    """Rests of tiles are mixed here, so that all kernels run."""
    mix()
    case = MultiCase((0, 1, 2), 65, 64, 80, 3, dtype=BF16)
    drawn, found = case.draw(0), []
    for seed in (None, 0):
        with executed(arch, seed) as launches:
            run = partial(rlrr_linear_multi, index=torch.tensor(case.index), backend="triton.fused")
            found.append(numerics.outputs(run, drawn, True))
    assert names(launches) - SUM == TILES | MIXED | SCALES
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


# ---------------------------------------------------------------- faults


def launches_of(index: list[int], rows: int) -> list[Launch]:
    """Those of a forward and a backward of small bf16 tensors, which end where the rows end."""
    case = MultiCase(tuple(index), rows, 80, 80, 3, dtype=BF16)
    drawn = case.draw(0)
    run = partial(rlrr_linear_multi, index=TaskIndex(index), backend="triton.fused")
    with executed("sm_80") as launches, recorded():
        numerics.outputs(run, drawn, True)
    return launches


FAULTS = {  # kernel and rows a sample; what is replaced by what; what the machine says, "" where results are wrong
    "rows of x past a task's last one are read": (
        ("fwd", 21),
        ("tl.minimum(offs_m, end - 1)", "offs_m + 0 * end"),
        "out of bounds: ",
    ),
    "rows past a task's last one are stored": (
        ("fwd", 21),
        ("offs_m, offs_m < end,", "offs_m, offs_m >= 0,"),
        "out of bounds: store",
    ),
    "the next task's shift": (
        ("fwd", 21),
        ("shift_ptr + task * N", "shift_ptr + (task + 1) * N"),
        "out of bounds: load",
    ),
    "rows of a mixed tile that are not there": (
        ("mixed", 1),
        ("    there = entry < count\n    a_row", "    there = entry >= 0\n    a_row"),
        "out of bounds: load",
    ),
    "a mixed row's line of another": (
        ("mixed", 1),
        ("lines % BLOCK_R", "lines % BLOCK_R // 2"),
        "",
    ),
    "the first part's sums for every task": (
        ("bwd_reduce", 21),
        ("first * row_count * row_size", "0"),
        "",
    ),
    "rests of a task's rows without a mask": (
        ("bwd_scales", 21),
        ("mask_m = here < rows_here\n", "mask_m = here >= 0\n"),
        "out of bounds: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_source_are_found(fault: str, tmp_path: Path, mix: Callable[[], None]):
    (kernel, rows), change, expected = FAULTS[fault]
    if kernel == "mixed":
        mix()
    launches = launches_of([0, 1, 2], rows)
    launch = next(ln for ln in launches if ln.plan.kernel.__name__ == f"rlrr_linear_multi_{kernel}_kernel")
    results = launch.tensors[2:] if kernel == "bwd_reduce" else launch.tensors[-1:]
    right = [tensor.clone() for tensor in results]
    for tensor in results:
        tensor.fill_(float("nan"))
    wrong = changed(launch, tmp_path, change)
    if expected:
        with pytest.raises(Fault, match=expected):
            execute(wrong, "sm_80")
    else:
        execute(wrong, "sm_80")
        assert not all(torch.equal(*pair) for pair in zip(right, results, strict=True))
