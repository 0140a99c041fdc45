"""``RowSample``: a random subset of the rows of x that stands for all of them in the gradients of the scales."""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.host import private

MOST_KEYS = 1024
"""Tokens of an image up to which one program of a kernel sorts their keys."""


class RowSample(NamedTuple):
    """G = gᵀx estimated from S of the M rows: Ĝ = Σ_{i < kept} g_i x_iᵀ + weight · Σ_{i ≥ kept} g_i x_iᵀ.

    Unbiased when every row is among the first ``kept`` entries, or among the others with probability 1 / ``weight``.
    The weight is applied to sums in fp32: rows multiplied by it would be rounded once more.

    With ``images`` B, Ĝ = P ḡ x̄ᵀ + (P - 1) S_gx for the P rows of each image that are not kept: ḡ is their mean of g,
    all of which the backward has, x̄ the mean of the n drawn rows of x and S_gx the drawn rows' covariance,
    Σ (g - ḡ_drawn)(x - x̄)ᵀ / (n - 1). All are unbiased for rows drawn without replacement, and so is Ĝ; that the drawn
    rows' mean of g misses ḡ, which is most of what a plain draw adds in noise where tokens share a direction, no longer
    counts. It is the plain estimate with weight (P - 1) / (n - 1) and one more row an image, u x̄ᵀ with
    u = Σ_P g - weight · Σ_drawn g.

    Attributes:
        index: [S], int32 or int64: rows of x flattened to [M, K].
        kept: how many entries, the first ones, count once.
        weight: how often each of the other rows counts.
        images: B, or 0 for the plain estimate. Image b is the b-th of B equal runs of rows; its share of the kept
            entries and of the others are the b-th of B equal runs of each.
    """

    index: Tensor  # type: ignore[assignment]  # tuple.index gives way
    kept: int = 0
    weight: float = 1.0
    images: int = 0

    def parts(self, grad_y: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """The terms of Ĝ as (g [s, N], x [s, K], weight): one to three. grad_y [M, N]; x [S, K], gathered already."""
        size = self.index.shape[0]
        bounds = [(0, self.kept, 1.0), (self.kept, size, self.weight)]
        bounds = [bound for bound in bounds if bound[1] > bound[0]]
        if self.weight == 1 or not bounds:
            bounds = [(0, size, 1.0)]
        rows = grad_y.index_select(0, self.index)
        parts = [(rows[first:end], x[first:end], weight) for first, end, weight in bounds]
        return [*parts, self._means(grad_y, rows, x)] if self.images else parts

    def _means(self, grad_y: Tensor, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """u / n [B, N] and x̄ [B, K], whose product counts n times: a sum of fp16 gradients could overflow."""
        wide = torch.promote_types(grad_y.dtype, torch.float32)

        def sums(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (self.images, -1)).sum(1, dtype=wide)

        drawn = (self.index.shape[0] - self.kept) // self.images
        others = sums(grad_y) - sums(rows[: self.kept]) if self.kept else sums(grad_y)
        missed = (others - self.weight * sums(rows[self.kept :])) / drawn
        return missed.to(grad_y.dtype), (sums(x[self.kept :]) / drawn).to(x.dtype), float(drawn)


def check_sample(argument: str, sample: RowSample, x: Tensor) -> None:
    """Raises ``TypeError`` or ``ValueError`` naming ``argument`` unless it can be used with x [..., K]."""
    if not isinstance(sample, RowSample):
        raise TypeError(f"{argument} must be a RowSample or None; got {type(sample).__name__}")
    index, kept, weight, images = sample
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{argument}.index must be a Tensor of torch.int32 or torch.int64; got {given}")
    if index.dim() != 1:
        raise ValueError(f"{argument}.index must be [S]; got shape {tuple(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{argument}.index must be on the device of x, {x.device}; got {index.device}")
    size = index.shape[0]
    if not 0 <= kept <= size:
        raise ValueError(f"{argument}.kept must be from 0 to S = {size}; got {kept}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{argument}.weight must be a finite number of at least 0; got {weight}")
    if images == 0:
        return
    rows = math.prod(x.shape[:-1])
    if images < 0 or rows % images or kept % images or size % images or kept == size:
        raise ValueError(
            f"{argument}.images must divide the rows of x, {rows}, the kept entries, {kept}, and the others, "
            f"{size - kept}, of which it needs some; or be 0; got {images}"
        )


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


FEWEST_TO_CENTRE = 4
"""Drawn rows an image from which on the means take more noise away than n / (n - 1) times the covariance's adds."""


def sample_rows(shape: torch.Size, fraction: float, prefix: int, device: torch.device) -> RowSample | None:
    """Rows of an x of ``shape`` [B, ..., K]: from every image its first ``prefix`` tokens and a draw of the others.

    Of an image's P other tokens exactly n = round(fraction · P) are drawn, at least one, without replacement, every
    subset as likely as any other. From n = 4 on the sample has ``images``. An x [M, K] is one image without a prefix,
    and its sample has none. The draws come from the global generator of ``device``, as dropout's do; on a GPU they take
    two launches.

    Returns:
        The sample, each of its two parts in the order of an image's tokens; None where it would be every row.
    """
    images, tokens = (shape[0], math.prod(shape[1:-1])) if len(shape) > 2 else (1, math.prod(shape[:-1]))
    prefix = prefix if len(shape) > 2 else 0
    others = tokens - prefix
    drawn = max(1, math.floor(fraction * others + 0.5))
    if images == 0 or drawn >= others:
        return None
    index = _draw(images, others, drawn, prefix, device)
    if len(shape) > 2 and drawn >= FEWEST_TO_CENTRE:
        return RowSample(index, images * prefix, (others - 1) / (drawn - 1), images)
    return RowSample(index, images * prefix, others / drawn)


def _draw(images: int, others: int, drawn: int, prefix: int, device: torch.device) -> Tensor:
    """Index of a sample: ``prefix`` rows an image, then the ``drawn`` of its ``others`` with the smallest keys."""
    keys = None
    if _has_kernel(others, device):
        keys = torch.rand(images, others, device=device)
        triton_draw = importlib.import_module("rlrr_kernels.ops.sampling.triton_draw")
        if (index := triton_draw.smallest_keys(keys, drawn, prefix)) is not None:
            return index
    first = torch.arange(0, images * (prefix + others), prefix + others, device=device).unsqueeze(1)
    if keys is None:  # rand_like, as torch.compile knows it for random: it is never drawn anew for the backward
        keys = torch.rand_like(first.expand(images, others), dtype=torch.float32)
    return smallest_keys(keys, first, drawn, prefix)


def _has_kernel(others: int, device: torch.device) -> bool:
    """Whether a kernel finds the smallest keys: not while tracing, whose compiler fuses the torch operators."""
    return (
        others <= MOST_KEYS
        and device.type != "meta"  # where no backend but torch can run
        and backends.resolve("auto", device, torch.float32).startswith("triton")
        and not (torch.compiler.is_compiling() or private.transforms_active())
        and private.dispatch_modes() == 0
    )


def smallest_keys(keys: Tensor, first: Tensor, drawn: int, prefix: int) -> Tensor:
    """The index of :func:`sample_rows` by keys [B, P]; ``first`` [B, 1] are the images' first rows."""
    picked = keys.topk(drawn, largest=False, sorted=False).indices.sort(dim=1).values + (first + prefix)
    if prefix == 0:
        return picked.flatten()
    kept = first + torch.arange(prefix, device=keys.device)
    return torch.cat([kept.flatten(), picked.flatten()])


def flatten_sample(sample: RowSample | None) -> tuple[Tensor | None, int, float, int]:
    """A sample as arguments of an operator; :func:`unflatten_sample` is the inverse."""
    return (None, 0, 1.0, 0) if sample is None else (sample.index, sample.kept, sample.weight, sample.images)


def unflatten_sample(
    index: Tensor | None = None, kept: int = 0, weight: float = 1.0, images: int = 0
) -> RowSample | None:
    """The sample that :func:`flatten_sample` took apart; None without an index."""
    return None if index is None else RowSample(index, kept, weight, images)
