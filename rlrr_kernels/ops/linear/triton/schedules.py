"""The launches of a product by the schedule of its tiles (:data:`rlrr_kernels.ops.linear.tiles.SCHEDULES`)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear.tiles import Tiles, check_schedule
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.linear.triton import launches_persistent as linear_persistent


def _module(kernel: str, tiles: Tiles) -> ModuleType:
    check_schedule(kernel, tiles)
    if tiles.schedule == "gluon":
        from rlrr_kernels.ops.linear.triton import (
            launches_gluon as linear_gluon,  # older versions of Triton do not have its language
        )

        return linear_gluon
    return linear_persistent if tiles.schedule == "persistent" else linear_launches


def forward_launches(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool, y: Tensor,
    arch: str, tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """y [M, N] = x W'ᵀ + b: see :func:`rlrr_kernels.ops.linear.triton.launches.forward_launches`."""
    launches = _module("forward", tiles)
    return launches.forward_launches(x, weight, scale_row, scale_col, bias, residual, y, arch, tiles)


def grad_x_launches(
    grad_y: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, grad_x: Tensor, arch: str,
    tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """∂x [M, K] = g W': see :func:`rlrr_kernels.ops.linear.triton.launches.grad_x_launches`."""
    launches = _module("grad_x", tiles)
    return launches.grad_x_launches(grad_y, weight, scale_row, scale_col, residual, grad_x, arch, tiles)


def grad_scales_launches(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], arch: str, tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """∂s_r, ∂s_c and ∂b: see :func:`rlrr_kernels.ops.linear.triton.launches.grad_scales_launches`."""
    launches = _module("grad_scales", tiles)
    return launches.grad_scales_launches(grad_y, x, weight, scale_row, scale_col, grads, arch, tiles)
