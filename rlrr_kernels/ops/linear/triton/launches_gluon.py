"""Launches of the warp-specialised kernel for Hopper.

What :func:`rlrr_kernels.ops.linear.tiles.schedules_for` says of a problem must hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.host.launch import Launch, Plan
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.triton.kernels_gluon import SIDE, rescaled_product_kernel

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


class _GluonPlan(Plan):
    """A plan whose kernel wants descriptors that say how a tile lies in shared memory."""

    __slots__ = ()

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Tensor | TensorDescriptor | int | float, ...]:
        described = [
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), _layout(tensor, block))
            for tensor, block in zip(tensors, self.blocks, strict=False)
        ]
        return (*described, *tensors[len(described) :], *self.numbers)


@functools.cache
def _shared_layout(bits: int, swizzle: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)


def _layout(tensor: Tensor, block: tuple[int, int]) -> NVMMASharedLayout:
    """Rows of 128 bytes whose eighths trade places, as products read them; a single row lies as it is."""
    return _shared_layout(8 * tensor.itemsize, 0 if block[0] == 1 else 128)


@_plans
def _plan(
    M: int, rows: int, contracted: int, groups: int, group_size: int, transposed: bool, residual: bool,
    has_bias: bool, gpu: Gpu, tiles: linear_configs.Tiles,
) -> Plan:  # fmt: skip
    """For a result of [M, rows].

    Raises:
        ValueError: the kernel has no such tiles.
    """
    side = SIDE.value
    blocks = (2 * side, side)[:: -1 if transposed else 1]
    if (tiles.block_n, tiles.block_k) != blocks or tiles.warps != 4 or tiles.stages < 2 or tiles.block_m > 256:
        raise ValueError(
            f"tiles of the schedule gluon must have (block_n, block_k) = {blocks}, 4 warps, at least 2 stages and "
            f"block_m up to 256; got {tiles}"
        )
    row_tiles = triton.cdiv(rows, 2 * side)
    output_tiles = row_tiles * triton.cdiv(M, tiles.block_m)
    return _GluonPlan(
        rescaled_product_kernel,
        (min(output_tiles, gpu.multiprocessors),),
        (output_tiles, row_tiles, 2 * triton.cdiv(contracted, 2 * side), rows, group_size),
        {
            "TRANSPOSED": transposed, "ONE_GROUP": groups == 1, "RESIDUAL": residual, "HAS_BIAS": has_bias,
            "BLOCK_M": tiles.block_m, "STAGES": tiles.stages, "num_warps": tiles.warps,
        },
        ((tiles.block_m, side), (side, side), (1, side), (tiles.block_m, side)),
    )  # fmt: skip


def forward_launches(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    y: Tensor,
    gpu: Gpu,
    tiles: linear_configs.Tiles,
) -> tuple[Launch]:
    """y [M, N] = x W'ᵀ + b, as :func:`rlrr_kernels.ops.linear.triton.launches.forward_launches` gives it."""
    (N, K), groups = weight.shape, scale_col.shape[0]
    plan = _plan(len(x), N, K, groups, N // groups, False, residual, bias is not None, gpu, tiles)
    row, col = scale_row.float(), scale_col.float().view(groups, K)
    return (Launch(plan, (x, weight, col, y, row, x if bias is None else bias)),)


def grad_x_launches(
    grad_y: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    grad_x: Tensor,
    gpu: Gpu,
    tiles: linear_configs.Tiles,
) -> tuple[Launch]:
    """∂x [M, K] = g W', as :func:`rlrr_kernels.ops.linear.triton.launches.grad_x_launches` gives it."""
    (N, K), groups = weight.shape, scale_col.shape[0]
    plan = _plan(len(grad_y), K, N, groups, N // groups, True, residual, False, gpu, tiles)
    row, col = scale_row.float().view(1, N), scale_col.float()
    return (Launch(plan, (grad_y, weight, row, grad_x, col, grad_y)),)
