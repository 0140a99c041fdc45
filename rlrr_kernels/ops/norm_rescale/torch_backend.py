"""``norm_rescale`` in plain torch, for every device and dtype.

The norm's own backward gives ∂x alone: on CPUs its sums for the parameters run row by row, with ten times the error of
``sum`` at 6,000 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_norm(weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """γ ⊙ w and γ ⊙ b + β [D] of the one LayerNorm that does the same, in fp32 (fp64 where an argument is).

    weight [D] or None (ones), bias [D] or None (zeros), scale and shift [D].
    """
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (weight, bias, scale, shift))
    dtype = torch.float64 if wide else torch.float32
    scale, shift = scale.to(dtype), shift.to(dtype)
    return (
        scale if weight is None else scale * weight.to(dtype),
        shift if bias is None else torch.addcmul(shift, scale, bias.to(dtype)),
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] in ``dtype``, mean and rstd [..., 1] in the dtype of the sums, of x [..., D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    folded_weight, folded_bias = (tensor.to(wide) for tensor in fold_norm(weight, bias, scale, shift))
    y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], folded_weight, folded_bias, eps)
    return y.to(dtype), mean, rstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂x [..., D], ∂γ [D], ∂β [D], each in the dtype of its tensor; None where ``needs`` says so."""
    need_x, need_scale, need_shift = needs
    wide, size = mean.dtype, x.shape[-1]
    grad_y, x_wide = grad_y.to(wide), x.to(wide)
    grad_x = grad_scale = total = None
    if need_x:
        folded = scale.to(wide) if weight is None else scale.to(wide) * weight.to(wide)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y, x_wide, (size,), mean, rstd, folded, None, (True, False, False)
        )[0].to(x.dtype)
    if need_shift or (need_scale and bias is not None):
        total = grad_y.reshape(-1, size).sum(0)
    if need_scale:
        grad_scale = (grad_y * ((x_wide - mean) * rstd)).reshape(-1, size).sum(0)
        if weight is not None:
            grad_scale = grad_scale * weight.to(wide)
        if bias is not None:
            grad_scale = torch.addcmul(grad_scale, total, bias.to(wide))
        grad_scale = grad_scale.to(scale.dtype)
    return grad_x, grad_scale, total.to(shift_dtype) if need_shift else None
