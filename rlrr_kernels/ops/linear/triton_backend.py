"""``rlrr_linear`` in Triton: which launches a forward and a backward need, and the tensors they write.

Where a kernel gives way (:mod:`rlrr_kernels.ops.host.guard`) the vendor library's products are taken, with W' by the
merge's kernel or, where that gives way as well, by plain torch. A caller's ``path`` forces the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels.devices import gpu_of
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.dtypes import accumulate_dtype, matmul_precision
from rlrr_kernels.ops.host import guard
from rlrr_kernels.ops.linear import first_use
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.ops.linear.first_use import in_tf32
from rlrr_kernels.ops.linear.triton import sampled as linear_rows_triton
from rlrr_kernels.ops.linear.triton.launches import (
    forward_launches,
    grad_scales_launches,
    grad_x_launches,
    merge_launch,
)
from rlrr_kernels.ops.sampling.row_sample import RowSample


def merge(
    weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, dtype: torch.dtype | None = None,
    path: str | None = None,
) -> Tensor:  # fmt: skip
    """W' [N, K] as a new tensor, rounded once to ``dtype`` (default: W's), in one elementwise pass."""
    merged = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    if merged.numel():
        given = weight, scale_row.contiguous(), scale_col.contiguous(), residual
        launches = (merge_launch(*given, merged),)
        if not guard.ran(launches, path is not None, lambda: first_use.merge_error(*given, merged)):
            return linear_torch.merge(*given, dtype)
    return merged


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    path: str | None = None,
) -> Tensor:
    """y [M, N] = x W'ᵀ + b. x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N].

    ``path`` forces ``fused`` or ``merge``.
    """
    M, N, rank = x.shape[0], weight.shape[0], scale_col.shape[1]
    gpu, precision = gpu_of(x.device), matmul_precision()
    choice = store.path_choice(gpu, precision, x.device, x.dtype, weight.dtype, M, weight.shape, rank)
    if (path or choice.path) == "merge":
        return _merged_forward(x, weight, scale_row, scale_col, bias, residual, path)
    y = x.new_empty(M, N)
    if y.numel():
        tiles = store.choose_tiles("forward", gpu, precision, x, weight, weight.dtype, rank)
        bias = None if bias is None else bias.contiguous()
        scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
        given = x, weight, scale_row, scale_col, bias, residual, y
        launches = forward_launches(*given, gpu, precision, tiles)
        if not guard.ran(launches, path is not None, lambda: first_use.forward_error(*given, in_tf32(launches))):
            return _merged_forward(x, weight, scale_row, scale_col, bias, residual, path)
    return y


def _merged_forward(x, weight, scale_row, scale_col, bias, residual, path) -> Tensor:
    merged = merge(weight, scale_row, scale_col, residual, x.dtype, path)
    return F.linear(x, merged, None if bias is None else bias.to(x.dtype))


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    needs: tuple[bool, bool, bool, bool],
    path: str | None = None,
    sample: RowSample | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row [N, r], scale_col [G, r, K] and bias [N]; None where ``needs`` says so.

    Scale gradients come in the dtype of their scale, ∂b in fp32 (fp64 for float64). With a ``sample`` G is its estimate
    and x [S, K] holds its rows.
    """
    need_x, need_row, need_col, need_bias = needs
    scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
    dtype, gpu, precision = accumulate_dtype(grad_y.dtype), gpu_of(grad_y.device), matmul_precision()
    grad_x = _grad_x(grad_y, weight, scale_row, scale_col, residual, path, gpu, precision) if need_x else None
    if not (need_row or need_col):
        return grad_x, None, None, grad_y.sum(0, dtype=dtype) if need_bias else None
    grads = (
        torch.empty_like(scale_row) if need_row else None,
        torch.empty_like(scale_col) if need_col else None,
        grad_y.new_empty(weight.shape[0], dtype=dtype) if need_bias else None,
    )
    rank = scale_col.shape[1]
    tiles = store.choose_tiles("grad_scales", gpu, precision, x, grad_y, weight.dtype, rank, sample is not None)
    given = grad_y, x, weight, scale_row, scale_col, grads
    if sample is None:
        launches = grad_scales_launches(*given, gpu, precision, tiles)
    else:
        launches = linear_rows_triton.grad_scales_launches(*given, sample, gpu, precision, tiles)

    def find_error() -> str | None:
        return first_use.grad_scales_error(*given, in_tf32(launches), sample)

    if not guard.ran(launches, path is not None, find_error if x.numel() and weight.numel() else None):
        needs = False, need_row, need_col, need_bias
        _, *grads = linear_torch.backward(grad_y, x, weight, scale_row, scale_col, residual, needs, sample)
    return grad_x, *grads


def _grad_x(grad_y, weight, scale_row, scale_col, residual, path, gpu, precision) -> Tensor:
    M, (N, K), rank = grad_y.shape[0], weight.shape, scale_col.shape[1]
    choice = store.path_choice(gpu, precision, grad_y.device, grad_y.dtype, weight.dtype, M, weight.shape, rank)
    if (path or choice.path) == "merge":
        return grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype, path)
    if N == 0:
        return grad_y.new_zeros(M, K)
    grad_x = grad_y.new_empty(M, K)
    if grad_x.numel():
        tiles = store.choose_tiles("grad_x", gpu, precision, grad_y, weight, weight.dtype, rank)
        given = grad_y, weight, scale_row, scale_col, residual, grad_x
        launches = grad_x_launches(*given, gpu, precision, tiles)
        if not guard.ran(launches, path is not None, lambda: first_use.grad_x_error(*given, in_tf32(launches))):
            return grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype, path)
    return grad_x
