"""``fused`` or ``merge``: when W' in scratch and the library's product beat the fused kernel, as pure functions.

Modelled, not measured: datasheet peaks, the shares of them that are reached, and what a kernel costs. ``rlrr tune``
measures on a GPU above which gain a merge is faster there (:mod:`rlrr_kernels.ops.tuning.path`).
"""

from __future__ import annotations

import torch

from rlrr_kernels.devices import INTERPRETER, Gpu
from rlrr_kernels.ops.choice.tiles import (
    IRREGULAR,
    KERNEL_US,
    UNROLLED_RANK,
    multiplied_in_pipeline,
    padded_rank,
    tiles_for,
)

REACHED_BANDWIDTH, REACHED_RATE = 0.9, 0.8
"""Shares of a GPU's peaks that a large copy and a large product of the vendor's library are taken to reach:
4.3 TB/s and 790 TFLOP/s on an H200."""

OVERHEAD = {"half": 0.7, "half of float32": 1.4, "tf32": 4.0, "float32": 0.5, "float64": 0.5}
"""The time a fused kernel takes beyond the library's product, as a share of 2 M N K operations over their rate.

By what is multiplied; "half of float32" is a 16-bit x and an fp32 W. The first three are medians over layers of ViT-B,
L and H at 394 to 50,432 rows of times predicted from machine code, idle multiprocessors included (``python -m
benchmarks.model --tiles --overhead``). The last two run without matrix instructions and are a guess.
"""

OVERHEAD_PER_RANK, OVERHEAD_UNPIPELINED = 0.12, 3.0
"""What every further rank adds to it, a multiply-add for every weight of every tile; and the share of the kernels
of a rank above UNROLLED_RANK that are not pipelined."""

MATRIX_OPERATIONS = 6
"""What a vector more of scales that are multiplied as matrices costs beside a row of the tile: three products at half
the rate of 16-bit ones."""

INTERPRETER_ROWS = 96
"""Under Triton's interpreter M alone decides, so that small tests meet both paths."""


def precision_kind(dtype: torch.dtype, tf32: bool) -> str:
    """The field of :class:`rlrr_kernels.devices.Peaks` that a product of ``dtype`` is bound by."""
    return {2: "half", 4: "tf32" if tf32 else "float32", 8: "float64"}[dtype.itemsize]


def merge_gain(
    M: int, N: int, K: int, rank: int, gpu: Gpu, dtype: torch.dtype,
    weight_dtype: torch.dtype, tf32: bool = False,
) -> float:  # fmt: skip
    """How many times its cost a merge saves, by the model; in proportion to M.

    Above 1, or the least gain that was measured to pay, the path is ``merge`` (W' in scratch, then the library's
    product), else ``fused`` (the weight is rescaled in registers).

    A merge saves the overhead of the fused kernel over the library's product of 2 M N K operations. It costs a kernel
    that reads W and writes W', N K elements each; the product then finds W' in the L2 cache, where there is room
    for it. Forward and ∂x each decide, and merge, for themselves: nothing W-sized is kept between them.

    Args:
        M: rows of x.
        N, K: of W.
        rank: r of the scales.
        gpu: the one that computes.
        dtype: of x.
        weight_dtype: of W.
        tf32: whether products of float32 are rounded to TF32.
    """
    if gpu.name == INTERPRETER:
        return M / INTERPRETER_ROWS * min(rank, UNROLLED_RANK + 1)
    kind = precision_kind(dtype, tf32)
    overhead = OVERHEAD["half of float32" if kind == "half" and weight_dtype.itemsize == 4 else kind]
    if rank <= UNROLLED_RANK:
        overhead += OVERHEAD_PER_RANK * (rank - 1)
    else:
        in_pipeline = multiplied_in_pipeline(rank, dtype, weight_dtype.itemsize, gpu)
        overhead = overhead if in_pipeline else max(overhead, OVERHEAD_UNPIPELINED)
        if kind == "half":
            tiles = tiles_for("forward", gpu, dtype, M) if in_pipeline else IRREGULAR["forward", dtype.itemsize]
            overhead += MATRIX_OPERATIONS * padded_rank(rank) / tiles.block_m
    weights, peaks = N * K, gpu.peaks
    saved = overhead * 2.0 * M * weights / (REACHED_RATE * getattr(peaks, kind))
    moved = weights * (weight_dtype.itemsize + dtype.itemsize)
    return saved / (1e-6 * KERNEL_US + moved / (REACHED_BANDWIDTH * peaks.bandwidth))
