"""The model of every path: what a launch moves and computes, charged at the bandwidth and matrix rate measured here.

A launch takes the largest of: bytes over bandwidth, each operand read once and each result written once; operations
over rate; for the one-pass kernels what their tiles read from the L2 cache; and waits one after another. Idle
multiprocessors are counted, and a fixed cost of every launch. All else overlaps perfectly: a time far above its model
is a bad schedule, and a target below it is out of reach. ``python -m benchmarks.model`` prints it.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.common import Problem
from benchmarks.gpu.measurements.estimates import ESTIMATES
from benchmarks.model import library
from benchmarks.model.library import MULTIPROCESSORS, Launch, whole_waves
from rlrr_kernels import devices
from rlrr_kernels.ops.linear import path as linear_paths
from rlrr_kernels.ops.linear import tiles as linear_configs


class Ceilings(NamedTuple):
    """Measured on this device: bytes a second of a large copy (reads plus writes), operations a second by dtype."""

    bandwidth: float
    rates: dict[str, float]


_H200 = devices.typical("sm_90").peaks
H200 = Ceilings(
    linear_paths.REACHED_BANDWIDTH * _H200.bandwidth,
    {
        name: linear_paths.REACHED_RATE * peak
        for name, peak in {"bf16": _H200.half, "fp16": _H200.half, "tf32": _H200.tf32, "fp32": _H200.float32}.items()
    },
)
"""What is taken for an H200 where none has measured."""

ARCHITECTURE = "sm_90"
"""Whose tiles and paths are modelled."""

PART_CLOCKS, CLOCK_HZ = 0.13, 1.755e9
"""Clocks of a multiprocessor for each value of G that is made partial sums of, read off the sm_90 code."""

MODELLED = ("floor", "frozen", "merged", "reference", "triton.one_pass", "triton.merge", "auto", "torch")


class _Layer:
    """The launches of one problem at given ceilings."""

    def __init__(self, problem: Problem, rate: float, bandwidth: float, tf32: bool) -> None:
        self.problem, self.rate, self.bandwidth, self.tf32 = problem, rate, bandwidth, tf32
        self.m, self.n, self.k = problem.rows, problem.out_features, problem.in_features
        self.size = problem.dtype.itemsize
        self.weight_dtype = problem.weight_dtype or problem.dtype
        self.x, self.y, self.half = (
            self.m * self.k * self.size,
            self.m * self.n * self.size,
            self.n * self.k * self.size,
        )
        self.weight = self.n * self.k * self.weight_dtype.itemsize

    def library(self, m: int, n: int, k: int) -> list[Launch]:
        return library.product(m, n, k, self.size, self.bandwidth, self.rate)

    def cast(self) -> list[Launch]:
        """Autocast's copy of an fp32 W."""
        return [Launch(self.weight + self.half)] if self.weight != self.half else []

    def product(self, kernel: str, path: str) -> list[Launch]:
        """y or ∂x: ``library`` with a given W, ``merge`` or ``one_pass``."""
        of_y = kernel == "forward"
        if path == "auto":
            gain = linear_paths.merge_gain(
                self.m, self.n, self.k, 1, ARCHITECTURE, self.problem.dtype, self.weight_dtype, self.tf32
            )
            path = linear_paths.choose_path(gain)
        if path == "one_pass":
            return self._one_pass(kernel)
        merge = [Launch(self.weight + self.half)] if path == "merge" else []
        return merge + (self.library(self.m, self.n, self.k) if of_y else self.library(self.m, self.k, self.n))

    def _one_pass(self, kernel: str) -> list[Launch]:
        """As :func:`linear_configs.contraction_splits` cuts it: fp32 parts, then their sum, where it does."""
        m, n, k, size, weight_size = self.m, self.n, self.k, self.size, self.weight_dtype.itemsize
        tiles = linear_configs.tiles_for(kernel, ARCHITECTURE, self.problem.dtype, m)
        bm, bn, bk = tiles[:3]
        of_m, of_n, of_k = -(-m // bm), -(-n // bn), -(-k // bk)
        free, steps, contracted = (of_n, of_k, bk) if kernel == "forward" else (of_k, of_n, bn)
        given, result = (self.x, self.y) if kernel == "forward" else (self.y, self.x)
        splits = linear_configs.contraction_splits(steps, of_m * free, tiles, ARCHITECTURE)
        trips = -(-steps // splits)
        splits = -(-steps // trips)
        programs = of_m * free * splits
        moved = bm * contracted * size + bn * bk * weight_size
        arrival = linear_configs.ARRIVAL_US if of_m == 1 else linear_configs.ARRIVAL_US / 2
        parts = splits * (result // size) * 4 if splits > 1 else 0
        whole = Launch(
            self.weight + given + (parts or result), 2.0 * programs * trips * bm * bn * bk, whole_waves(programs),
            programs * trips * moved, arrival * max(0.0, trips / max(tiles.stages - 1, 1) - 1),
        )  # fmt: skip
        return [whole] + ([Launch(parts + result)] if parts else [])

    def scales(self, share: float) -> list[Launch]:
        """Partial sums of ∂s_r, ∂s_c and ∂b from ``share`` of the rows, and their reduction."""
        schedules = ("tiled", "persistent") if share == 1 else ("tiled",)
        tiles = linear_configs.tiles_for("grad_scales", ARCHITECTURE, self.problem.dtype, self.m, schedules)
        rows = max(1, round(self.m * share))
        bm, bn, bk = tiles[:3]
        of_m, of_n, of_k = -(-rows // bm), -(-self.n // bn), -(-self.k // bk)
        steps = of_m * of_n * of_k
        if tiles.schedule == "persistent":  # equal shares of the steps
            trips = linear_configs.steps_a_program(steps, tiles, ARCHITECTURE)
            programs = -(-steps // trips)
            splits = max(1, -(-of_m // trips))
            idle, ends = trips * MULTIPROCESSORS / steps, programs * (trips / of_m + 1)
        else:
            programs = of_n * (of_k + 1)
            splits = linear_configs.splits_for(rows, tiles, programs, ARCHITECTURE)
            idle, ends = whole_waves(programs * splits) * (of_k + 1) / of_k, programs * splits
        parts = 4 * splits * (of_k * self.n + of_n * self.k + self.n)
        made_us = 1e6 * PART_CLOCKS * bn * bk * ends / MULTIPROCESSORS / CLOCK_HZ
        operations, through_cache = 2.0 * steps * bm * bn * bk, steps * bm * (bn + bk) * self.size
        products_us = 1e6 * idle * max(operations / self.rate, through_cache / library.L2_BYTES_A_SECOND)
        read = share * (self.x + self.y) + self.weight
        first = Launch(read + parts, operations, idle, through_cache, products_us + made_us)
        return [first, Launch(parts)]

    def reference(self) -> tuple[list[Launch], list[Launch], list[Launch]]:
        """Forward, ∂x and scale gradients of the eager formula, kernel by kernel."""
        w = self.weight
        merge = [Launch(2 * w), Launch(2 * w), Launch(3 * w), *self.cast()]  # ⊙ s_c, ⊙ s_r, + W
        gradients = [Launch(3 * w), Launch(w), Launch(2 * w), Launch(3 * w), Launch(w), Launch(self.y)]
        forward = merge + self.product("forward", "library")
        scales = self.library(self.n, self.k, self.m) + self.cast() + gradients
        return forward, self.product("grad_x", "library"), scales


def launches(
    name: str, work: str, problem: Problem, share: float = 1.0, ceilings: Ceilings = H200, precision: str = "bf16"
) -> list[Launch]:
    """The launches of rival ``name`` for ``work`` ("forward", "step": forward and backward, or "scales").

    ``scales`` is the gradient of scales and bias alone, G = gᵀx for the floor; under ``share`` from these rows.
    """
    precision = precision.split("/")[0]
    layer = _Layer(problem, ceilings.rates[precision], ceilings.bandwidth, precision == "tf32")
    if name == "reference":
        forward, grad_x, scales = layer.reference()
    elif name in ("floor", "frozen", "merged"):
        cast = layer.cast() if name == "frozen" else []
        forward, grad_x = cast + layer.product("forward", "library"), cast + layer.product("grad_x", "library")
        scales = layer.library(layer.n, layer.k, layer.m) if name == "floor" else [Launch(layer.y)]  # only ∂b
    elif name == "torch":
        forward, grad_x = layer.product("forward", "merge"), layer.product("grad_x", "merge")
        scales = [*layer.library(layer.n, layer.k, layer.m), Launch(layer.half + 10 * layer.n * layer.k * 4)]
    else:
        path = name.removeprefix("triton.")
        forward, grad_x, scales = layer.product("forward", path), layer.product("grad_x", path), layer.scales(share)
        if share < 1:  # rows of x are copied in the forward; the images' means read all of g
            forward, scales = [*forward, Launch(2 * share * layer.x)], [Launch(layer.y + share * layer.x), *scales]
    return {"forward": forward, "scales": scales, "step": forward + grad_x + scales}[work]


def model_us(name: str, work: str, problem: Problem, precision: str, ceilings: Ceilings) -> float | None:
    """Microseconds the model gives rival ``name``; None for a rival that is not modelled.

    The drawing of an estimate's rows is left out.
    """
    share = ESTIMATES.get(name, 1.0)
    path = "auto" if name in ESTIMATES else name
    if path not in MODELLED:
        return None
    rate = ceilings.rates[precision.split("/")[0]]
    found = launches(path, work, problem, share, ceilings, precision)
    return sum(launch.microseconds(ceilings.bandwidth, rate) for launch in found)
