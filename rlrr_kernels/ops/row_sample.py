"""``RowSample``: a random subset of the rows of x that stands for all of them in the gradients of the scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RowSample(NamedTuple):
    """G = gᵀx estimated from S of the M rows: Ĝ = Σ_{i < kept} g_i x_iᵀ + weight · Σ_{i ≥ kept} g_i x_iᵀ.

    Unbiased when every row is among the first ``kept`` entries, or among the others with probability 1 / ``weight``.
    The weight is applied to sums in fp32: rows multiplied by it would be rounded once more.

    Attributes:
        index: [S], int32 or int64: rows of x flattened to [M, K].
        kept: how many entries, the first ones, count once.
        weight: how often each of the other rows counts.
    """

    index: Tensor
    kept: int = 0
    weight: float = 1.0

    def parts(self, grad_y: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """The terms of Ĝ as (g [s, N], x [s, K], weight): one or two. grad_y [M, N]; x [S, K], gathered already."""
        size = self.index.shape[0]
        bounds = [(0, self.kept, 1.0), (self.kept, size, self.weight)]
        bounds = [bound for bound in bounds if bound[1] > bound[0]]
        if self.weight == 1 or not bounds:
            bounds = [(0, size, 1.0)]
        return [(grad_y.index_select(0, self.index[first:end]), x[first:end], weight) for first, end, weight in bounds]


def check_sample(argument: str, sample: RowSample, device: torch.device) -> None:
    """Raises ``TypeError`` or ``ValueError`` naming ``argument`` unless it can be used with an x on ``device``."""
    if not isinstance(sample, RowSample):
        raise TypeError(f"{argument} must be a RowSample or None; got {type(sample).__name__}")
    index, kept, weight = sample
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{argument}.index must be a Tensor of torch.int32 or torch.int64; got {given}")
    if index.dim() != 1:
        raise ValueError(f"{argument}.index must be [S]; got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{argument}.index must be on the device of x, {device}; got {index.device}")
    if not 0 <= kept <= index.shape[0]:
        raise ValueError(f"{argument}.kept must be from 0 to S = {index.shape[0]}; got {kept}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{argument}.weight must be a finite number of at least 0; got {weight}")


def check_fraction(value: float) -> float:
    """``value`` as a share of rows.

    Raises:
        TypeError: it is no number.
        ValueError: it is not over 0 and at most 1.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"scale_grad_rows must be a number; got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"scale_grad_rows must be over 0 and at most 1, the exact gradient; got {value}")
    return float(value)


def sample_rows(shape: torch.Size, fraction: float, prefix: int, device: torch.device) -> RowSample | None:
    """Rows of an x of ``shape`` [B, ..., K]: from every image its first ``prefix`` tokens and a draw of the others.

    Of an image's P other tokens exactly round(fraction · P) are drawn, at least one, without replacement, so that each
    is drawn with that probability over P. An x [M, K] is one image without a prefix. The draws come from the global
    generator of ``device``, as dropout's do.

    Returns:
        The sample, each of its two parts in the order of an image's tokens; None where it would be every row.
    """
    images, tokens = (shape[0], math.prod(shape[1:-1])) if len(shape) > 2 else (1, math.prod(shape[:-1]))
    prefix = prefix if len(shape) > 2 else 0
    others = tokens - prefix
    drawn = max(1, math.floor(fraction * others + 0.5))
    if images == 0 or drawn >= others:
        return None
    first = torch.arange(0, images * tokens, tokens, device=device).unsqueeze(1)
    # rand_like, as torch.compile knows it for random: it is never drawn anew for the backward.
    scores = torch.rand_like(first.expand(images, others), dtype=torch.float32)
    picked = scores.topk(drawn, sorted=False).indices.sort(dim=1).values + (first + prefix)
    kept = first + torch.arange(prefix, device=device)
    return RowSample(torch.cat([kept.flatten(), picked.flatten()]), images * prefix, others / drawn)


def flatten_sample(sample: RowSample | None) -> tuple[Tensor | None, int, float]:
    """A sample as arguments of an operator; :func:`unflatten_sample` is the inverse."""
    return (None, 0, 1.0) if sample is None else tuple(sample)


def unflatten_sample(index: Tensor | None = None, kept: int = 0, weight: float = 1.0) -> RowSample | None:
    """The sample that :func:`flatten_sample` took apart; None without an index."""
    return None if index is None else RowSample(index, kept, weight)
