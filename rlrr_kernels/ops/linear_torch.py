"""``rlrr_linear`` in plain torch: every device, every dtype, the same backward and memory promise as the kernels.

Two forms, chosen by the number of rows M of x:

* few rows, *stacked*: W stays untouched and the scales go to the activations, x W'ᵀ = x Wᵀ + Σ_j s_r[j] ⊙ (x ⊙ s_c[j]) Wᵀ.
  Nothing W-sized is written. 16-bit weights are widened block by block, so no product of the sum is rounded to 16 bits.
* many rows, *merge*: W' is written to a scratch buffer that lives for the call and handed to the library GEMM; in
  backward G = gᵀx exists only a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

STACKED_MAX_ROWS = 48
"""Largest M·(1 + r) / 2 for which the stacked form is used; measured on CPUs by ``benchmarks/test_linear.py``."""

BLOCK_ELEMENTS = {"cpu": 1 << 18}
"""Weight elements handled at once: half an L2 cache of fp32 on CPUs; elsewhere launches cost more than cache misses."""

_DEFAULT_BLOCK_ELEMENTS = 1 << 24


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales, sums and 1 + s_r s_c: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_blocks(weight: Tensor, groups: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end row) of blocks that never straddle two groups."""
    rows, cols = weight.shape
    size = rows // groups
    limit = BLOCK_ELEMENTS.get(weight.device.type, _DEFAULT_BLOCK_ELEMENTS)
    step = max(1, min(size, limit // max(cols, 1)))
    for group in range(groups):
        for start in range(group * size, (group + 1) * size, step):
            yield group, start, min(start + step, (group + 1) * size)


def _rescale(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, out: Tensor) -> None:
    """Writes one block of W' to ``out``, rounded once. weight [n, K], scale_row [n, r], scale_col [r, K]."""
    dtype = accumulate_dtype(weight.dtype)
    scale_row, scale_col = scale_row.to(dtype), scale_col.to(dtype)
    one = torch.full((), float(residual), dtype=dtype, device=weight.device)
    # Never a matrix product: float32 ones may run in TF32 or bf16, the factor must not.
    factor = torch.addcmul(one, scale_row[:, :1], scale_col[:1])
    for j in range(1, scale_row.shape[1]):
        factor.addcmul_(scale_row[:, j : j + 1], scale_col[j : j + 1])
    torch.mul(weight, factor, out=out) if out.dtype == factor.dtype else out.copy_(factor.mul_(weight))


def merge(
    weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """W' [N, K] as a new tensor: computed in fp32 (fp64 for float64), rounded once to ``dtype`` (default: W's).

    weight [N, K], scale_row [N, r], scale_col [G, r, K].
    """
    merged = torch.empty_like(weight, dtype=dtype or weight.dtype, memory_format=torch.contiguous_format)
    for group, start, end in _row_blocks(weight, scale_col.shape[0]):
        _rescale(weight[start:end], scale_row[start:end], scale_col[group], residual, merged[start:end])
    return merged


def _stacked(rows: int, rank: int) -> bool:
    return rows * (1 + rank) <= 2 * STACKED_MAX_ROWS


def forward(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool
) -> Tensor:
    """y [M, N] = x W'ᵀ + b. x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N]."""
    if not _stacked(x.shape[0], scale_row.shape[1]):
        merged = merge(weight, scale_row, scale_col, residual, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))
    dtype = accumulate_dtype(x.dtype)
    wide, scale_row, scale_col = x.to(dtype), scale_row.to(dtype), scale_col.to(dtype)
    rows, rank = scale_row.shape
    y = torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)
    for group, start, end in _row_blocks(weight, scale_col.shape[0]):
        scaled = (wide * scale_col[group].unsqueeze(1)).flatten(0, 1)  # [r·M, K]
        stack = torch.cat((wide, scaled)) if residual else scaled
        parts = F.linear(stack, weight[start:end].to(dtype)).unflatten(0, (-1, x.shape[0]))
        total = parts[0] if residual else torch.zeros_like(parts[0])
        for j in range(rank):
            total = torch.addcmul(total, parts[j + residual], scale_row[start:end, j])
        y[:, start:end] = total
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row [N, r], scale_col [G, r, K] and bias [N]; None where ``needs`` says so.

    ∂x = g W';  with G = gᵀx: ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W), ∂b = Σ_m g. Scale gradients come in the dtype of
    their scale, ∂b in fp32 (fp64 for float64). ``x`` may be None when no scale gradient is needed.
    """
    need_x, need_row, need_col, need_bias = needs
    dtype = accumulate_dtype(grad_y.dtype)
    grad_bias = grad_y.sum(0, dtype=dtype) if need_bias else None
    if not (need_x or need_row or need_col):
        return None, None, None, grad_bias
    compute = _backward_stacked if _stacked(grad_y.shape[0], scale_row.shape[1]) else _backward_merged
    grad_x, grad_row, grad_col = compute(
        grad_y, x, weight, scale_row.to(dtype), scale_col.to(dtype), residual, (need_x, need_row, need_col)
    )
    return (
        grad_x,
        None if grad_row is None else grad_row.to(scale_row.dtype),
        None if grad_col is None else grad_col.to(scale_col.dtype),
        grad_bias,
    )


def _backward_stacked(grad_y, x, weight, scale_row, scale_col, residual, needs):
    """∂s_r = Σ_m g ⊙ ((x ⊙ s_c) Wᵀ) and ∂s_c = Σ_m x ⊙ ((g ⊙ s_r) W): G never exists, not even in blocks."""
    need_x, need_row, need_col = needs
    dtype, (rank, count) = scale_row.dtype, (scale_row.shape[1], grad_y.shape[0])
    g = grad_y.to(dtype)
    wide = x.to(dtype) if need_row or need_col else None
    grad_x = torch.zeros(count, weight.shape[1], dtype=dtype, device=g.device) if need_x else None
    grad_row = torch.empty_like(scale_row) if need_row else None
    grad_col = torch.zeros_like(scale_col) if need_col else None
    for group, start, end in _row_blocks(weight, scale_col.shape[0]):
        block = weight[start:end].to(dtype)
        g_block = g[:, start:end]
        if need_x or need_col:
            scaled = (g_block * scale_row[start:end].t().unsqueeze(1)).flatten(0, 1)  # [r·M, n]
            with_plain = residual and need_x
            stack = torch.cat((g_block, scaled)) if with_plain else scaled
            parts = (stack @ block).unflatten(0, (-1, count))
            scaled_parts = parts[1:] if with_plain else parts
            if need_x:
                if with_plain:
                    grad_x += parts[0]
                for j in range(rank):
                    grad_x.addcmul_(scaled_parts[j], scale_col[group, j])
            if need_col:
                grad_col[group] += (scaled_parts * wide).sum(1)
        if need_row:
            for j in range(rank):
                grad_row[start:end, j] = (F.linear(wide * scale_col[group, j], block) * g_block).sum(0)
    return None if grad_x is None else grad_x.to(grad_y.dtype), grad_row, grad_col


def _backward_merged(grad_y, x, weight, scale_row, scale_col, residual, needs):
    need_x, need_row, need_col = needs
    grad_x = grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype) if need_x else None
    grad_row = torch.empty_like(scale_row) if need_row else None
    grad_col = torch.zeros_like(scale_col) if need_col else None
    if need_row or need_col:
        for group, start, end in _row_blocks(weight, scale_col.shape[0]):
            product = (grad_y[:, start:end].t() @ x).to(scale_row.dtype)
            product *= weight[start:end]
            # Sums of products, elementwise and blocked: as matrix products they could run in TF32 or bf16.
            for j in range(scale_row.shape[1]):
                if need_row:
                    torch.mv(product, scale_col[group, j], out=grad_row[start:end, j])
                if need_col:
                    grad_col[group, j] += torch.mv(product.t(), scale_row[start:end, j])
    return grad_x, grad_row, grad_col
