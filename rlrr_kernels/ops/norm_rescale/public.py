"""``norm_rescale``: layer normalisation followed by SSF's trained scale and shift."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import backends
from rlrr_kernels.ops.checks import check_float, check_frozen, check_operands, in_memory
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.norm_rescale import torch_backend as norm_rescale_torch
from rlrr_kernels.ops.norm_rescale.torch_backend import fold_norm
from rlrr_kernels.ops.recompute import attach_recompute
from rlrr_kernels.ops.second_order import ReverseOnly, differentiable_gradients


def norm_rescale(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    *,
    keep_output: bool = True,
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
        keep_output: ``False`` lets an :func:`rlrr_kernels.rlrr_linear` or ``rlrr_mlp`` that takes y compute it again in
            its backward, by one more pass over x, instead of keeping it; under ``torch.compile`` whoever takes y.
            Has no effect inside ``torch.func`` transforms and under ``torch.export``.

    Returns:
        y, [..., D], in the dtype ``F.layer_norm`` would give, also under autocast (which makes it float32 on CUDA). All
        sums are fp32 (fp64 for float64), y is rounded once.

    Raises:
        TypeError: an argument is no tensor, sparse or nested, or x has a dtype not named above.
        ValueError: a shape or device does not fit, or ``weight`` or ``bias`` requires a gradient (gradients are on).
    """
    frozen = [(name, tensor) for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
    operands = *frozen, ("scale", scale), ("shift", shift)
    check_operands(x, *operands)
    check_float(x)
    size = x.shape[-1] if x.dim() else None
    for name, tensor in operands:
        if tensor.dim() != 1 or tensor.shape[0] != size:
            raise ValueError(f"{name} must be [D] with D = {size}, the last dimension of x; got {tuple(tensor.shape)}")
    for name, tensor in frozen:
        check_frozen(tensor, name, "layer_norm")
    dtype = result_dtype(x)
    if torch.compiler.is_compiling() or private.transforms_active():
        compute = _traced if keep_output or not _partitioned() else _traced_again_in_backward
        return compute(x, weight, bias, scale, shift, eps, dtype)
    y = _NormRescale.apply(x, weight, bias, scale, shift, eps, dtype)
    if not keep_output:
        again = functools.partial(_compute_again, _implementation(x), eps, dtype)
        attach_recompute(y, again, (x, weight, bias, scale, shift))
    return y


def _traced(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """In operations that a compiler knows, which it fuses with those before and after."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = fold_norm(weight, bias, scale, shift)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype)


def _traced_again_in_backward(x: Tensor, *arguments) -> Tensor:
    """The same. The compiler may not hand y, which an opaque operator's backward reads, on to the backward."""
    return checkpoint(_traced, x, *arguments, use_reentrant=False)


def _partitioned() -> bool:
    """Whether a compiler is at work that makes a backward of its own and knows checkpoints."""
    return (
        torch.compiler.is_dynamo_compiling()
        and not private.exporting()
        and torch.is_grad_enabled()
        and not private.transforms_active()
    )


def _compute_again(
    module: ModuleType, eps: float, dtype: torch.dtype, wanted: torch.dtype, x: Tensor, *parameters: Tensor | None
) -> Tensor:
    if dtype == torch.promote_types(x.dtype, torch.float32):
        dtype = wanted  # not rounded before: the kernel may as well write what the cast of its result would give
    with private.NoAutocast():
        return module.forward(*in_memory(x, *parameters), eps, dtype)[0].to(wanted)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``F.layer_norm``'s result: autocast widens it to float32, but not on CPUs."""
    if x.dtype in (torch.float16, torch.bfloat16) and x.device.type not in ("cpu", "meta"):
        return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return x.dtype


def _implementation(x: Tensor) -> ModuleType:
    """The module that computes: Triton's where the linear operator would take Triton's too, else plain torch."""
    if backends.resolve("auto", x.device, x.dtype).startswith("triton"):
        triton = importlib.import_module("rlrr_kernels.ops.norm_rescale.triton_backend")
        if x.shape[-1] <= triton.MAX_SIZE:
            return triton
    return norm_rescale_torch


class _NormRescale(ReverseOnly):
    """Keeps x, the parameters and the statistics of each row."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, eps, dtype):
        ctx.module = _implementation(x)
        y, mean, rstd = ctx.module.forward(*in_memory(x, weight, bias, scale, shift), eps, dtype)
        ctx.save_for_backward(x, weight, bias, scale, mean, rstd)
        ctx.options = shift.dtype, eps, dtype
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias, scale, mean, rstd = ctx.saved_tensors
        shift_dtype, eps, dtype = ctx.options
        need_x, _, _, need_scale, need_shift, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or private.is_batch(grad_y):  # the former: create_graph=True
            shift = torch.zeros_like(scale, dtype=shift_dtype, requires_grad=need_shift)
            grads = differentiable_gradients(
                lambda x, scale, shift: _traced(x, weight, bias, scale, shift, eps, dtype),
                (x, scale, shift), (need_x, need_scale, need_shift), grad_y,
            )  # fmt: skip
            return grads[0], None, None, *grads[1:], None, None
        grad_y, x, weight, bias, scale = in_memory(grad_y, x, weight, bias, scale)
        grad_x, grad_scale, grad_shift = ctx.module.backward(
            grad_y, x, weight, bias, scale, shift_dtype, mean, rstd, (need_x, need_scale, need_shift)
        )
        return grad_x, None, None, grad_scale, grad_shift, None, None
