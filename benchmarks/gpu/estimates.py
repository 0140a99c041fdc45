"""Estimates of the scale gradients to be timed: ``scale_grad_rows`` of 1/2, 1/4 and 1/8, drawing included."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.plan import TOKENS
from benchmarks.support.common import Forward
from rlrr_kernels import RowSample, rlrr_linear
from rlrr_kernels.ops.sampling.row_sample import sample_rows

ESTIMATES = {"rows 1/2": 1 / 2, "rows 1/4": 1 / 4, "rows 1/8": 1 / 8}
"""Share of the rows by the implementation's name. Class tokens are always among them."""


def estimate_forward(name: str, t: dict[str, Tensor]) -> tuple[Forward, list[Tensor]]:
    """The forward of an estimate on the tensors ``t``, and the leaves of its gradients, x first.

    x [M, K] holds images of 197 tokens where M is a multiple of that, else one image without a prefix.
    """
    leaves = [t[key] for key in ("x", "scale_row", "scale_col", "bias")]
    x, weight = t["x"], t["weight"]
    m, k = x.shape
    shape = torch.Size((m // TOKENS, TOKENS, k)) if m % TOKENS == 0 else x.shape

    def forward() -> Tensor:
        sample = sample_rows(shape, ESTIMATES[name], 1, x.device)
        return rlrr_linear(x, weight, *leaves[1:], scale_grad_rows=sample)

    return forward, leaves


def exact_by_sampling(x, weight, scale_row, scale_col, bias=None, *, residual=True) -> Tensor:
    """``rlrr_linear`` with a sample that stands for all rows, so that its exactness can be checked as any other's.

    Three quarters of the rows count once, each of the others comes twice and counts half. More copies would be more
    additions than an exact gradient has, with their roundings.
    """
    m = x.numel() // x.shape[-1]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0)).to(x.device)
    once = m - m // 4
    sample = RowSample(torch.cat([order, order[once:]]), once, 0.5)
    return rlrr_linear(x, weight, scale_row, scale_col, bias, residual=residual, scale_grad_rows=sample)


def estimate_by_images(x, weight, scale_row, scale_col, bias=None, *, residual=True, backend="auto") -> Tensor:
    """``rlrr_linear`` with a draw from images and their means, the same at every call with so many rows.

    An estimate: to be compared with itself on another backend. Up to eight images of at least eight rows; exact where
    there are fewer rows.
    """
    m = x.numel() // x.shape[-1]
    if m < 8:
        return rlrr_linear(x, weight, scale_row, scale_col, bias, residual=residual, backend=backend)
    images = next(count for count in range(8, 0, -1) if m % count == 0 and (count == 1 or m // count >= 8))
    tokens, generator = m // images, torch.Generator().manual_seed(0)
    others = tokens - 1
    drawn = max(2, others // 3)
    picked = torch.stack([1 + torch.randperm(others, generator=generator)[:drawn] for _ in range(images)])
    first = torch.arange(0, m, tokens)
    index = torch.cat([first, (picked + first[:, None]).flatten()]).to(x.device)
    sample = RowSample(index, images, (others - 1) / (drawn - 1), images)
    return rlrr_linear(
        x, weight, scale_row, scale_col, bias, residual=residual, backend=backend, scale_grad_rows=sample
    )
