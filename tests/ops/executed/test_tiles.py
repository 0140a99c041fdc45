"""Every tile shape that is shipped, executed from compiled PTX at a small shape that fills its pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices, numerics

if backends.INTERPRETING:
    pytest.skip("with Triton's interpreter on, nothing compiles", allow_module_level=True)

from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.tuning import tiles as tuning
from tests.support.ptx.launcher import TARGETS, execute

DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32, torch.float32), 8: (torch.float64, torch.float64)}


def shipped(arch: str) -> Iterator[tuple[str, int, int, Tiles]]:
    """Kernel, bytes of an element, most rows (0 for any) and tiles."""
    for (kernel, itemsize), entries in configs.TABLE[arch].items():
        yield from ((kernel, itemsize, limit, tiles) for limit, tiles in entries)
        if tiles := configs.PERSISTENT.get(arch, {}).get((kernel, itemsize)):
            yield kernel, itemsize, 0, tiles
        yield kernel, itemsize, 0, configs.IRREGULAR[kernel, itemsize]


def candidates(arch: str) -> Iterator[tuple[str, int, int, Tiles]]:
    """What the tuner may find instead."""
    for (kernel, itemsize, limit), entries in tuning.CANDIDATES.items():
        yield from ((kernel, itemsize, limit, Tiles(*values)) for values in entries)
    if arch in configs.TMA_FAMILIES:
        for (kernel, itemsize), entries in tuning.PERSISTENT_CANDIDATES.items():
            yield from ((kernel, itemsize, 0, Tiles(*values, schedule="persistent")) for values in entries)


def parameters(find, *marks) -> list:
    """What an earlier architecture has too is slow on a later one, but for 16 bits, whose products differ."""
    found = {(arch, *entry): None for arch in TARGETS for entry in find(arch)}
    first = {entry[1:]: entry[0] for entry in reversed(found)}
    again = {entry for entry in found if entry[2] != 2 and entry[0] != first[entry[1:]]}
    return [
        pytest.param(arch, kernel, itemsize, limit, tiles, id=f"{arch}-{kernel}-{itemsize}-{'x'.join(map(str, tiles))}",
                     marks=pytest.mark.slow if (arch, kernel, itemsize, limit, tiles) in again else marks)
        for arch, kernel, itemsize, limit, tiles in found
    ]  # fmt: skip


def launches_and_outputs(kernel: str, t: dict[str, torch.Tensor], arch: str, tiles: Tiles):
    """The launches, and the tensors that they fill, by the names of :data:`numerics.OUTPUTS`; these are NaN."""
    given, gpu = (t["weight"], t["scale_row"], t["scale_col"]), devices.typical(arch)
    if kernel == "forward":
        y = torch.full_like(t["grad_y"], torch.nan)
        return linear_launches.forward_launches(t["x"], *given, t["bias"], True, y, gpu, "ieee", tiles), {"y": y}
    if kernel == "grad_x":
        grad_x = torch.full_like(t["x"], torch.nan)
        return linear_launches.grad_x_launches(t["grad_y"], *given, True, grad_x, gpu, "ieee", tiles), {"x": grad_x}
    wide = accumulate_dtype(t["x"].dtype)
    outputs = {name: torch.full_like(t[name], torch.nan, dtype=wide) for name in ("scale_row", "scale_col", "bias")}
    return linear_launches.grad_scales_launches(
        t["grad_y"], t["x"], *given, (*outputs.values(),), gpu, "ieee", tiles
    ), outputs


def sizes(kernel: str, limit: int, tiles: Tiles, ragged: bool) -> tuple[int, int, int]:
    """M, N and K with several tiles of each, and a contraction longer than the pipeline; regular strides."""
    rows = (tiles.stages + 2) * tiles.block_m + 5 if kernel == "grad_scales" else 2 * tiles.block_m + 5
    deep = tiles.stages + 2
    n, k = (2, deep) if kernel == "forward" else (deep, 2) if kernel == "grad_x" else (2, 2)
    n, k = n * tiles.block_n, k * tiles.block_k
    if ragged:
        n = 3 * 16 * (-(-n // 48) + (0 if n // 3 % tiles.block_n else 1))
        k = k - tiles.block_k + 16
    elif kernel == "grad_scales":
        rows -= 5
    return min(limit or rows, rows), n, k


def check(arch: str, kernel: str, itemsize: int, limit: int, tiles: Tiles, ragged: bool) -> None:
    """By the error rule; of 32 and 64 bits, one case's ratio is noise, and a few roundoffs are allowed as well."""
    dtype = DTYPES[itemsize][not ragged]
    rank, groups = (4, 3) if ragged else (1, 1)
    case = Case(*sizes(kernel, limit, tiles, ragged), rank, groups, dtype=dtype)
    tensors = {name: tensor.detach() for name, tensor in case.draw(0).items()}
    launches, outputs = launches_and_outputs(kernel, tensors, arch, tiles)
    meta = launches[0].plan.meta
    assert (meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]) == tiles[:3]
    for launch in launches:
        execute(launch, arch)
    exact = numerics.exact_outputs(tensors, True)
    eager = numerics.outputs(numerics.rlrr_linear_reference, tensors, True)
    least = numerics.FLOAT64_ROUNDOFFS * torch.finfo(accumulate_dtype(dtype)).eps / 2
    for name, actual in outputs.items():
        error = numerics.relative_error(actual, exact[name])
        limit = max(numerics.RATIO * numerics.relative_error(eager[name], exact[name]), least)
        assert error <= limit, (name, error, limit, case)


@pytest.mark.parametrize(
    "ragged", [pytest.param(False, id="even", marks=pytest.mark.slow), pytest.param(True, id="ragged")]
)
@pytest.mark.parametrize(("arch", "kernel", "itemsize", "limit", "tiles"), parameters(shipped))
def test_shipped_tiles(arch: str, kernel: str, itemsize: int, limit: int, tiles: Tiles, ragged: bool):
    check(arch, kernel, itemsize, limit, tiles, ragged)


@pytest.mark.parametrize(("arch", "kernel", "itemsize", "limit", "tiles"), parameters(candidates, pytest.mark.slow))
def test_the_tuners_candidates(arch: str, kernel: str, itemsize: int, limit: int, tiles: Tiles):
    check(arch, kernel, itemsize, limit, tiles, ragged=True)
