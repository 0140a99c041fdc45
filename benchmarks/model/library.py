"""The vendor library's matrix product in the model: the tile, and the split of the contraction, that are done first."""

from __future__ import annotations

from typing import NamedTuple

from rlrr_kernels import devices
from rlrr_kernels.ops.linear import tiles as linear_configs

MULTIPROCESSORS = devices.typical("sm_90").multiprocessors

TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.87, (64, 256): 0.8, (64, 128): 0.7, (64, 64): 0.5}
"""Output tiles it is taken to choose from on Hopper, and the share of its best rate that each reaches."""

AHEAD = 384
"""Of the contraction, how much one of its programs is taken to have on its way: six stages of 64."""

L2_BYTES_A_SECOND = 5120 * 1.755e9
"""From the L2 cache to all multiprocessors: 5120 bytes a clock (A100 whitepaper; none is published for Hopper)."""


class Launch(NamedTuple):
    """What one kernel launch is charged for; the largest of its times counts, and ``KERNEL_US``."""

    bytes: float  # from and to memory
    operations: float = 0.0  # multiplications and additions
    idle: float = 1.0  # how much longer these take because some multiprocessors have no tile, or a tile is padded
    cache_bytes: float = 0.0  # from the L2 cache to the multiprocessors
    least_us: float = 0.0  # waits one after another, whatever the rates

    def microseconds(self, bandwidth: float, rate: float) -> float:
        """With ``bandwidth`` bytes and ``rate`` operations a second."""
        rated = max(self.operations / rate, self.cache_bytes / L2_BYTES_A_SECOND) * self.idle
        return max(1e6 * max(self.bytes / bandwidth, rated), self.least_us) + linear_configs.KERNEL_US


def whole_waves(programs: int) -> float:
    """How much longer ``programs`` equal programs take than their share of all multiprocessors' time."""
    return -(-programs // MULTIPROCESSORS) * MULTIPROCESSORS / programs


def product(m: int, n: int, k: int, size: int, bandwidth: float, rate: float) -> list[Launch]:
    """The launches of [M, K] by [K, N], elements of ``size`` bytes; a second one sums fp32 parts where K is split."""
    if not m * n * k:
        return [Launch(size * m * n)]
    operands, result = size * (m * k + n * k), size * m * n
    options = []
    for (a, b), share in TILES.items():
        tiles = -(-m // a) * -(-n // b)
        padding = tiles * a * b / (m * n)
        # An operand that only one row of programs reads comes from memory.
        arrival = linear_configs.ARRIVAL_US if m <= a or n <= b else 0.0
        for splits in (1, 2, 3, 4, 5, 6, 7, 8, 16):
            parts = 4 * splits * m * n if splits > 1 else 0
            idle = whole_waves(tiles * splits) * padding / share
            waits = arrival * max(0.0, k / splits / AHEAD - 1)
            launches = [Launch(operands + (parts or result), 2.0 * m * n * k, idle, 0.0, waits)]
            options.append(launches + ([Launch(parts + result)] if parts else []))
    return min(options, key=lambda launches: sum(launch.microseconds(bandwidth, rate) for launch in launches))
