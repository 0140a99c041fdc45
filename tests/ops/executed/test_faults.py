"""Whether executing a kernel finds what is wrong with it: faults planted in its source, and in its compiled text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, numerics

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.linear.triton.launches import merge_launch
from tests.ops.executed.test_tiles import launches_and_outputs
from tests.support.ptx import Fault
from tests.support.ptx.launcher import changed, compile_launch, execute

ORDERS = (None, *range(4))
"""The order of the program, and adversarial ones."""

SMALL = Tiles(16, 64, 64, 4, 3)


def problem(kernel: str, *sizes: int, dtype=torch.bfloat16, tiles: Tiles = SMALL, arch: str = "sm_90"):
    """The first launch of a kernel, the tensors that it fills, and what these should hold."""
    tensors = {name: tensor.detach() for name, tensor in Case(*sizes, dtype=dtype).draw(0).items()}
    if kernel != "merge":
        launches, outputs = launches_and_outputs(kernel, tensors, arch, tiles)
        return launches[0], outputs, numerics.exact_outputs(tensors, True)
    given, merged = (
        [tensors[name] for name in ("weight", "scale_row", "scale_col")],
        torch.empty(sizes[1:3], dtype=dtype),
    )
    weight, row, col = (tensor.double() for tensor in given)
    return merge_launch(*given, True, merged), {"w": merged}, {"w": weight * (1 + row @ col[0])}


def right(outputs: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> bool:
    """Within the roundings of bf16: a wrong value among thousands is more."""
    return all(numerics.relative_error(actual, exact[name]) < 4e-3 for name, actual in outputs.items())


def found(make: Callable[[], tuple], arch: str, orders=ORDERS, edit: Callable[[str], str] | None = None) -> str:
    """In which order of events, and how, a fault shows; "" if it never does."""
    for seed in orders:
        launch, outputs, exact = make()
        try:
            execute(launch, arch, seed, edit)
        except Fault as fault:
            return f"{seed}: {type(fault).__name__}: {fault}"
        if not right(outputs, exact):
            return f"{seed}: wrong"
    return ""


# ---------------------------------------------------------------- in the source

STORE = "acc.to(out_ptr.dtype.element_ty), mask=mask_c[:, None]"
IN_THE_SOURCE = {
    "rows of x past its end are read": (
        ("forward", 37, 64, 80),
        ("    rows_m = tl.minimum(offs_m, M - 1)\n    offs_k = tl", "    rows_m = offs_m\n    offs_k = tl"),
        "None: Fault: out of bounds: cp.async of 16 bytes",
    ),
    "rows of W past its end are read": (
        ("forward", 16, 80, 80),
        ("    rows_n = group * group_size + tl.minimum(local_n, group_size - 1)\n", "    rows_n = local_n\n"),
        "None: Fault: out of bounds",
    ),
    "a merge without the mask of K": (
        ("merge", 8, 99, 70),
        (
            "    mask = mask_n[:, None] & mask_k[None, :]\n    wide_n",
            "    mask = mask_n[:, None] & (offs_k >= 0)[None, :]\n    wide_n",
        ),
        "None: Fault: out of bounds",
    ),
    "results past the last row are stored": (
        ("forward", 13, 64, 80),
        (f"{STORE} & mask_m[None, :])", f"{STORE})"),
        "None: Fault: out of bounds: store",
    ),
    "the bias of another row": (
        ("forward", 16, 128, 80),
        ("tl.load(bias_ptr + rows_n)", "tl.load(bias_ptr + rows_n // 2)"),
        "None: wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_THE_SOURCE)
def test_faults_in_the_source_are_found(fault: str, tmp_path: Path):
    sizes, change, expected = IN_THE_SOURCE[fault]

    def make() -> tuple:
        launch, *rest = problem(*sizes)
        return changed(launch, tmp_path, change), *rest

    assert found(make, "sm_90", [None]).startswith(expected)


def test_a_contraction_that_is_taken_for_a_multiple_of_the_block_is_found(tmp_path: Path):
    def make() -> tuple:
        launch, *rest = problem("forward", 37, 64, 80)
        assert launch.plan.meta["EVEN_K"] is False
        return changed(launch, tmp_path, EVEN_K=True), *rest

    assert found(make, "sm_90", [None]).startswith("None: Fault: out of bounds")


# ---------------------------------------------------------------- in the compiled text


def replaced(pattern: str, by: str | Callable[[re.Match], str]) -> Callable[[str], str]:
    def edit(ptx: str) -> str:
        ptx, count = re.subn(pattern, by, ptx)
        if not count:
            pytest.skip(f"Triton {triton.__version__} does not write {pattern!r} here")
        return ptx

    return edit


def test_right_kernels_are_right_in_every_order():
    assert not found(lambda: problem(*PIPELINED, arch="sm_80"), "sm_80")
    assert not found(lambda: problem("forward", 37, 128, 256, tiles=LARGE), "sm_90")


LARGE = Tiles(64, 128, 64, 4, 3)


PIPELINED = ("forward", 37, 64, 320)
"""Sizes with more blocks to contract than a pipeline has stages."""


@pytest.mark.parametrize("more", [1, 100])
def test_copies_that_are_not_waited_for_are_found(more: int):
    """All of them, or the last group."""
    edit = replaced(r"cp\.async\.wait_group\s+(\d+)", lambda found: f"cp.async.wait_group {int(found[1]) + more}")
    assert found(lambda: problem(*PIPELINED, arch="sm_80"), "sm_80", [None], edit) == "None: wrong"


def test_missing_barriers_between_warps_are_found_in_adversarial_orders_only():
    """Each ``bar.sync`` in turn, some of which the compiler may have put where nothing depends on it."""
    ptx = compile_launch(problem(*PIPELINED, arch="sm_80")[0], "sm_80").ptx
    results = []
    for place in re.finditer(r"bar\.sync\s+0;", ptx):
        start, end = place.span()
        without = ptx[:start] + ptx[end:]
        results.append(found(lambda: problem(*PIPELINED, arch="sm_80"), "sm_80", edit=lambda _, text=without: text))
    assert not any(result.startswith("None") for result in results), results
    assert sum(bool(result) for result in results) >= 2, results


def test_an_asynchronous_product_that_is_not_waited_for_is_found():
    edit = replaced(r"wgmma\.wait_group\.sync\.aligned\s+0", "wgmma.wait_group.sync.aligned 1")
    assert found(lambda: problem("forward", 64, 128, 256, tiles=LARGE), "sm_90", [None], edit).startswith("None: Fault")


def test_a_tile_that_is_not_waited_for_is_found():
    """The persistent kernel's wait for the tensor memory accelerator."""
    tiles = configs.PERSISTENT["sm_90"]["grad_scales", 2]
    never = replaced(r"@!complete bra\.uni waitLoop;", "")
    result = found(lambda: problem("grad_scales", 640, 128, 256, tiles=tiles), "sm_90", [None], never)
    assert result


def test_what_threads_stored_and_no_fence_followed_is_found():
    """x waits in shared memory for its product: threads store it there themselves where copies cannot."""
    edit = replaced(r"fence\.proxy\.async\.shared::cta;", "")
    assert "fence" in found(lambda: problem("forward", 64, 99, 70, tiles=LARGE), "sm_90", [None], edit)
