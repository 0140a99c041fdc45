"""The draw of sampled rows in Triton: of random keys, which are the smallest of each image, in one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.ops.host import guard
from rlrr_kernels.ops.host.launch import Launch, Plan
from rlrr_kernels.ops.sampling import row_sample


@triton.jit
def _smallest_keys_kernel(keys_ptr, index_ptr, P, prefix, drawn, BLOCK: tl.constexpr, BLOCK_PREFIX: tl.constexpr):
    """index [B · prefix + B · drawn]: every image's first rows, then those of its P others with the smallest keys.

    keys [B, P], fp32 from 0 to 1. An image is prefix + P rows; its rows come in their own order. Grid: (B,).
    """
    image = tl.program_id(0).to(tl.int64)
    first = image * (prefix + P)
    offs = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + image * P + offs, mask=offs < P, other=2.0)
    # The bits of floats that are not negative are in their order; below them the row, so that no two are alike.
    unique = (keys.to(tl.int32, bitcast=True).to(tl.int64) << 32) | offs
    largest = tl.sum(tl.where(offs == drawn - 1, tl.sort(unique), 0), 0)
    chosen = unique <= largest
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    index_ptr += image * prefix
    for start in range(0, prefix, BLOCK_PREFIX):
        lanes = start + tl.arange(0, BLOCK_PREFIX)
        tl.store(index_ptr + lanes, first + lanes, mask=lanes < prefix)
    index_ptr += (tl.num_programs(0) - image) * prefix + image * drawn
    tl.store(index_ptr + place, first + prefix + offs, mask=chosen)


@functools.lru_cache(maxsize=256)
def _plan(images: int, others: int, drawn: int, prefix: int) -> Plan:
    block = triton.next_power_of_2(others)
    meta = {"BLOCK": block, "BLOCK_PREFIX": 16, "num_warps": max(1, min(4, block // 128))}
    return Plan(_smallest_keys_kernel, (images,), (others, prefix, drawn), meta)


def smallest_keys_launch(keys: Tensor, drawn: int, prefix: int, index: Tensor) -> Launch:
    """Fills ``index`` [B · (prefix + drawn)], int64, by keys [B, P], fp32, contiguous; 1 ≤ drawn ≤ P."""
    images, others = keys.shape
    return Launch(_plan(images, others, drawn, prefix), (keys, index))


def smallest_keys(keys: Tensor, drawn: int, prefix: int) -> Tensor | None:
    """As :func:`rlrr_kernels.ops.sampling.row_sample.smallest_keys`, with a new index; None where it gives way."""
    index = torch.empty(keys.shape[0] * (prefix + drawn), dtype=torch.int64, device=keys.device)

    def find_error() -> str | None:
        ranks = keys.argsort(dim=1, stable=True).argsort(dim=1)  # of equal keys the first row's counts as smaller
        first = torch.arange(len(keys), device=keys.device).unsqueeze(1) * (prefix + keys.shape[1])
        right = torch.equal(index, row_sample.smallest_keys(ranks, first, drawn, prefix))
        return None if right else "the rows that are drawn are not those with the smallest keys"

    return index if guard.ran((smallest_keys_launch(keys, drawn, prefix, index),), False, find_error) else None
