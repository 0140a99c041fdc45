"""The bytes-and-operations model: the least time a path can take, from bandwidth and matrix rate as measured here.

Every launch is charged max(bytes / bandwidth, operations / rate), each operand read once and each result written once.
A time far above its model is launch gaps, occupancy or repeated reads; a target below it is out of reach.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.common import Problem
from benchmarks.gpu.estimates import ESTIMATES
from rlrr_kernels.ops import linear_configs


class Ceilings(NamedTuple):
    """Measured on this device: bytes a second of a large copy (reads plus writes), operations a second by dtype."""

    bandwidth: float
    rates: dict[str, float]


class Launch(NamedTuple):
    """Bytes moved and multiply-add operations (two each) of one launch."""

    bytes: float
    operations: float


ARCHITECTURE = "sm_90"
"""Whose tiles decide into how many parts a product of few rows is cut."""

MODELLED = ("floor", "frozen", "merged", "reference", "triton.one_pass", "triton.merge", "torch")


def launches(name: str, work: str, problem: Problem, share: float = 1.0) -> list[Launch]:
    """The launches of rival ``name`` for ``work`` ("forward", "step": forward and backward, or "scales").

    ``scales`` is the gradient of scales and bias alone, G = gᵀx for the floor; under ``share`` from these rows.
    """
    m, n, k = problem.rows, problem.out_features, problem.in_features
    size = problem.dtype.itemsize
    x, y, half = m * k * size, m * n * size, n * k * size  # half: W in the dtype of the products
    weight = n * k * (problem.weight_dtype or problem.dtype).itemsize
    product = 2.0 * m * n * k
    rescales = name == "triton.one_pass"
    given = half if name in ("floor", "merged") else weight  # what a product reads when it reads W itself
    merge = [Launch(weight + half, 0)] if name in ("triton.merge", "torch") else []
    if name == "frozen" and weight != half:
        merge = [Launch(weight + half, 0)]  # autocast's copy
    read = weight if rescales else half if merge else given
    forward = [*merge, Launch(x + read + y, product)]
    grad_x = [*merge, Launch(y + read + x, product)]
    if rescales:
        forward, grad_x = _in_parts("forward", forward[0], y, problem), _in_parts("grad_x", grad_x[0], x, problem)
    # The floor writes G where the others read W.
    scales = [Launch(x + y + (half if name == "floor" else weight), product)]
    if share < 1:  # rows of x are copied in the forward; the images' means read all of g
        forward.append(Launch(2 * share * x, 0))
        scales = [Launch(y + share * x, 0), Launch(share * (x + y) + weight, share * product)]
    if name == "torch":
        scales = [Launch(x + y + half, product), Launch(half + 10 * n * k * 4, 0)]  # G, then passes in fp32
    if name == "reference":
        passes = Launch(7 * weight, 0)  # W ⊙ s_c, ⊙ s_r, + W: two, two and three times W
        cast = [Launch(weight + half, 0)] if weight != half else []
        forward = [passes, *cast, Launch(x + half + y, product)]
        grad_x = [Launch(y + half + x, product)]
        scales = [Launch(x + y + half, product), *cast, Launch(10 * weight, 0)]
    if work == "forward":
        return forward
    if work == "scales":
        return scales
    return forward + grad_x + ([] if name == "frozen" else scales)


def _in_parts(kernel: str, whole: Launch, result: int, problem: Problem) -> list[Launch]:
    """A product as :func:`linear_configs.contraction_splits` cuts it on Hopper: fp32 parts, then their sum."""
    m, n, k = problem.rows, problem.out_features, problem.in_features
    tiles = linear_configs.tiles_for(kernel, ARCHITECTURE, problem.dtype, m)
    of_rows, of_n, of_k = -(-m // tiles.block_m), -(-n // tiles.block_n), -(-k // tiles.block_k)
    free, contracted = (of_n, of_k) if kernel == "forward" else (of_k, of_n)
    splits = linear_configs.contraction_splits(contracted, of_rows * free, tiles, ARCHITECTURE)
    splits = -(-contracted // -(-contracted // splits))
    if splits == 1:
        return [whole]
    parts = splits * m * (n if kernel == "forward" else k) * 4
    return [Launch(whole.bytes - result + parts, whole.operations), Launch(parts + result, 0)]


def model_us(name: str, work: str, problem: Problem, precision: str, ceilings: Ceilings) -> float | None:
    """Microseconds the model gives rival ``name``; None for a rival that is not modelled.

    ``auto`` and the estimates are the better of two paths; the drawing of an estimate's rows is left out.
    """
    paths = ("triton.one_pass", "triton.merge") if name == "auto" or name in ESTIMATES else (name,)
    if not set(paths) <= set(MODELLED):
        return None
    rate, share = ceilings.rates[precision.split("/")[0]], ESTIMATES.get(name, 1.0)
    return 1e6 * min(
        sum(
            max(launch.bytes / ceilings.bandwidth, launch.operations / rate)
            for launch in launches(path, work, problem, share)
        )
        for path in paths
    )
