"""``tune_path``: measures on the user's GPU from when a merge is faster than the fused kernel; kept beside their tiles.

What is kept is one number, the least :func:`rlrr_kernels.ops.choice.path.merge_gain` at which the measured merges were
faster: the model then goes on choosing for shapes that were not measured, from a better start.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlrr_kernels import devices, numerics
from rlrr_kernels.ops.choice import path as path_model
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.linear import triton_backend as linear_triton
from rlrr_kernels.ops.tuning.tiles import GAIN, Timer, check_problems, current, draw, microseconds


class TunedPath(NamedTuple):
    """What was found; times are geometric means over the products of both directions."""

    precision: str
    least_gain: float
    us: float  # by least_gain
    shipped_us: float  # by the model alone

    @property
    def kept(self) -> bool:
        """Whether ``least_gain`` is written to the user's file."""
        return self.us < GAIN * self.shipped_us


def tune_path(
    shapes: Iterable[tuple[int, int]] = ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    rows: Sequence[int] = (394, 1576, 4096, 12608),
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    path: Path | None = None,
) -> TunedPath:
    """Times forward and ∂x by both paths, with the tiles in use, and keeps the better cut in the user's file.

    Args:
        shapes: (N, K) of the frozen weights; default: the linear layers of a ViT-B block.
        rows: M, rows of x; from few to many.
        dtype: of x and W: bfloat16, float16 or float32.
        device: a CUDA device.
        timer: takes a call and gives microseconds; default: Triton's benchmark with an empty L2 cache.
        path: the file; default: where later calls look.

    Raises:
        ValueError: an argument is not one of those above, or Triton cannot run on ``device``.
    """
    shapes, rows = list(shapes), list(rows)
    device = check_problems(shapes, rows, dtype, device)
    path, timer = path or store.cache_file(), timer or microseconds
    gpu, precision = devices.gpu_of(device), matmul_precision()
    points: list[tuple[float, float, float]] = []  # gain, log of the time fused and merged
    for n, k in shapes:
        for count in rows:
            t = draw(numerics.Case(count, n, k, dtype=dtype, device=str(device)))
            given = t["weight"], t["scale_row"], t["scale_col"]
            gain = path_model.merge_gain(count, n, k, 1, gpu, dtype, dtype, precision == "tf32")
            forward = functools.partial(linear_triton.forward, t["x"], *given, t["bias"], True)
            backward = functools.partial(
                linear_triton.backward, t["grad_y"], None, *given, True, (True, False, False, False)
            )
            for product in (forward, backward):
                with current(device):
                    times = [timer(functools.partial(product, path=name)) for name in ("fused", "merge")]
                points.append((gain, *map(math.log, times)))
    least_gain = _best_cut(points)
    us, shipped_us = (math.exp(_total(points, cut) / len(points)) for cut in (least_gain, 1.0))
    found = TunedPath(store.precision_name(dtype, dtype, precision), least_gain, us, shipped_us)
    entry = {"least_gain": least_gain, "us": round(us, 3), "shipped_us": round(shipped_us, 3)}
    name = store.path_entry_name(store.gpu_name(device), found.precision)
    store.write(path, {name: entry if found.kept else None})
    return found


def _total(points: list[tuple[float, float, float]], least_gain: float) -> float:
    return sum(merged if gain > least_gain else fused for gain, fused, merged in points)


def _best_cut(points: list[tuple[float, float, float]]) -> float:
    """The cut that takes least in all: below, between or at the largest of the gains; the nearest to 1 of equals."""
    gains = sorted({point[0] for point in points})
    cuts = [0.99 * gains[0], *(math.sqrt(a * b) for a, b in itertools.pairwise(gains)), gains[-1]]
    return min(cuts, key=lambda cut: (_total(points, cut), abs(math.log(cut))))
