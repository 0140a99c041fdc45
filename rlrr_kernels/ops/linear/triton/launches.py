"""Launches of the ``rlrr_linear`` kernels: how a product is cut into programs, as pure functions of their arguments.

Tensors may be on any device, meta included: a launch can be built, and compiled, where there is no GPU to run it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rlrr_kernels import devices
from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.dtypes import accumulate_dtype, matmul_precision
from rlrr_kernels.ops.host.launch import TL_ACCUMULATE, Launch, Plan, cdiv
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.triton.kernels import (
    merge_kernel,
    rlrr_linear_bwd_dx_kernel,
    rlrr_linear_bwd_reduce_kernel,
    rlrr_linear_bwd_scales_kernel,
    rlrr_linear_fwd_kernel,
    sum_splits_kernel,
)

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


def precision_of(dtype: torch.dtype, gpu: Gpu | str) -> str:
    """What the kernels' products of ``dtype`` are told of fp32 and TF32, which Triton has not for every GPU."""
    return "tf32" if dtype == torch.float32 and matmul_precision() == "tf32" and devices.gpu(gpu).tf32 else "ieee"


def launch_meta(dtype: torch.dtype, precision: str, tiles: linear_configs.Tiles) -> dict[str, Any]:
    """Constants and options of a launch with ``tiles`` whose products are of ``dtype``."""
    return {
        "ACC": TL_ACCUMULATE[accumulate_dtype(dtype)],
        "PRECISION": precision,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


class _Product(NamedTuple):
    """A product in one pass over W, and where its contraction is split, the sum of the parts [parts]."""

    product: Plan
    sum: Plan | None
    parts: int


def _product(
    kernel: triton.JITFunction, programs: int, steps: int, steps_to_span: int, numbers: tuple[int, ...],
    strides: tuple[int, ...], meta: dict[str, Any], shape: tuple[int, int], arch: str, tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    """``steps`` blocks are contracted for an output of ``shape``; a span is counted in 1 / steps_to_span of them."""
    splits = linear_configs.contraction_splits(steps, programs, tiles, arch)
    steps_per_split = max(1, cdiv(steps, splits))
    splits = max(1, cdiv(steps, steps_per_split))
    numbers = (*numbers, steps_per_split * steps_to_span, *strides)
    if splits == 1:
        return _Product(Plan(kernel, (programs,), numbers, meta | {"SPLIT": False}), None, 0)
    has_bias, size = meta.get("HAS_BIAS", False), shape[0] * shape[1]
    sum_meta = {"SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK": 512, "num_warps": 4}
    return _Product(
        Plan(kernel, (programs, splits), numbers, meta | {"SPLIT": True} | ({"HAS_BIAS": False} if has_bias else {})),
        Plan(sum_splits_kernel, (cdiv(size, 512),), (size, shape[1]), sum_meta),
        splits * size,
    )


def _product_launches(plans: _Product, inputs: tuple[Tensor, ...], bias: Tensor, out: Tensor) -> tuple[Launch, ...]:
    if plans.sum is None:
        return (Launch(plans.product, (*inputs, out)),)
    parts = out.new_empty(plans.parts, dtype=accumulate_dtype(out.dtype))
    return Launch(plans.product, (*inputs, parts)), Launch(plans.sum, (parts, bias, out))


@_plans
def _forward_plans(
    x_shape: torch.Size, x_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, has_bias: bool, residual: bool, dtype: torch.dtype, precision: str, arch: str,
    tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    (count, cols), rows, (groups, rank, _) = x_shape, weight_shape[0], col_shape
    size = rows // groups
    programs = groups * cdiv(size, tiles.block_n) * cdiv(count, tiles.block_m)
    meta = {
        "RANK": rank, "RESIDUAL": residual, "HAS_BIAS": has_bias,
        "EVEN_K": cols % tiles.block_k == 0, **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return _product(
        rlrr_linear_fwd_kernel, programs, cdiv(cols, tiles.block_k), tiles.block_k, (count, rows, cols, size),
        (*x_strides, *weight_strides), meta, (count, rows), arch, tiles,
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
    """y [M, N] = x W'ᵀ + b in one pass over W, in parts that are then summed where it has few tiles.

    The scales must be contiguous.
    """
    has_bias, dtype = bias is not None, x.dtype
    plans = _forward_plans(
        x.shape, x.stride(), weight.shape, weight.stride(), scale_col.shape, has_bias, residual, dtype,
        precision_of(dtype, arch), arch, tiles,
    )  # fmt: skip
    bias = bias if has_bias else x
    return _product_launches(plans, (x, weight, scale_row, scale_col, bias), bias, y)


@_plans
def _grad_x_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, residual: bool, dtype: torch.dtype, precision: str, arch: str, tiles: linear_configs.Tiles,
) -> _Product:  # fmt: skip
    (count, rows), cols, (groups, rank, _) = grad_shape, weight_shape[1], col_shape
    size = rows // groups
    meta = {
        "RANK": rank, "RESIDUAL": residual, "ONE_GROUP": groups == 1,
        "EVEN_N": size % tiles.block_n == 0, **launch_meta(dtype, precision, tiles),
    }  # fmt: skip
    return _product(
        rlrr_linear_bwd_dx_kernel, cdiv(cols, tiles.block_k) * cdiv(count, tiles.block_m),
        groups * cdiv(size, tiles.block_n), 1, (count, rows, cols, size), (*grad_strides, *weight_strides), meta,
        (count, cols), arch, tiles,
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
    """∂x [M, K] = g W' in one pass over W, in parts that are then summed where it has few tiles.

    The scales must be contiguous.
    """
    dtype = grad_y.dtype
    plans = _grad_x_plans(
        grad_y.shape, grad_y.stride(), weight.shape, weight.stride(), scale_col.shape, residual, dtype,
        precision_of(dtype, arch), arch, tiles,
    )  # fmt: skip
    return _product_launches(plans, (grad_y, weight, scale_row, scale_col), grad_y, grad_x)


_REDUCE_META = {"BLOCK_P": 32, "BLOCK": 128, "num_warps": 8}


def plan_reduction(row: tuple[int, int], col: tuple[int, int], bias: tuple[int, int]) -> tuple[Plan, int, int, int]:
    """The sum over parts of ∂s_r, ∂s_c and ∂b, [count, size] of each kind, which lie one after another.

    Then where those of ∂s_c and of ∂b start, and how many values there are.
    """
    col_offset = row[0] * row[1]
    bias_offset = col_offset + col[0] * col[1]
    blocks = sum(cdiv(size, _REDUCE_META["BLOCK"]) for _, size in (row, col, bias))
    plan = Plan(rlrr_linear_bwd_reduce_kernel, (blocks,), (*row, *col, *bias), _REDUCE_META)
    return plan, col_offset, bias_offset, bias_offset + bias[0] * bias[1]


@_plans
def _grad_scales_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], x_strides: tuple[int, int], weight_shape: torch.Size,
    weight_strides: tuple[int, int], col_shape: torch.Size, needs: tuple[bool, bool, bool], dtype: torch.dtype,
    precision: str, arch: str, tiles: linear_configs.Tiles,
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """How the scale gradients are cut into partial sums, how these are added up, and how many there are."""
    count, (rows, cols), (groups, rank, _) = grad_shape[0], weight_shape, col_shape
    need_row, need_col, need_bias = needs
    tiles_k, tiles_per_group = cdiv(cols, tiles.block_k), cdiv(rows // groups, tiles.block_n)
    splits = linear_configs.splits_for(count, tiles, (tiles_k + need_bias) * tiles_per_group * groups, arch)
    rows_per_split = max(1, cdiv(cdiv(count, splits), tiles.block_m)) * tiles.block_m
    splits = max(1, cdiv(count, rows_per_split))
    row = (splits * tiles_k, rows * rank) if need_row else (0, 0)
    col = (splits * tiles_per_group, groups * rank * cols) if need_col else (0, 0)
    bias = (splits, rows) if need_bias else (0, 0)
    reduction, col_offset, bias_offset, size = plan_reduction(row, col, bias)
    partial = Plan(
        rlrr_linear_bwd_scales_kernel,
        (tiles_k + need_bias, groups * tiles_per_group, splits),
        (
            col_offset, bias_offset, count, rows, cols, rows // groups, rows_per_split,
            *grad_strides, *x_strides, *weight_strides,
        ),
        {
            "RANK": rank, "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": need_bias,
            "EVEN_M": count % tiles.block_m == 0, **launch_meta(dtype, precision, tiles),
        },
    )  # fmt: skip
    return partial, reduction, size


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
    """Partial sums over tiles and splits of M, then their reduction into ``grads`` = (∂s_r, ∂s_c, ∂b).

    A gradient that is not needed is None. The scales must be contiguous.
    """
    needs, dtype = tuple(grad is not None for grad in grads), grad_y.dtype
    partial, reduction, size = _grad_scales_plans(
        grad_y.shape, grad_y.stride(), x.stride(), weight.shape, weight.stride(), scale_col.shape, needs, dtype,
        precision_of(dtype, arch), arch, tiles,
    )  # fmt: skip
    parts = grad_y.new_empty(size, dtype=accumulate_dtype(dtype))
    outputs = [parts if grad is None else grad for grad in grads]
    return (
        Launch(partial, (grad_y, x, weight, scale_row, scale_col, parts)),
        Launch(reduction, (parts, *outputs)),
    )


@_plans
def _merge_plan(
    weight_shape: torch.Size, weight_strides: tuple[int, int], col_shape: torch.Size, residual: bool, dtype: torch.dtype
) -> Plan:
    (rows, cols), (groups, rank, _) = weight_shape, col_shape
    meta = {
        "RANK": rank,
        "RESIDUAL": residual,
        "ACC": TL_ACCUMULATE[accumulate_dtype(dtype)],
        "BLOCK_N": 16,
        "BLOCK_K": 128,
        "num_warps": 4,
    }
    grid = (cdiv(cols, meta["BLOCK_K"]) * groups * cdiv(rows // groups, meta["BLOCK_N"]),)
    return Plan(merge_kernel, grid, (cols, rows // groups, *weight_strides), meta)


def merge_launch(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, out: Tensor) -> Launch:
    """out [N, K] = W ⊙ (1 + s_r s_c), rounded once; the scales must be contiguous."""
    plan = _merge_plan(weight.shape, weight.stride(), scale_col.shape, residual, weight.dtype)
    return Launch(plan, (weight, scale_row, scale_col, out))
