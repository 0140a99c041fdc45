"""``rlrr_linear`` in plain torch: every device, every dtype, the same backward and memory promise as the kernels.

Forward and ∂x write W' to a scratch buffer that lives for the call and hand it to the library GEMM. For the scale
gradients G = gᵀx exists a block of rows at a time. The other form, [x; x ⊙ s_c] Wᵀ, writes nothing W-sized but sums in
whatever order the library picks for twice the rows: up to 1.9 times eager's error on odd shapes, so it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.sampling.row_sample import RowSample

BLOCK_ELEMENTS = {"cpu": 1 << 20}
"""Weight elements handled at once, 4 MiB of fp32: small ones mean more operations, large ones fall out of the cache."""

_DEFAULT_BLOCK_ELEMENTS = 1 << 24  # elsewhere a launch costs more than a cache miss


def _row_blocks(weight: Tensor, groups: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end row) of blocks that never straddle two groups."""
    N, K = weight.shape
    size = N // groups
    limit = BLOCK_ELEMENTS.get(weight.device.type, _DEFAULT_BLOCK_ELEMENTS)
    step = max(1, min(size, limit // max(K, 1)))
    for group in range(groups):
        for start in range(group * size, (group + 1) * size, step):
            yield group, start, min(start + step, (group + 1) * size)


def merge(
    weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """W' [N, K] as a new tensor: computed in fp32 (fp64 for float64), rounded once to ``dtype`` (default: W's).

    weight [N, K], scale_row [N, r], scale_col [G, r, K].
    """
    wide = accumulate_dtype(weight.dtype)
    scale_row, scale_col = scale_row.to(wide), scale_col.to(wide)
    one = torch.full((), float(residual), dtype=wide, device=weight.device)
    merged = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    for group, start, end in _row_blocks(weight, scale_col.shape[0]):
        # Elementwise, not a matrix product: float32 ones may run in TF32 or bf16, the factor must not. Sums of many
        # pairs are blocked by four, or their rounding would exceed that of eager's product.
        rows, cols = scale_row[start:end], scale_col[group]
        factor = torch.addcmul(one, rows[:, :1], cols[:1])
        for j in range(1, rows.shape[1], 4):
            part = rows[:, j : j + 1] * cols[j : j + 1]
            for i in range(j + 1, min(j + 4, rows.shape[1])):
                part.addcmul_(rows[:, i : i + 1], cols[i : i + 1])
            factor += part
        if merged.dtype == wide:
            torch.mul(weight[start:end], factor, out=merged[start:end])
        else:
            merged[start:end] = factor.mul_(weight[start:end])
    return merged


def forward(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool
) -> Tensor:
    """y [M, N] = x W'ᵀ + b. x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N]."""
    merged = merge(weight, scale_row, scale_col, residual, x.dtype)
    return F.linear(x, merged, None if bias is None else bias.to(x.dtype))


# Products, then torch.sum, which adds pairwise: matrix-vector products add in sequence, up to 1.4 times eager's error,
# and matrix products could run in TF32 or bf16.


def row_sums(product: Tensor, scale_col: Tensor) -> Tensor:
    """∂s_r [n, r] = (G ⊙ W) s_cᵀ of the product G ⊙ W [n, K] with s_c [r, K], both in the accumulation dtype."""
    out = product.new_empty(product.shape[0], scale_col.shape[0])
    for j, col in enumerate(scale_col):
        out[:, j] = (product * col).sum(1)
    return out


def col_sums(product: Tensor, scale_row: Tensor) -> Tensor:
    """∂s_c [r, K] = s_rᵀ (G ⊙ W) of the product G ⊙ W [n, K] with s_r [n, r], both in the accumulation dtype."""
    out = product.new_empty(scale_row.shape[1], product.shape[1])
    for j in range(scale_row.shape[1]):
        out[j] = (product * scale_row[:, j : j + 1]).sum(0)
    return out


def _weighted_product(parts: list[tuple[Tensor, Tensor, float]], start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows ``start`` to ``end`` of G, [end - start, K]: Σ weight · gᵀx over parts (g [s, N], x [s, K], weight)."""
    grad_y, x, weight = parts[0]
    product = (grad_y[:, start:end].t() @ x).to(dtype)
    if weight != 1:
        product *= weight
    for grad_y, x, weight in parts[1:]:
        product.add_(grad_y[:, start:end].t() @ x, alpha=weight)
    return product


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    needs: tuple[bool, bool, bool, bool],
    sample: RowSample | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row [N, r], scale_col [G, r, K] and bias [N]; None where ``needs`` says so.

    ∂x = g W';  with G = gᵀx: ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W), ∂b = Σ_m g. Scale gradients come in the dtype of
    their scale, ∂b in fp32 (fp64 for float64). ``x`` may be None when no scale gradient is needed. With a ``sample`` G
    is its estimate and x [S, K] holds its rows.
    """
    need_x, need_row, need_col, need_bias = needs
    wide = accumulate_dtype(grad_y.dtype)
    grad_x = grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype) if need_x else None
    grad_row = torch.empty(scale_row.shape, dtype=wide, device=weight.device) if need_row else None
    grad_col = torch.zeros(scale_col.shape, dtype=wide, device=weight.device) if need_col else None
    if need_row or need_col:
        row, col = scale_row.to(wide), scale_col.to(wide)
        parts = [(grad_y, x, 1.0)] if sample is None else sample.parts(grad_y, x)
        for group, start, end in _row_blocks(weight, scale_col.shape[0]):
            product = _weighted_product(parts, start, end, wide)
            product *= weight[start:end]
            if need_row:
                grad_row[start:end] = row_sums(product, col[group])
            if need_col:
                grad_col[group] += col_sums(product, row[start:end])
    return (
        grad_x,
        None if grad_row is None else grad_row.to(scale_row.dtype),
        None if grad_col is None else grad_col.to(scale_col.dtype),
        grad_y.sum(0, dtype=wide) if need_bias else None,
    )
