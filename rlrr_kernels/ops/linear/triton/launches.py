"""Launches of the ``rlrr_linear`` kernels: how a product is cut into programs, as pure functions of their arguments.

The schedule of the tiles (:data:`rlrr_kernels.ops.choice.tiles.SCHEDULES`) picks the kernel. Tensors may be on any
device, meta included: a launch can be built, and compiled, where there is no GPU to run it. Scales must be contiguous;
what other schedules need of the operands, :func:`rlrr_kernels.ops.choice.tiles.schedules_for` says.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles, no_such_schedule
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host.launch import TL_ACCUMULATE, Launch, Plan
from rlrr_kernels.ops.linear.triton import kernels, kernels_persistent

_plans = functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes


def precision_of(dtype: torch.dtype, gpu: Gpu, precision: str) -> str:
    """What the kernels' products of ``dtype`` are told of fp32 and TF32, which Triton has not for every GPU.

    ``precision`` is what :func:`rlrr_kernels.ops.dtypes.matmul_precision` says, here and in all functions of this file.
    """
    return "tf32" if dtype == torch.float32 and precision == "tf32" and gpu.tf32 else "ieee"


def launch_meta(dtype: torch.dtype, gpu: Gpu, precision: str, tiles: Tiles) -> dict[str, Any]:
    """Constants and options of a launch with ``tiles`` whose products are of ``dtype``."""
    return {
        "ACC": TL_ACCUMULATE[dtype],
        "PRECISION": precision_of(dtype, gpu, precision),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def rank_meta(
    kernel: str, rank: int, tiles: Tiles, dtype: torch.dtype, gpu: Gpu, weight_itemsize: int = 0
) -> dict[str, Any]:
    """How a kernel of the tiled schedule multiplies the scales (:func:`rlrr_kernels.ops.choice.tiles.dot_rank`).

    As matrices in three TF32 products for one of fp32, 21 bits of mantissa, where Triton has them. The size of W's
    elements is asked for by the scale gradients alone.
    """
    precision = "tf32x3" if gpu.name.startswith(("sm_8", "sm_9", "sm_1")) else "ieee"
    return {
        "RANK": rank,
        "DOT_RANK": configs.dot_rank(kernel, rank, tiles, dtype, weight_itemsize, gpu),
        "DOT_PRECISION": precision,
    }


# ---------------------------------------------------------------- forward and ∂x


class _Product(NamedTuple):
    """A fused product and, where it is split (split-K), the sum of its partial results [partial_sums]."""

    product: Plan
    sum: Plan | None = None
    partial_sums: int = 0

    def launches(self, inputs: tuple[Tensor, ...], bias: Tensor, out: Tensor) -> tuple[Launch, ...]:
        if self.sum is None:
            return (Launch(self.product, (*inputs, out)),)
        partial = out.new_empty(self.partial_sums, dtype=accumulate_dtype(out.dtype))
        return Launch(self.product, (*inputs, partial)), Launch(self.sum, (partial, bias, out))


def _split_product(
    kernel: triton.JITFunction, programs: int, iterations: int, span: int, numbers: tuple[int, ...],
    strides: tuple[int, ...], meta: dict[str, Any], shape: tuple[int, int], gpu: Gpu, tiles: Tiles,
) -> _Product:  # fmt: skip
    """A product of ``shape`` whose programs loop over ``iterations`` blocks, split where they alone fill no GPU.

    ``span``: what the kernel counts a split's work in, for one iteration (K elements in the forward, one tile of N in
    ∂x).
    """
    splits = configs.contraction_splits(iterations, programs, tiles, gpu)
    per_split = max(1, triton.cdiv(iterations, splits))
    splits = max(1, triton.cdiv(iterations, per_split))
    numbers = (*numbers, per_split * span, *strides)
    if splits == 1:
        return _Product(Plan(kernel, (programs,), numbers, meta | {"SPLIT": False}))
    has_bias, size = meta.get("HAS_BIAS", False), shape[0] * shape[1]
    sum_meta = {"SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK": 512, "num_warps": 4}
    return _Product(
        Plan(kernel, (programs, splits), numbers, meta | {"SPLIT": True} | ({"HAS_BIAS": False} if has_bias else {})),
        Plan(kernels.sum_splits_kernel, (triton.cdiv(size, 512),), (size, shape[1]), sum_meta),
        splits * size,
    )


@_plans
def _forward_plans(
    x_shape: torch.Size, x_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, has_bias: bool, residual: bool, dtype: torch.dtype, gpu: Gpu, precision: str,
    tiles: Tiles,
) -> _Product:  # fmt: skip
    (M, K), N, (groups, rank, _) = x_shape, weight_shape[0], col_shape
    output_tiles = groups * triton.cdiv(N // groups, tiles.block_n) * triton.cdiv(M, tiles.block_m)
    numbers = M, N, K, N // groups
    meta = {
        "RANK": rank, "RESIDUAL": residual, "HAS_BIAS": has_bias,
        "EVEN_K": K % tiles.block_k == 0, **launch_meta(dtype, gpu, precision, tiles),
    }  # fmt: skip
    if tiles.schedule != "tiled":
        raise no_such_schedule("forward", tiles)
    return _split_product(
        kernels.rlrr_linear_fwd_kernel, output_tiles, triton.cdiv(K, tiles.block_k), tiles.block_k, numbers,
        (*x_strides, *weight_strides), meta | rank_meta("forward", rank, tiles, dtype, gpu), (M, N), gpu, tiles,
    )  # fmt: skip


def forward_launches(
    x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, bias: Tensor | None, residual: bool, y: Tensor,
    gpu: Gpu, precision: str, tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """y [M, N] = x W'ᵀ + b; a second launch adds the partial results up where the product is split along K."""
    plans = _forward_plans(
        x.shape, x.stride(), weight.shape, weight.stride(), scale_col.shape, bias is not None, residual, x.dtype,
        gpu, precision, tiles,
    )  # fmt: skip
    bias = x if bias is None else bias
    return plans.launches((x, weight, scale_row, scale_col, bias), bias, y)


@_plans
def _grad_x_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], weight_shape: torch.Size, weight_strides: tuple[int, int],
    col_shape: torch.Size, residual: bool, dtype: torch.dtype, gpu: Gpu, precision: str, tiles: Tiles,
) -> _Product:  # fmt: skip
    (M, N), K, (groups, rank, _) = grad_shape, weight_shape[1], col_shape
    group_size = N // groups
    output_tiles = triton.cdiv(K, tiles.block_k) * triton.cdiv(M, tiles.block_m)
    numbers = M, N, K, group_size
    meta = {
        "RANK": rank, "RESIDUAL": residual,
        "EVEN_N": group_size % tiles.block_n == 0, **launch_meta(dtype, gpu, precision, tiles),
    }  # fmt: skip
    if tiles.schedule != "tiled":
        raise no_such_schedule("grad_x", tiles)
    return _split_product(
        kernels.rlrr_linear_bwd_dx_kernel, output_tiles, groups * triton.cdiv(group_size, tiles.block_n), 1, numbers,
        (*grad_strides, *weight_strides),
        meta | rank_meta("grad_x", rank, tiles, dtype, gpu) | {"ONE_GROUP": groups == 1}, (M, K), gpu, tiles,
    )  # fmt: skip


def grad_x_launches(
    grad_y: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, grad_x: Tensor,
    gpu: Gpu, precision: str, tiles: Tiles,
) -> tuple[Launch, ...]:  # fmt: skip
    """∂x [M, K] = g W'; a second launch adds the partial results up where the product is split along N."""
    plans = _grad_x_plans(
        grad_y.shape, grad_y.stride(), weight.shape, weight.stride(), scale_col.shape, residual, grad_y.dtype,
        gpu, precision, tiles,
    )  # fmt: skip
    return plans.launches((grad_y, weight, scale_row, scale_col), grad_y, grad_x)


# ---------------------------------------------------------------- scale gradients

REDUCE_META = {"BLOCK_P": 32, "BLOCK": 128, "num_warps": 8}
"""Constants of the kernels that add partial sums up."""


class PartialSums(NamedTuple):
    """Where the partial sums of ∂s_r, ∂s_c and ∂b lie, one kind after another, and the launch that adds them up."""

    reduction: Plan
    col_offset: int
    bias_offset: int
    size: int

    @classmethod
    def of(
        cls, counts: tuple[int, int, int], needs: tuple[bool, bool, bool], N: int, col_shape: tuple[int, int, int]
    ) -> PartialSums:
        """``counts`` partial sums of each kind; those of gradients that ``needs`` says are not needed take no room."""
        groups, rank, K = col_shape
        sizes = N * rank, groups * rank * K, N
        row, col, bias = (
            (count, size) if need else (0, 0) for count, size, need in zip(counts, sizes, needs, strict=True)
        )
        col_offset = row[0] * row[1]
        bias_offset = col_offset + col[0] * col[1]
        blocks = sum(triton.cdiv(size, REDUCE_META["BLOCK"]) for _, size in (row, col, bias))
        plan = Plan(kernels.rlrr_linear_bwd_reduce_kernel, (blocks,), (*row, *col, *bias), REDUCE_META)
        return cls(plan, col_offset, bias_offset, bias_offset + bias[0] * bias[1])

    def launches(
        self, partial: Plan, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
    ) -> tuple[Launch, Launch]:
        """The launch that makes the partial sums, and the one that adds them up into ``grads``."""
        sums = inputs[0].new_empty(self.size, dtype=accumulate_dtype(inputs[0].dtype))
        outputs = [sums if grad is None else grad for grad in grads]
        return Launch(partial, (*inputs, sums)), Launch(self.reduction, (sums, *outputs))


def most_parts(output_tiles: int, iterations: int, span: int) -> int:
    """The largest number of programs that share a tile of G, when each does ``span`` of all the iterations."""
    return (
        max((tile * iterations + iterations - 1) // span - tile * iterations // span for tile in range(output_tiles))
        + 1
    )


@_plans
def _grad_scales_plans(
    grad_shape: torch.Size, grad_strides: tuple[int, int], x_strides: tuple[int, int], weight_shape: torch.Size,
    weight_strides: tuple[int, int], weight_itemsize: int, col_shape: torch.Size, needs: tuple[bool, bool, bool],
    dtype: torch.dtype, gpu: Gpu, precision: str, tiles: Tiles,
) -> tuple[Plan, PartialSums]:  # fmt: skip
    M, (N, K), (groups, rank, _) = grad_shape[0], weight_shape, col_shape
    need_row, need_col, need_bias = needs
    group_size = N // groups
    tiles_k, tiles_per_group = triton.cdiv(K, tiles.block_k), triton.cdiv(group_size, tiles.block_n)
    meta = {
        "RANK": rank, "NEED_ROW": need_row, "NEED_COL": need_col, "NEED_BIAS": need_bias,
        **launch_meta(dtype, gpu, precision, tiles),
    }  # fmt: skip
    if tiles.schedule == "persistent":
        output_tiles, iterations = groups * tiles_per_group * tiles_k, triton.cdiv(M, tiles.block_m)
        span = configs.steps_a_program(output_tiles * iterations, tiles, gpu)
        parts = most_parts(output_tiles, iterations, span)
        strip = min(tiles.block_k, configs.STRIP_BYTES // weight_itemsize)
        sums = PartialSums.of(
            (parts * triton.cdiv(K, strip), parts * tiles_per_group, parts * tiles_k), needs, N, col_shape
        )
        partial = Plan(
            kernels_persistent.rlrr_linear_bwd_scales_persistent_kernel,
            (triton.cdiv(output_tiles * iterations, span),),
            (sums.col_offset, sums.bias_offset, M, N, K, group_size, span, parts, *weight_strides),
            meta | {"EVEN_N": group_size % tiles.block_n == 0, "STRIP": strip},
            ((tiles.block_m, tiles.block_n), (tiles.block_m, tiles.block_k)),
        )
        return partial, sums
    if tiles.schedule != "tiled":
        raise no_such_schedule("grad_scales", tiles)
    splits = configs.splits_for(M, tiles, (tiles_k + need_bias) * tiles_per_group * groups, gpu)
    rows_per_split = max(1, triton.cdiv(triton.cdiv(M, splits), tiles.block_m)) * tiles.block_m
    splits = max(1, triton.cdiv(M, rows_per_split))
    sums = PartialSums.of((splits * tiles_k, splits * tiles_per_group, splits), needs, N, col_shape)
    partial = Plan(
        kernels.rlrr_linear_bwd_scales_kernel,
        (tiles_k + need_bias, groups * tiles_per_group, splits),
        (
            sums.col_offset, sums.bias_offset, M, N, K, group_size, rows_per_split,
            *grad_strides, *x_strides, *weight_strides,
        ),
        meta | rank_meta("grad_scales", rank, tiles, dtype, gpu, weight_itemsize) | {"EVEN_M": M % tiles.block_m == 0},
    )  # fmt: skip
    return partial, sums


def grad_scales_launches(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale_row: Tensor, scale_col: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], gpu: Gpu, precision: str, tiles: Tiles,
) -> tuple[Launch, Launch]:  # fmt: skip
    """Partial sums over tiles and splits of M, then their reduction into ``grads`` = (∂s_r, ∂s_c, ∂b).

    A gradient that is not needed is None.
    """
    needs = tuple(grad is not None for grad in grads)
    partial, sums = _grad_scales_plans(
        grad_y.shape, grad_y.stride(), x.stride(), weight.shape, weight.stride(), weight.itemsize, scale_col.shape,
        needs, grad_y.dtype, gpu, precision, tiles,
    )  # fmt: skip
    return sums.launches(partial, (grad_y, x, weight, scale_row, scale_col), grads)


# ---------------------------------------------------------------- merge


@_plans
def _merge_plan(
    weight_shape: torch.Size, weight_strides: tuple[int, int], col_shape: torch.Size, residual: bool, dtype: torch.dtype
) -> Plan:
    (N, K), (groups, rank, _) = weight_shape, col_shape
    block_n, block_k = 16, 128
    meta = {
        "RANK": rank, "RESIDUAL": residual, "ACC": TL_ACCUMULATE[dtype],
        "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4,
    }  # fmt: skip
    grid = (triton.cdiv(K, block_k) * groups * triton.cdiv(N // groups, block_n),)
    return Plan(kernels.merge_kernel, grid, (K, N // groups, *weight_strides), meta)


def merge_launch(weight: Tensor, scale_row: Tensor, scale_col: Tensor, residual: bool, out: Tensor) -> Launch:
    """out [N, K] = W ⊙ (1 + s_r s_c), rounded once."""
    plan = _merge_plan(weight.shape, weight.stride(), scale_col.shape, residual, weight.dtype)
    return Launch(plan, (weight, scale_row, scale_col, out))
