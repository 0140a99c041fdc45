"""``rlrr_conv2d``: a convolution with a frozen kernel under a trained rescaling; keeps x and the parameters alone."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels.ops.checks import MAX_RANK, check_operands, check_tensors
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.replay import PLAIN_TYPES
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.ops.second_order import ReverseOnly, differentiable_gradients

CONV_LAYOUTS = ("out,in*kh*kw", "out*kh,in*kw")
"""How a kernel [out, in, kh, kw] is seen as a matrix W: which of its axes index the rows, and which the columns."""


def rlrr_conv2d(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    layout: str = CONV_LAYOUTS[0],
    residual: bool = True,
) -> Tensor:
    """y = conv2d(x, W') + b with W' = W ⊙ (1 + s_r s_c), W [R, C] being the frozen kernel seen as a matrix.

    RLRR (CVPR 2024) on convolutions, as in the paper's CNN appendix. W' never outlives the call: the backward makes it
    again for ∂x, and the kernel's gradient G for ∂s_r = (G ⊙ W) s_cᵀ and ∂s_c = s_rᵀ (G ⊙ W), and drops both. Under
    ``torch.compile`` and inside ``torch.func`` it is the formula in PyTorch's own operations: every transform works,
    and what is kept is theirs to decide.

    Args:
        x: [B, in, H, W] or [in, H, W]; float32, float16, bfloat16 or float64. Autocast casts it as it would for
            ``F.conv2d``.
        weight: [out, in / groups, kh, kw], frozen; the dtype of x, or float32 beside a 16-bit x.
        scale_row: s_r [R, r], r ≤ 64. scale_col: s_c [1, r, C]. float32 or the dtype of x.
        bias: [out], float32 or the dtype of x.
        stride, padding, dilation, groups: as in ``F.conv2d``, in pairs; zeros are padded.
        layout: ``out,in*kh*kw``: R = out, C = (in / groups) kh kw. ``out*kh,in*kw``, the authors' choice: rows are the
            pairs (output channel, kernel row) and columns the pairs (input channel, kernel column), so R = out kh and
            C = (in / groups) kw.
        residual: ``False`` drops the 1.

    Returns:
        y, [B, out, H', W'], in the dtype of x after autocast. 1 + s_r s_c and the sums of the scales' gradients are
        fp32 (fp64 for float64), W' is rounded once.

    Raises:
        TypeError: an argument is no tensor, sparse or nested, or has a dtype not named above.
        ValueError: a shape does not fit, or ``weight`` requires a gradient.
    """
    check_operands(x, ("scale_row", scale_row), ("scale_col", scale_col))  # neither may be None
    dtype = check_tensors(x, weight, scale_row, scale_col, bias, function="conv2d")
    x = x.to(dtype)
    _check(x, weight, scale_row, scale_col, bias, groups, layout)
    options = (stride, padding, dilation, groups)
    transformed = torch.compiler.is_compiling() or private.transforms_active()
    function = _formula if transformed or type(x) not in PLAIN_TYPES else _Conv2d.apply
    if x.dim() == 3:
        return function(x[None], weight, scale_row, scale_col, bias, options, layout, residual)[0]
    return function(x, weight, scale_row, scale_col, bias, options, layout, residual)


def matrix_shape(kernel: tuple[int, ...], layout: str) -> tuple[int, int]:
    """(R, C) of a kernel [out, in / groups, kh, kw].

    Raises:
        ValueError: unknown layout.
    """
    out, channels, height, width = kernel
    if layout == "out,in*kh*kw":
        return out, channels * height * width
    if layout == "out*kh,in*kw":
        return out * height, channels * width
    raise ValueError(f"layout must be one of {' or '.join(map(repr, CONV_LAYOUTS))}; got {layout!r}")


def merge_kernel(
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    layout: str,
    residual: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W' as a kernel [out, in / groups, kh, kw]: a new tensor, rounded once to ``dtype`` (default: that of W)."""
    merged = linear_torch.merge(_matrix(weight, layout), scale_row, scale_col, residual, dtype)
    kernel = _kernel(merged, weight.shape, layout)
    # The strides of W, by which the library chooses the memory format of its result.
    result = torch.empty_like(weight, dtype=kernel.dtype)
    return kernel if result.stride() == kernel.stride() else result.copy_(kernel)


def _matrix(kernel: Tensor, layout: str) -> Tensor:
    shape = matrix_shape(kernel.shape, layout)
    return (kernel if layout == "out,in*kh*kw" else kernel.transpose(1, 2)).reshape(shape)


def _kernel(matrix: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    if layout == "out,in*kh*kw":
        return matrix.reshape(shape)
    out, channels, height, width = shape
    return matrix.reshape(out, height, channels, width).transpose(1, 2).contiguous()


def _check(x, weight, scale_row, scale_col, bias, groups: int, layout: str) -> None:
    if weight.dim() != 4:
        raise ValueError(f"weight must be [out, in / groups, kh, kw]; got shape {tuple(weight.shape)}")
    channels = weight.shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"x must be [B, in, H, W] or [in, H, W] with in = {channels}; got shape {tuple(x.shape)}")
    rows, cols = matrix_shape(weight.shape, layout)
    rank = scale_row.shape[-1]
    if scale_row.shape != (rows, rank) or not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"scale_row must be [R, r] with R = {rows} in the layout {layout!r} and r from 1 to {MAX_RANK}; "
            f"got shape {tuple(scale_row.shape)}"
        )
    if scale_col.shape != (1, rank, cols):
        raise ValueError(
            f"scale_col must be [1, r, C] with r = {rank} and C = {cols} in the layout {layout!r}; "
            f"got shape {tuple(scale_col.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [out] with out = {weight.shape[0]}; got shape {tuple(bias.shape)}")


def _formula(x, weight, scale_row, scale_col, bias, options, layout, residual) -> Tensor:
    """The same in operations that compilers and transforms see through, one pair of vectors at a time."""
    wide = accumulate_dtype(weight.dtype)
    row, col = scale_row.to(wide), scale_col[0].to(wide)
    factor = float(residual) + row[:, :1] * col[:1]
    for j in range(1, row.shape[1]):
        factor = factor + row[:, j : j + 1] * col[j : j + 1]
    kernel = _kernel(_matrix(weight, layout) * factor, weight.shape, layout).to(x.dtype)
    with _no_autocast(x.device.type):
        return F.conv2d(x, kernel, None if bias is None else bias.to(x.dtype), *options)


def _no_autocast(device_type: str):
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class _Conv2d(ReverseOnly):
    """Keeps x for the scales' gradients, and the parameters."""

    @staticmethod
    def forward(ctx, x, weight, scale_row, scale_col, bias, options, layout, residual):
        _, _, need_row, need_col, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_row or need_col else None, weight, scale_row, scale_col)
        ctx.settings = options, layout, residual, x.shape, None if bias is None else bias.dtype
        with private.NoAutocast():
            kernel = merge_kernel(weight, scale_row, scale_col, layout, residual, x.dtype)
            return F.conv2d(x, kernel, None if bias is None else bias.to(x.dtype), *options)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, scale_row, scale_col = ctx.saved_tensors
        options, layout, residual, x_shape, bias_dtype = ctx.settings
        stride, padding, dilation, groups = options
        need_x, _, need_row, need_col, need_bias, *_ = ctx.needs_input_grad
        wide = accumulate_dtype(grad_y.dtype)
        grad_x = grad_row = grad_col = None
        grad_bias = grad_y.sum((0, 2, 3), dtype=wide).to(bias_dtype) if need_bias else None
        if torch.is_grad_enabled():  # create_graph=True
            if x is None:  # ∂x alone is asked for, and y is linear in x: any x gives it
                x = weight.new_zeros(x_shape, dtype=grad_y.dtype).requires_grad_()  # of no batch of gradients
            grads = differentiable_gradients(
                lambda x, row, col: _formula(x, weight, row, col, None, options, layout, residual),
                (x, scale_row, scale_col), (need_x, need_row, need_col), grad_y,
            )  # fmt: skip
            return grads[0], None, grads[1], grads[2], grad_bias, None, None, None
        with private.NoAutocast():
            if need_x or need_row or need_col:
                # Where a tensor's values are not read, one element in its shape stands for it.
                kernel = (
                    merge_kernel(weight, scale_row, scale_col, layout, residual, grad_y.dtype)
                    if need_x
                    else grad_y.new_zeros(()).expand(weight.shape)
                )
                grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
                    grad_y, grad_y.new_zeros(()).expand(x_shape) if x is None else x, kernel, None,
                    stride, padding, dilation, False, (0, 0), groups, (need_x, need_row or need_col, False),
                )  # fmt: skip
            if need_row or need_col:
                product = _matrix(grad_kernel, layout).to(wide) * _matrix(weight, layout)
                if need_row:
                    grad_row = linear_torch.row_sums(product, scale_col[0].to(wide)).to(scale_row.dtype)
                if need_col:
                    grad_col = linear_torch.col_sums(product, scale_row.to(wide))[None].to(scale_col.dtype)
        return grad_x, None, grad_row, grad_col, grad_bias, None, None, None
