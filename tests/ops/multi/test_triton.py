"""The Triton kernels of ``rlrr_linear_multi`` in Triton's interpreter, and how a batch's rows are cut for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import TaskIndex, backends, devices, numerics, rlrr_linear_multi
from rlrr_kernels.numerics import MultiCase
from rlrr_kernels.ops.choice.tiles import Operand, Product
from rlrr_kernels.ops.host.launch import Launch, recorded
from rlrr_kernels.ops.multi import triton_backend
from rlrr_kernels.ops.multi.triton import path
from rlrr_kernels.ops.multi.triton.launches import parts_of
from rlrr_kernels.reference import rlrr_linear_multi_reference
from tests.ops.multi.test_operator import N, draw, run

pytestmark = pytest.mark.interpreted

needs_interpreter = pytest.mark.skipif(not backends.INTERPRETING, reason="runs the kernels")
fused = partial(rlrr_linear_multi, backend="triton.fused")

TILES = {"rlrr_linear_multi_fwd_kernel", "rlrr_linear_multi_bwd_dx_kernel"}
MIXED = {"rlrr_linear_multi_mixed_kernel"}
SUM = {"rlrr_linear_multi_mixed_sum_kernel"}
"""Where products of few rows are computed in parts."""
SCALES = {"rlrr_linear_multi_bwd_scales_kernel", "rlrr_linear_multi_bwd_reduce_kernel"}


@pytest.fixture
def mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are mixed as soon as that is less work, though a launch more costs more than these tests' products."""
    monkeypatch.setattr(path, "KERNEL_US", 0.0)


exact = partial(run, rlrr_linear_multi_reference)


def names(launches: list[Launch]) -> set[str]:
    return {launch.plan.kernel.fn.__name__ for launch in launches}


# ---------------------------------------------------------------- results


def check(index: list[int], *shape: int, backend: str = "triton.fused", **options) -> set[str]:
    """Against the formula in float64, where rounding hides no wrong index; which kernels ran."""
    residual = options.pop("residual", True)
    tensors, given = draw(index, *shape, **options), {"index": torch.tensor(index), "residual": residual}
    with recorded() as launches:
        actual = run(rlrr_linear_multi, tensors, **given, backend=backend)
    torch.testing.assert_close(actual, exact(tensors, **given), rtol=1e-10, atol=1e-10)
    return names(launches)


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("index", "rows", "options"),
    [
        ([4, 0, 0, -1], 19, {}),
        ([2, 3], 35, {"rank": 3, "groups": 3, "bias": False}),
        ([1, 0], 17, {"rank": 17, "residual": False, "shift": False}),
    ],
    ids=["rank 1", "rank 3 in groups", "rank 17"],
)
def test_tiles_of_one_task(index: list[int], rows: int, options: dict):
    assert check(index, rows, **options) == TILES | SCALES


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory", "mixes")
@pytest.mark.parametrize(
    ("index", "shape", "options"),
    [
        ([4, 0, -1, 3, 1], (), {}),
        ([0, 3, 1, -1], (2,), {"rank": 3, "groups": 3, "residual": False}),
        ([3, -1, 0, 3, 0], (), {"rank": 2, "shift": False}),
    ],
    ids=["one row each", "rank 3 in groups", "samples of a task apart"],
)
def test_rows_of_many_tasks_in_a_tile(index: list[int], shape: tuple[int, ...], options: dict):
    ran = check(index, *shape, **options)
    assert ran - SUM == MIXED | SCALES
    assert ran & SUM or not options.get("groups"), "groups of the contraction are parts"


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory", "mixes")
def test_rests_of_tiles_are_mixed():
    assert check([0, 1, 2, 4], 17) - SUM == TILES | MIXED | SCALES


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [3, 100])
def test_tasks_are_merged_where_it_pays_or_is_asked_for(rows: int):
    """The interpreter's crossover is at 96 rows, whatever the GPU."""
    backend = "triton.merge" if rows < 96 else "triton"
    assert check([2, -1, 0], rows, backend=backend, rank=2) == {"merge_kernel"} | SCALES


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory", "mixes")
@pytest.mark.parametrize(
    ("dtype", "index", "rows"),
    [
        (torch.float32, (0, 2, -1), 40),
        (torch.float16, (0, 2, -1, 1, 4), 5),
        pytest.param(torch.float16, (0, 2, -1), 40, marks=pytest.mark.slow_interpreted),
        pytest.param(torch.float32, (0, 2, -1, 1, 4), 5, marks=pytest.mark.slow_interpreted),
    ],
    ids=["tiles fp32", "mixed fp16", "tiles fp16", "mixed fp32"],
)
def test_error_rule(dtype: torch.dtype, index: tuple[int, ...], rows: int):
    case = MultiCase(index, rows, 66, 70, 5, rank=2, groups=3, dtype=dtype)
    with recorded() as launches:
        numerics.check_error_rule(
            partial(fused, index=torch.tensor(index)), case, 4,
            partial(rlrr_linear_multi_reference, index=torch.tensor(index)),
        )  # fmt: skip
    assert names(launches) >= (TILES if rows == 40 else MIXED)


@needs_interpreter
@pytest.mark.usefixtures("mixes")
def test_a_row_that_is_not_finite_spoils_no_other():
    for shape in ((), (40,)):
        tensors = draw([0, 1, -1, 2], *shape)
        right = fused(*tensors.values(), index=torch.tensor([0, 1, -1, 2]))
        tensors["x"][1] = float("inf")
        tensors["scale_col"][2] = float("nan")
        y = fused(*tensors.values(), index=torch.tensor([0, 1, -1, 2]))
        assert torch.equal(y[0::2], right[0::2])
        assert not torch.isfinite(y[1::2]).any()


@needs_interpreter
def test_every_layout_of_x_and_the_weight():
    tensors = draw([0, 1, 2], 17, rank=2)
    expected = exact(tensors, index=torch.tensor([0, 1, 2]))
    for name in ("x", "weight"):
        changed = tensors | {name: tensors[name].mT.contiguous().mT}
        actual = run(fused, changed, index=torch.tensor([0, 1, 2]))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pattern", ["x", "scale_row", "scale_col", "bias", "shift", "bias shift", "scale_col bias"])
def test_gradients_that_are_asked_for_alone(pattern: str):
    index = torch.tensor([0, -1, 2])
    tensors = draw(index.tolist(), 9)
    expected = exact(tensors, index=index)
    leaves = {name: tensor.detach().requires_grad_(name in pattern.split()) for name, tensor in tensors.items()}
    y = fused(*leaves.values(), index=index)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    for name, grad in zip(asked, torch.autograd.grad(y, list(asked.values()), upstream), strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@needs_interpreter
def test_same_batch_same_bits():
    tensors = draw([0, 1, 2, -1], 33, dtype=torch.float32)
    found = [run(fused, tensors, index=torch.tensor([0, 1, 2, -1])) for _ in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# ---------------------------------------------------------------- what a batch costs beside its products


@needs_interpreter
def test_stacks_are_not_copied_and_tables_are_made_once_for_all_layers():
    index = TaskIndex([7, 9_999, -1])
    tensors = draw(index.index.tolist(), 17, tasks=10_000)
    with recorded() as launches:
        for _ in range(2):
            fused(*tensors.values(), index=index)
    ours = [launch for launch in launches if names([launch]) <= TILES]
    assert [launch.tensors[2].data_ptr() for launch in ours] == [tensors["scale_row"].data_ptr()] * 2
    assert ours[0].tensors[6] is ours[1].tensors[6]
    assert ours[0].tensors[6].tolist() == [[7, 0, 16], [7, 16, 17], [9999, 17, 33], [9999, 33, 34]]
    with recorded() as launches:  # ones that all tasks share
        fused(tensors["x"], tensors["weight"], None, tensors["scale_col"], index=index)
    assert max(tensor.untyped_storage().nbytes() for tensor in launches[0].tensors[2:3]) == 8 * N


# ---------------------------------------------------------------- which way the rows go


def product(kernel="forward", n=3072, k=768, rank=1, dtype=torch.bfloat16, weight_dtype=None, gpu="sm_90", stride=None):
    width = k if kernel == "forward" else n
    first = Operand((1, width), (stride or width, 1), dtype.itemsize, True)
    second = Operand((n, k), (k, 1), dtype.itemsize, True)
    return Product(kernel, devices.typical(gpu), dtype, weight_dtype or dtype, rank, first, second)


def cut(index, rows: int, merged=0, **options) -> path.Cut:
    """A batch's cut where tasks of ``merged`` or more rows are merged; 0: none."""
    segments = TaskIndex(list(index)).rows(rows).segments
    return path.cut_rows(segments, product(**options), lambda first, end: 0 < merged <= end - first)


def test_images_of_as_many_tasks_fill_a_tile_each_on_hopper():
    found = cut(range(64), 197)
    assert (found.library, found.mixed) == ((), ())
    assert found.tiled == tuple((task, 197 * task, 197 * (task + 1)) for task in range(64))
    assert found.tiles == path.WIDE["forward"]
    assert found.padding == pytest.approx(1 - 197 / 256)
    assert len(cut(range(64), 197, gpu="sm_80").tiled) == 128


def test_few_rows_a_task_are_mixed():
    found = cut([*range(63), -1], 1)
    assert (found.library, found.tiled) == ((), ())
    assert sorted(task for task, _, _ in found.mixed) == list(range(-1, 63))
    assert found.padding == 0.0


def test_mixing_is_left_where_it_would_round_too_often_or_repeat_x_too_often():
    for options in ({"weight_dtype": torch.float32}, {"rank": 8}):
        found = cut(range(64), 1, **options)
        assert (len(found.tiled), found.mixed, found.tiles.block_m) == (64, (), 16)
    assert len(cut(range(64), 1, rank=7).mixed) == 64


def test_rests_go_with_the_tiles_or_are_mixed_by_what_they_cost():
    alone, many = cut(range(64), 257), cut(range(2), 257)
    assert [end - first for _, first, end in alone.tiled] == [256] * 64
    assert [end - first for _, first, end in alone.mixed] == [1] * 64
    assert not many.mixed, "two rows are not worth two launches"
    before, after = (
        cut(range(64), 149),
        cut(range(64), 150),
    )  # from where one wide tile is cheaper, W' made for it included
    assert (before.tiles.block_m, len(before.tiled), len(before.mixed)) == (128, 64, 64)
    assert (after.tiles.block_m, len(after.tiled), len(after.mixed)) == (256, 64, 0)


def test_the_bare_weight_and_merged_tasks_are_the_librarys():
    found = cut([-1] * 8 + [0] * 16 + [1], 197, merged=1000)
    assert found.library == ((-1, 0, 1576), (0, 1576, 4728))
    assert {task for task, _, _ in found.tiled} == {1}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-1, 9), min_size=1, max_size=30), st.sampled_from([1, 3, 16, 65, 197, 600]), st.data())
def test_every_row_goes_one_way(index: list[int], rows: int, data: st.DataObject):
    gpu = data.draw(st.sampled_from(["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"]))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    kernel = data.draw(st.sampled_from(["forward", "grad_x"]))
    n, k = data.draw(st.sampled_from([(3072, 768), (771, 773)]))
    segments = TaskIndex(index).rows(rows, grouped=data.draw(st.booleans())).segments
    stride = data.draw(st.sampled_from([None, 4099]))
    given = product(kernel, n, k, data.draw(st.sampled_from([1, 4, 17])), dtype, None, gpu, stride)
    found = path.cut_rows(segments, given, lambda first, end: end - first > 1000)
    assert all(0 < end - first <= found.tiles.block_m for _, first, end in found.tiled)
    ways = found.library + found.tiled + found.mixed
    goes = sorted((row, task) for task, first, end in ways for row in range(first, end))
    assert goes == sorted((row, task) for task, first, end in segments for row in range(first, end))


def test_samples_stay_where_they_are_only_if_no_task_loses_by_it():
    def runs(index, rows: int, rank=1, weight_dtype=torch.bfloat16) -> bool:
        samples = TaskIndex(index)
        x = torch.empty(len(index), rows, 768, dtype=torch.bfloat16)
        weight = torch.empty(3072, 768, dtype=weight_dtype)
        return triton_backend.takes_runs(x, weight, rank, samples.rows(rows, grouped=False), rows)

    index = [0, 1, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "gpu_of", lambda device: devices.typical("sm_90"))
        assert runs(index, 197)
        assert runs(index, 1)
        assert not runs(index, 1, weight_dtype=torch.float32)
        assert not runs(index, 1, rank=8)
        assert not runs(index * 40, 5), "short runs would fill no tile"
        assert (runs(index * 2, 64), runs(index * 2, 63)) == (True, False)
        assert (runs((index * 86)[:256], 1), runs((index * 86)[:257], 1)) == (True, False)
        assert not runs(index * 8, 197), "task 0 is merged"
        assert not runs([-1, 0, -1], 197), "one product for the bare weight"


def test_parts_of_tasks_are_nearly_equal_and_in_order():
    parts, tasks = parts_of(((-1, 0, 5), (3, 5, 400), (1, 400, 432)), 128, 32)
    assert parts == ((-1, 0, 5), (3, 5, 133), (3, 133, 261), (3, 261, 389), (3, 389, 400), (1, 400, 432))
    assert tasks == ((3, 1, 5), (1, 5, 6))
    assert parts_of(((0, 0, 300),), 200, 32)[0] == ((0, 0, 160), (0, 160, 300))
