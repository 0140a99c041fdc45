"""The persistent scale gradients: when they serve, how they share work out, and their numbers against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices, numerics, rlrr_linear
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.tuning import tiles as tuning

pytestmark = pytest.mark.interpreted

needs_interpreter = pytest.mark.skipif(
    not backends.INTERPRETING or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6),
    reason="runs the kernels; Triton 3.5's interpreter counts the strides of descriptors in elements",
)

fused = partial(rlrr_linear, backend="triton.fused")


def chosen(rows=1576, dtype=torch.bfloat16, gpu="sm_90", offset=0, transposed=False, sampled=False) -> Tiles:
    storage = torch.empty(rows * 64 + offset, dtype=dtype)
    x = storage[offset:].view(rows, 64)
    grad_y = torch.empty(128, rows, dtype=dtype).t() if transposed else torch.empty(rows, 128, dtype=dtype)
    return store.choose_tiles("grad_scales", devices.typical(gpu), "ieee", x, grad_y, dtype, 1, sampled)


def test_the_table_serves_it_where_tma_can_load():
    assert chosen().schedule == chosen(rows=1024).schedule == "persistent"
    others = {"rows": 1023}, {"dtype": torch.float32}, {"gpu": "sm_80"}, {"offset": 1}, {"transposed": True}
    for changes in (*others, {"sampled": True}, {"gpu": "sm_100"}):
        assert chosen(**changes).schedule == "tiled", changes


def test_tiles_that_cannot_serve_are_replaced_and_unknown_schedules_refused():
    forced = Tiles(16, 32, 32, 4, 1, schedule="persistent")
    with store.only_tiles("grad_scales", forced):
        assert chosen(rows=8) == forced
        shipped = configs.tiles_for("grad_scales", devices.typical("sm_80"), torch.bfloat16, 1576)
        assert chosen(gpu="sm_80") == shipped
    x, weight, vector = torch.empty(8, 64), torch.empty(32, 64), torch.empty(32)
    with pytest.raises(ValueError, match=r"schedule of forward must be one of \['tiled'.*; got 'spiral'"):
        linear_launches.forward_launches(
            x, weight, vector.view(32, 1), torch.empty(1, 1, 64), vector, True, torch.empty(8, 32),
            devices.typical("sm_90"), "ieee", forced._replace(schedule="spiral"),
        )  # fmt: skip


# ---------------------------------------------------------------- the shares


@pytest.mark.parametrize(("weight_dtype", "columns"), [(torch.bfloat16, 64), (torch.float32, 32)])
def test_a_wide_tile_is_multiplied_by_strips_of_128_bytes_of_the_weight(weight_dtype: torch.dtype, columns: int):
    t = tuning.draw(Case(2048, 256, 512, dtype=torch.bfloat16, weight_dtype=weight_dtype))
    partial, _ = tuning.launches_of(
        "grad_scales", t, devices.typical("sm_90"), configs.PERSISTENT["sm_90"]["grad_scales", 2]
    )
    assert partial.plan.meta["STRIP"] == columns


def test_shares_cover_every_step_once_and_no_tile_has_more_pieces_than_said():
    for tiles, blocks, programs in itertools.product((1, 3, 36, 100), (1, 2, 7, 197), (1, 5, 132)):
        span = max(4, -(-tiles * blocks // programs))
        pieces = [set() for _ in range(tiles)]
        for step in range(tiles * blocks):
            tile, program = step // blocks, step // span
            pieces[tile].add(program - tile * blocks // span)
        assert all(parts == set(range(len(parts))) for parts in pieces)
        assert linear_launches.most_parts(tiles, blocks, span) == max(len(parts) for parts in pieces)


def test_all_programs_run_at_once_with_the_smallest_share():
    for warps, steps in itertools.product((4, 8), (1, 130, 1000, 14184, 10**7)):
        span = configs.steps_a_program(steps, Tiles(64, 128, 256, warps, 4), devices.typical("sm_90"))
        wave = 132 * 8 // warps
        assert -(-steps // span) <= wave
        assert span == 4 or -(-steps // (span - 1)) > wave, "a smaller share would do"


# ---------------------------------------------------------------- numbers

TILES = Tiles(16, 32, 64, 4, 1)
PROBLEMS = [  # M, N, K, rank, groups: tiles run over the ends of M, of a group and of K
    ((100, 96, 72, 1, 3), TILES),
    ((60, 48, 136, 4, 1), Tiles(16, 16, 128, 8, 1)),  # two strips to a tile
    ((7, 32, 200, 1, 1), TILES),  # fewer rows than a block
]


@contextmanager
def persistent(tiles: Tiles) -> Iterator[None]:
    """Makes the scale gradients take ``tiles`` in their persistent form."""
    with store.only_tiles("grad_scales", tiles._replace(schedule="persistent")):
        yield


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("shape", "tiles"), PROBLEMS, ids=str)
def test_exact_on_odd_shapes(shape: tuple, tiles: Tiles, monkeypatch: pytest.MonkeyPatch):
    ran, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch.plan.kernel.__name__) or run(launch))
    tensors = Case(*shape, dtype=torch.float64).draw(0)
    with persistent(tiles):
        numerics.check_bound(fused, tensors)
        numerics.check_bound(fused, {name: tensor for name, tensor in tensors.items() if name != "bias"})
    assert sum("persistent" in name for name in ran) == 2


@needs_interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow_interpreted)])
def test_error_rule(dtype: torch.dtype):
    with persistent(TILES):
        numerics.check_error_rule(fused, Case(90, 48, 72, 1, 3, dtype=dtype, weight_dtype=torch.float32))


@needs_interpreter
def test_same_input_same_bits():
    tensors = Case(70, 48, 136, 2, 3).draw(0)
    with persistent(TILES):
        first, again = (numerics.outputs(fused, tensors, True) for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@needs_interpreter
def test_what_is_not_finite_stays_in_its_group():
    tensors = Case(40, 96, 72, 1, 3, dtype=torch.float32).draw(0)  # groups of 32 rows, tiles of 64
    tensors["grad_y"][3, 40] = float("nan")
    with persistent(Tiles(32, 64, 32, 4, 1)):
        grads = numerics.outputs(fused, tensors, True)
    assert grads["scale_col"].isnan().any(-1).flatten().tolist() == [False, True, False]
    for name in ("scale_row", "bias"):
        assert grads[name].flatten().isnan().nonzero().flatten().tolist() == [40], name


@needs_interpreter
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, True, False)], ids=str)
def test_gradients_that_are_not_needed(needs: tuple[bool, bool, bool]):
    tensors = Case(50, 48, 72, 2, 3, dtype=torch.float64).draw(0)
    names = ("scale_row", "scale_col", "bias")
    leaves = {name: tensors[name].detach().requires_grad_(need) for name, need in zip(names, needs, strict=True)}
    exact = numerics.exact_outputs(tensors, True)
    with persistent(TILES):
        fused(tensors["x"], tensors["weight"], *leaves.values()).backward(tensors["grad_y"])
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, exact[name], rtol=1e-12, atol=1e-12)


@needs_interpreter
def test_operands_that_tma_cannot_load_take_the_tiled_way():
    tensors = Case(50, 51, 70, 1, 3, dtype=torch.float64).draw(0)
    with persistent(TILES):
        numerics.check_bound(fused, tensors)
        assert "does not serve" in tuning.rejection(
            "grad_scales", tensors, devices.typical("interpreter"), TILES._replace(schedule="persistent")
        )
