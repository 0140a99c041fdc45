"""``norm_rescale``: layer normalisation followed by SSF's trained scale and shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_rescale(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """y = γ ⊙ (w ⊙ (x - mean) / √(var + eps) + b) + β over the last dimension: a frozen LayerNorm under a trained SSF.

    SSF is "Scaling & Shifting Your Features" (NeurIPS 2022), part of the recipe of RLRR (CVPR 2024). In float32 and
    float64 it is computed as one layer norm with weight γ ⊙ w and bias γ ⊙ b + β: no pass over x beyond the norm's own,
    and beside x only the mean and the reciprocal standard deviation of each row are kept for the backward.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        weight: w, [D], frozen; None stands for ones.
        bias: b, [D], frozen; None stands for zeros.
        scale: γ, [D], trained.
        shift: β, [D], trained.
        eps: added to the variance.

    Returns:
        y, [..., D], in the dtype ``F.layer_norm`` would give, also under autocast (which makes it float32 on CUDA).

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
    if _normalises_in_16_bits(x):
        # Not folded: the norm's backward would round the sums behind the gradients of γ and β to 16 bits.
        return (F.layer_norm(x, (size,), weight, bias, eps) * scale.float() + shift.float()).to(x.dtype)
    weight, bias = fold_norm(weight, bias, scale, shift)
    if x.dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    return F.layer_norm(x, (size,), weight, bias, eps)


def _normalises_in_16_bits(x: Tensor) -> bool:
    """Whether ``F.layer_norm`` gives a 16-bit result for x; autocast casts to float32, but not on CPUs."""
    widened = x.device.type not in ("cpu", "meta") and torch.is_autocast_enabled(x.device.type)
    return x.dtype in (torch.float16, torch.bfloat16) and not widened


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
