"""``rlrr_linear``: the public function. It checks its arguments and resolves the backend, once for every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.activation import functions as activation
from rlrr_kernels.ops.checks import check_linear
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear import library  # noqa: F401  (registers torch.ops.rlrr_kernels)
from rlrr_kernels.ops.linear.autograd import Call, CallCache, call_key, eager_linear, linear
from rlrr_kernels.ops.recompute import RECOMPUTED, recompute_of
from rlrr_kernels.ops.sampling.row_sample import RowSample, check_sample


def rlrr_linear(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    bias: Tensor | None = None,
    *,
    residual: bool = True,
    input_activation: str | None = None,
    backend: str = "auto",
    scale_grad_rows: RowSample | None = None,
) -> Tensor:
    """y = x W'ᵀ + b with W' = W ⊙ (1 + s_r s_c): a frozen linear layer under a low-rank rescaling.

    Eq. 16 of "Low-Rank Rescaled Vision Transformer Fine-Tuning" (CVPR 2024) for rank 1; any rank is the method called
    HiRA. W' never outlives the call. Between forward and backward only x and the parameters are kept. With
    g = ∂L/∂y and G = gᵀx: ∂x = g W', ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W), ∂b = Σ g.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64. Under autocast it is cast as ``F.linear`` would cast it.
        weight: [N, K], frozen; the dtype of x, or float32 beside a 16-bit x (cast tile by tile, never as a whole).
        scale_row: s_r, [N] or [N, r] with r ≤ 64; None stands for ones. float32 or the dtype of x.
        scale_col: s_c, [K] or [G, K] beside a 1-D ``scale_row``, [r, K] or [G, r, K] beside a 2-D one; None stands for
            ones. Row n of W uses group n // (N / G). float32 or the dtype of x.
        bias: [N], float32 or the dtype of x.
        residual: whether W itself is added; ``False`` gives W' = W ⊙ (s_r s_c).
        input_activation: a function of :data:`rlrr_kernels.ops.activation.functions.ACTIVATIONS` applied to x first:
            y = act(x) W'ᵀ + b. Only x is kept; the backward computes act(x) again. None: x as it is.
        backend: ``auto``, ``triton``, ``triton.fused``, ``triton.merge``, ``cpp`` or ``torch``; ``auto`` asks
            :func:`rlrr_kernels.use_backend`, then the environment variable ``RLRR_BACKEND``, then the device.
        scale_grad_rows: an estimate instead of the exact ∂s_r and ∂s_c: G from these rows alone, see
            :class:`rlrr_kernels.RowSample`. y, ∂x and ∂b stay exact. Of x only these rows are kept for the backward;
            all of it with an ``input_activation``, whose derivative ∂x needs, and inside ``torch.func`` transforms.

    Second derivatives work in eager mode, by the formula in plain torch, which then keeps W'-sized tensors; with
    ``scale_grad_rows`` or a recomputed x they are refused, as are forward-mode derivatives.

    Returns:
        y, [..., N] in the dtype of x after autocast. 1 + s_r s_c and all sums are fp32 (fp64 for float64); float32
        products obey :func:`torch.get_float32_matmul_precision`.

    Raises:
        TypeError: an argument is no tensor or has a dtype not named above, or ``scale_grad_rows`` is no RowSample.
        ValueError: a shape does not fit, devices differ, G does not divide N, the rank is over 64, ``weight`` requires
            a gradient, the activation is unknown, or the backend cannot run here.
        IndexError: a row of ``scale_grad_rows`` is not in x (on a GPU: a device-side assertion).
    """
    if input_activation is not None:
        activation.check_name("input_activation", input_activation)
    key = call_key((x, weight, scale_row, scale_col, bias), backend, residual, input_activation)
    call = None if key is None else _calls.get(key)
    if call is None:
        dtype = check_linear(x, weight, scale_row, scale_col, bias)
        resolved = backends.resolve(backend, x.device, dtype)
        call = Call(resolved, residual, input_activation, None if dtype == x.dtype else dtype, key is not None)
        if key is not None:
            _calls.keep(key, call)
    recompute = recompute_of(x) if key is None or hasattr(x, RECOMPUTED) else None
    if call.dtype is not None:
        x = x.to(call.dtype)
    if scale_grad_rows is not None:
        check_sample("scale_grad_rows", scale_grad_rows, x)
    if call.eager:
        if not (torch.is_grad_enabled() or private.autograd_is_asked_for()):  # an eighth of a small call
            return call.forward(x, weight, scale_row, scale_col, bias)
        return eager_linear(x, weight, scale_row, scale_col, bias, (call, scale_grad_rows, recompute, False))
    return linear(x, weight, scale_row, scale_col, bias, call, scale_grad_rows, recompute)


def known_call(
    x: Tensor, weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None,
    *, residual: bool = True, input_activation: str | None = None, backend: str = "auto",
) -> Call | None:  # fmt: skip
    """What earlier calls of :func:`rlrr_linear` with arguments in this layout share; None before the first."""
    key = call_key((x, weight, scale_row, scale_col, bias), backend, residual, input_activation)
    return None if key is None else _calls.get(key)


_calls = CallCache()
