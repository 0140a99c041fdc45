"""The literal formulas of the paper: oracle of the tests and rival of the benchmarks. Never optimised."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rescaled_weight_reference(weight: Tensor, scale_row: Tensor, scale_col: Tensor, *, residual: bool = True) -> Tensor:
    """W' = W ⊙ (s_r s_c) + W, or without the last term for ``residual=False`` (Eq. 16 of the paper, any rank).

    Args:
        weight: [N, K].
        scale_row: [N] or [N, r].
        scale_col: [K] or [G, K] beside a 1-D ``scale_row``; [r, K] or [G, r, K] beside a 2-D one.
        residual: whether W itself is added.

    Returns:
        [N, K] in the promoted dtype of the arguments; every elementwise operation rounds, as eager PyTorch does.
    """
    rows = weight.shape[0]
    if scale_row.dim() == 1 and scale_col.dim() == 1:
        delta = weight * scale_col * scale_row[:, None]
    else:
        if scale_row.dim() == 1:
            scale_row, scale_col = scale_row[:, None], scale_col[:, None]
        if scale_col.dim() == 2:
            scale_col = scale_col[None]
        groups, rank, cols = scale_col.shape
        product = scale_row.view(groups, rows // groups, rank) @ scale_col.to(scale_row.dtype)
        delta = weight * product.view(rows, cols)
    return delta + weight if residual else delta


def rlrr_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = True,
) -> Tensor:
    """y = x · (W ⊙ (s_r s_c) + W)ᵀ + b as eager PyTorch computes it; shapes as in :func:`rlrr_kernels.rlrr_linear`."""
    weight = rescaled_weight_reference(weight, scale_row, scale_col, residual=residual)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rlrr_linear_multi_reference(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor,
    residual: bool = True,
) -> Tensor:
    """:func:`rlrr_linear_reference` for the samples of each adapter; shapes as in ``rlrr_linear_multi``, index [S]."""
    parts, samples = [x.new_empty(0, *x.shape[1:-1], weight.shape[0])], []
    for task in sorted({*index.tolist()}):
        samples.append((index == task).nonzero().flatten())
        own, total = x[samples[-1]], bias
        if task < 0:
            parts.append(F.linear(own, weight.to(x.dtype), None if total is None else total.to(x.dtype)))
            continue
        if shift is not None:
            total = shift[task] if bias is None else bias + shift[task]
        parts.append(rlrr_linear_reference(own, weight, scale_row[task], scale_col[task], total, residual=residual))
    return torch.cat(parts)[torch.cat(samples).argsort()] if samples else parts[0]


def rlrr_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "out,in*kh*kw",
    residual: bool = True,
    **options: Any,
) -> Tensor:
    """y = conv2d(x, W ⊙ (s_r s_c) + W) + b as eager PyTorch computes it; shapes as in ``rlrr_conv2d`` (ops/conv.py)."""
    out, channels, height, width = weight.shape
    if layout == "out,in*kh*kw":
        factor = (scale_row @ scale_col[0].to(scale_row.dtype)).view(weight.shape)
    else:
        factor = (scale_row @ scale_col[0].to(scale_row.dtype)).view(out, height, channels, width).transpose(1, 2)
    kernel = weight * factor + weight if residual else weight * factor
    return F.conv2d(x, kernel.to(x.dtype), None if bias is None else bias.to(x.dtype), **options)


def rlrr_mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_scale_row: Tensor,
    fc1_scale_col: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_scale_row: Tensor,
    fc2_scale_col: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    residual: bool = True,
) -> Tensor:
    """fc1, GELU (``gelu`` exact, ``gelu_tanh`` approximate), fc2; shapes as in :func:`rlrr_kernels.rlrr_mlp`."""
    h = rlrr_linear_reference(x, fc1_weight, fc1_scale_row, fc1_scale_col, fc1_bias, residual=residual)
    a = F.gelu(h, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
    return rlrr_linear_reference(a, fc2_weight, fc2_scale_row, fc2_scale_col, fc2_bias, residual=residual)


def norm_rescale_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """y = γ ⊙ LayerNorm(x) + β over the last dimension; shapes as in :func:`rlrr_kernels.norm_rescale`."""
    return scale * F.layer_norm(x, x.shape[-1:], weight, bias, eps) + shift
