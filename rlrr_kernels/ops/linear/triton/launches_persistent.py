"""Launches of the persistent kernels: how work is shared out to one wave of programs.

What :func:`rlrr_kernels.ops.linear.tiles.schedules_for` says of the operands must hold.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host.launch import Launch, Plan, cdiv
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.triton.kernels_persistent import (
    rlrr_linear_bwd_dx_persistent_kernel,
    rlrr_linear_bwd_scales_persistent_kernel,
    rlrr_linear_fwd_persistent_kernel,
)
from rlrr_kernels.ops.linear.triton.launches import launch_meta, plan_reduction, precision_of

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


@_plans
def _forward_plan(
    x_shape: torch.Size, rows: int, col_shape: torch.Size, has_bias: bool, residual: bool, dtype: torch.dtype,
    precision: str, arch: str, tiles: linear_configs.Tiles,
) -> Plan:  # fmt: skip
    (count, cols), (groups, rank, _) = x_shape, col_shape
    of_y = groups * cdiv(rows // groups, tiles.block_n) * cdiv(count, tiles.block_m)
    meta = {
        "RANK": rank, "RESIDUAL": residual, "HAS_BIAS": has_bias, "EVEN_K": cols % tiles.block_k == 0,
        **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return Plan(
        rlrr_linear_fwd_persistent_kernel, (min(of_y, linear_configs.wave(tiles, arch)),),
        (count, rows, cols, rows // groups), meta, ((tiles.block_m, tiles.block_k), (tiles.block_n, tiles.block_k)),
    )  # fmt: skip


def forward_launches(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    y: Tensor,
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, ...]:
    """What :func:`rlrr_kernels.ops.linear.triton.launches.forward_launches` gives, by a persistent grid."""
    plan = _forward_plan(
        x.shape, weight.shape[0], scale_col.shape, bias is not None, residual, x.dtype,
        precision_of(x.dtype, arch), arch, tiles,
    )  # fmt: skip
    return (Launch(plan, (x, weight, scale_row, scale_col, x if bias is None else bias, y)),)


@_plans
def _grad_x_plan(
    grad_shape: torch.Size, cols: int, col_shape: torch.Size, residual: bool, dtype: torch.dtype, precision: str,
    arch: str, tiles: linear_configs.Tiles,
) -> Plan:  # fmt: skip
    (count, rows), (groups, rank, _) = grad_shape, col_shape
    of_x, size = cdiv(cols, tiles.block_k) * cdiv(count, tiles.block_m), rows // groups
    meta = {
        "RANK": rank, "RESIDUAL": residual, "EVEN_N": size % tiles.block_n == 0, **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return Plan(
        rlrr_linear_bwd_dx_persistent_kernel, (min(of_x, linear_configs.wave(tiles, arch)),),
        (count, rows, cols, size), meta, ((tiles.block_m, tiles.block_n), (tiles.block_n, tiles.block_k)),
    )  # fmt: skip


def grad_x_launches(
    grad_y: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    grad_x: Tensor,
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, ...]:
    """What :func:`rlrr_kernels.ops.linear.triton.launches.grad_x_launches` gives, by a persistent grid."""
    plan = _grad_x_plan(
        grad_y.shape, weight.shape[1], scale_col.shape, residual, grad_y.dtype, precision_of(grad_y.dtype, arch), arch,
        tiles,
    )  # fmt: skip
    return (Launch(plan, (grad_y, weight, scale_row, scale_col, grad_x)),)


def most_pieces(tiles: int, blocks: int, span: int) -> int:
    """The largest number of programs that share a tile, when each does ``span`` of the steps, ``blocks`` a tile."""
    return max((tile * blocks + blocks - 1) // span - tile * blocks // span for tile in range(tiles)) + 1


@_plans
def _grad_scales_plans(
    grad_shape: torch.Size, x_shape: torch.Size, weight_strides: tuple[int, int], weight_size: int,
    col_shape: torch.Size, needs: tuple[bool, bool, bool], dtype: torch.dtype, precision: str, arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """How the scale gradients are cut into partial sums, how these are added up, and how many there are."""
    (count, rows), cols, (groups, rank, _) = grad_shape, x_shape[1], col_shape
    need_row, need_col, need_bias = needs
    size = rows // groups
    tiles_k, tiles_per_group = cdiv(cols, tiles.block_k), cdiv(size, tiles.block_n)
    of_g, blocks = groups * tiles_per_group * tiles_k, cdiv(count, tiles.block_m)
    span = linear_configs.steps_a_program(of_g * blocks, tiles, arch)
    pieces = most_pieces(of_g, blocks, span)
    strip = min(tiles.block_k, linear_configs.STRIP_BYTES // weight_size)
    reduction, col_offset, bias_offset, values = plan_reduction(
        row=(pieces * cdiv(cols, strip), rows * rank) if need_row else (0, 0),
        col=(pieces * tiles_per_group, groups * rank * cols) if need_col else (0, 0),
        bias=(pieces * tiles_k, rows) if need_bias else (0, 0),
    )
    partial = Plan(
        rlrr_linear_bwd_scales_persistent_kernel,
        (cdiv(of_g * blocks, span),),
        (col_offset, bias_offset, count, rows, cols, size, span, pieces, *weight_strides),
        {
            "RANK": rank, "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": need_bias,
            "EVEN_N": size % tiles.block_n == 0, "STRIP": strip, **launch_meta(dtype, precision, tiles),
        },
        ((tiles.block_m, tiles.block_n), (tiles.block_m, tiles.block_k)),
    )  # fmt: skip
    return partial, reduction, values


def grad_scales_launches(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    arch: str,
    tiles: linear_configs.Tiles,
) -> tuple[Launch, Launch]:
    """What :func:`rlrr_kernels.ops.linear.triton.launches.grad_scales_launches` gives, by a persistent grid."""
    needs, dtype = tuple(grad is not None for grad in grads), grad_y.dtype
    partial, reduction, values = _grad_scales_plans(
        grad_y.shape, x.shape, weight.stride(), weight.itemsize, scale_col.shape, needs, dtype,
        precision_of(dtype, arch), arch, tiles,
    )  # fmt: skip
    parts = grad_y.new_empty(values, dtype=accumulate_dtype(dtype))
    outputs = [parts if grad is None else grad for grad in grads]
    return (
        Launch(partial, (grad_y, x, weight, scale_row, scale_col, parts)),
        Launch(reduction, (parts, *outputs)),
    )
