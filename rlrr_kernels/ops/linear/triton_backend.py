"""``rlrr_linear`` in Triton: which launches a forward and a backward need, and the tensors they write."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host.launch import check_interpreter
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.triton import sampled as linear_rows_triton
from rlrr_kernels.ops.linear.triton.launches import (
    forward_launches,
    grad_scales_launches,
    grad_x_launches,
    merge_launch,
)
from rlrr_kernels.ops.sampling.row_sample import RowSample
from rlrr_kernels.ops.tuning import store as tuned_tiles


def _capability(device: torch.device) -> tuple[tuple[int, int] | None, str | None]:
    """Compute capability of an NVIDIA GPU and architecture of an AMD one; None for what it is not."""
    if device.type == "cpu":
        return None, None
    properties = torch.cuda.get_device_properties(device)
    return (None, properties.gcnArchName) if torch.version.hip else ((properties.major, properties.minor), None)


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture in ``linear_configs`` that serves a device; "interpreter" for the CPU."""
    return linear_configs.architecture(*_capability(device))


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name in ``linear_configs.SHARED_BYTES``."""
    return linear_configs.device_name(*_capability(device))


def merge(
    weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """W' [N, K] as a new tensor, rounded once to ``dtype`` (default: W's), in one elementwise pass."""
    merged = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    if merged.numel():
        merge_launch(weight, scale_row.contiguous(), scale_col.contiguous(), residual, merged).run()
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

    ``path`` forces ``one_pass`` or ``merge``.
    """
    check_interpreter(x.dtype, weight.dtype)
    count, arch = x.shape[0], architecture(x.device)
    if (path or tuned_tiles.path_for(arch, x, weight, scale_row.shape[1])) == "merge":
        merged = merge(weight, scale_row, scale_col, residual, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(count, weight.shape[0])
    if y.numel():
        tiles = tuned_tiles.tiles_for("forward", arch, x, weight, weight, scale_col.shape[1], groups=len(scale_col))
        bias = None if bias is None else bias.contiguous()
        scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
        for launch in forward_launches(x, weight, scale_row, scale_col, bias, residual, y, arch, tiles):
            launch.run()
    return y


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
    check_interpreter(grad_y.dtype, weight.dtype)
    need_x, need_row, need_col, need_bias = needs
    scale_row, scale_col = scale_row.contiguous(), scale_col.contiguous()
    dtype, arch = accumulate_dtype(grad_y.dtype), architecture(grad_y.device)
    grad_x = _grad_x(grad_y, weight, scale_row, scale_col, residual, path, arch) if need_x else None
    if not (need_row or need_col):
        return grad_x, None, None, grad_y.sum(0, dtype=dtype) if need_bias else None
    grads = (
        torch.empty_like(scale_row) if need_row else None,
        torch.empty_like(scale_col) if need_col else None,
        grad_y.new_empty(weight.shape[0], dtype=dtype) if need_bias else None,
    )
    # A loop over the rank takes the registers that a wide tile of G leaves.
    tiled = sample is not None or scale_row.shape[1] > linear_configs.UNROLLED_RANK
    tiles = tuned_tiles.tiles_for("grad_scales", arch, x, grad_y, weight, 1, tiled)
    if sample is None:
        launches = grad_scales_launches(grad_y, x, weight, scale_row, scale_col, grads, arch, tiles)
    else:
        launches = linear_rows_triton.grad_scales_launches(
            grad_y, x, sample, weight, scale_row, scale_col, grads, arch, tiles
        )
    for launch in launches:
        launch.run()
    return grad_x, *grads


def _grad_x(grad_y, weight, scale_row, scale_col, residual, path, arch) -> Tensor:
    count = grad_y.shape[0]
    if (path or tuned_tiles.path_for(arch, grad_y, weight, scale_row.shape[1])) == "merge":
        return grad_y @ merge(weight, scale_row, scale_col, residual, grad_y.dtype)
    if weight.shape[0] == 0:
        return grad_y.new_zeros(count, weight.shape[1])
    grad_x = grad_y.new_empty(count, weight.shape[1])
    if grad_x.numel():
        tiles = tuned_tiles.tiles_for("grad_x", arch, grad_y, weight, weight, scale_col.shape[1], groups=len(scale_col))
        for launch in grad_x_launches(grad_y, weight, scale_row, scale_col, residual, grad_x, arch, tiles):
            launch.run()
    return grad_x
