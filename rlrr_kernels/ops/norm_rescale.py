"""``norm_rescale``: layer normalisation followed by SSF's trained scale and shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def norm_rescale(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """y = γ ⊙ (w ⊙ x̂ + b) + β with x̂ = (x - mean) / √(var + eps): a frozen LayerNorm under a trained scale and shift.

    SSF ("Scaling & Shifting Your Features", NeurIPS 2022) as the recipe of RLRR (CVPR 2024) uses it, over the last
    dimension. Computed as one layer norm with weight γ ⊙ w and bias γ ⊙ b + β: beside x only the mean and the
    reciprocal standard deviation of each row are kept for the backward, ∂γ = w ⊙ Σ g ⊙ x̂ + b ⊙ Σ g, ∂β = Σ g.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        weight: w, [D], frozen; None stands for ones.
        bias: b, [D], frozen; None stands for zeros.
        scale: γ, [D], trained.
        shift: β, [D], trained.
        eps: added to the variance.

    Returns:
        y, [..., D], in the dtype ``F.layer_norm`` would give, also under autocast (which makes it float32 on CUDA). All
        sums are fp32 (fp64 for float64), y is rounded once.

    Raises:
        ValueError: a shape does not fit, or ``weight`` or ``bias`` requires a gradient.
    """
    size = x.shape[-1] if x.dim() else None
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != size):
            raise ValueError(f"{name} must be [D] with D = {size}, the last dimension of x; got {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must be frozen: it has requires_grad=True. Call {name}.requires_grad_(False)")
    dtype = _result_dtype(x)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = fold_norm(weight, bias, scale, shift)
        return F.layer_norm(x.to(wide), (size,), weight.to(wide), bias.to(wide), eps).to(dtype)
    return _NormRescale.apply(x, weight, bias, scale, shift, eps, dtype)


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


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``F.layer_norm``'s result: autocast widens it to float32, but not on CPUs."""
    if x.dtype in (torch.float16, torch.bfloat16) and x.device.type not in ("cpu", "meta"):
        return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return x.dtype


class _NormRescale(torch.autograd.Function):
    """Keeps x and the row statistics. The norm's own backward gives ∂x alone: on CPUs its sums for the parameters run
    row by row, with ten times the error of ``sum`` at 6,000 rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, eps, dtype):
        wide = torch.promote_types(x.dtype, torch.float32)
        folded_weight, folded_bias = (tensor.to(wide) for tensor in fold_norm(weight, bias, scale, shift))
        y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], folded_weight, folded_bias, eps)
        ctx.save_for_backward(x, weight, bias, scale, mean, rstd)
        ctx.shift_dtype = shift.dtype
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, scale, mean, rstd = ctx.saved_tensors
        need_x, _, _, need_scale, need_shift = ctx.needs_input_grad[:5]
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
        return grad_x, None, None, grad_scale, total.to(ctx.shift_dtype) if need_shift else None, None, None
