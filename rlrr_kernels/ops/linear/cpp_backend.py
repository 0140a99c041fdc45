"""``rlrr_linear`` in C++ for the CPU: the extension, its operators' fake kernels, and the two functions.

The sources are in ``csrc/``; importing this module raises ``ImportError`` where the extension is not built. Three ways
compute a call, chosen by the crossovers in ``csrc/dispatch.h``; ``path`` forces one.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from rlrr_kernels.backends import CPP_FAILURE, CPU_LEVELS
from rlrr_kernels.ops.dtypes import accumulate_dtype, matmul_precision
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.sampling.row_sample import RowSample

PATHS = {"auto": 0, "fused": 1, "panels": 2, "library": 3}
"""``fused`` reads W once per few rows, ``panels`` are products on tiles of W' in cache, ``library`` is W' in scratch
and torch's GEMM. float16 and float64 always take ``library``."""

if CPP_FAILURE is not None:
    raise ImportError(CPP_FAILURE)

_ops = torch.ops.rlrr_kernels_cpp
PATH_NAMES = {number: name for name, number in PATHS.items()}
_linear = _ops.linear.default
_linear_backward = _ops.linear_backward.default
_below_autograd = private.BelowAutograd


def set_cpu_level(name: str) -> None:
    """Uses the kernels of instruction set ``name`` from now on (all threads).

    Raises:
        ValueError: ``name`` is not one of :data:`CPU_LEVELS`, or this processor lacks it.
    """
    if name not in CPU_LEVELS:
        raise ValueError(f"CPU level must be one of {', '.join(CPU_LEVELS)}; got {name!r}")
    best = CPU_LEVELS[_best_level]
    if CPU_LEVELS.index(name) > _best_level:
        raise ValueError(f"CPU level must be at most {best}, the best of this processor; got {name!r}")
    _ops.cpu_level(CPU_LEVELS.index(name))


_best_level = _ops.cpu_level()
if "RLRR_CPU_LEVEL" in os.environ:
    set_cpu_level(os.environ["RLRR_CPU_LEVEL"])


def path_of(rows: Tensor, weight: Tensor, rank: int, backward: bool) -> str:
    """The way of a call with ``rows``, x or g [M, ...], of :data:`PATHS`."""
    if rows.dtype == torch.float32 and matmul_precision("cpu") != "ieee":
        return "library"
    return PATH_NAMES[_ops.path(rows, weight, rank, backward)]


def _way(path: str, dtype: torch.dtype) -> int:
    # Only the library's GEMM knows how to trade fp32 digits for speed when the user has asked for that.
    if path == "auto" and dtype == torch.float32 and matmul_precision("cpu") != "ieee":
        return PATHS["library"]
    return PATHS[path]


def forward(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    bias: Tensor | None,
    residual: bool,
    *,
    path: str = "auto",
) -> Tensor:
    """y [M, N] = x W'ᵀ + b. x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N]."""
    with _below_autograd():
        return _linear(x, weight, scale_row, scale_col, bias, residual, _way(path, x.dtype))


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale_row: Tensor,
    scale_col: Tensor,
    residual: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    path: str = "auto",
    sample: RowSample | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [M, K], scale_row [N, r], scale_col [G, r, K] and bias [N]; None where ``needs`` says so.

    Scale gradients come in the dtype of their scale, ∂b in fp32 (fp64 for float64). ``x`` may be None when no scale
    gradient is needed. With a ``sample`` G is its estimate and x [S, K] holds its rows.
    """
    if sample is not None:
        return _backward_of_rows(grad_y, x, weight, scale_row, scale_col, residual, needs, sample, path)
    with _below_autograd():
        grads = _linear_backward(grad_y, x, weight, scale_row, scale_col, residual, *needs, _way(path, grad_y.dtype))
    if all(needs):
        return grads
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _backward_of_rows(grad_y, x, weight, scale_row, scale_col, residual, needs, sample, path):
    """One call for ∂x and ∂b of all rows, and one for the scale gradients of each part of the sample."""
    need_x, need_row, need_col, need_bias = needs
    grad_x = grad_bias = None
    if need_x or need_bias:
        grad_x, _, _, grad_bias = backward(
            grad_y, None, weight, scale_row, scale_col, residual, (need_x, False, False, need_bias), path=path
        )
    wide = accumulate_dtype(weight.dtype)  # of the sums over parts, which the scales' own dtype may round
    scales = scale_row.to(wide), scale_col.to(wide)
    needs = (False, need_row, need_col, False)
    total = []
    for grad_part, x_part, factor in sample.parts(grad_y, x):
        grads = backward(grad_part, x_part, weight, *scales, residual, needs, path=path)[1:3]
        total.append([grad if grad is None or factor == 1 else grad.mul_(factor) for grad in grads])
    grad_row, grad_col = (
        None if terms[0] is None else functools.reduce(torch.add, terms).to(scale.dtype)
        for terms, scale in zip(zip(*total, strict=True), (scale_row, scale_col), strict=True)
    )
    return grad_x, grad_row, grad_col, grad_bias


# ---------------------------------------------------------------- torch.ops.rlrr_kernels_cpp: fake


@torch.library.register_fake("rlrr_kernels_cpp::linear")
def _linear_fake(x, weight, scale_row, scale_col, bias=None, residual=True, path=0):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("rlrr_kernels_cpp::linear_backward")
def _linear_backward_fake(
    grad_y, x, weight, scale_row, scale_col, residual, need_x, need_row, need_col, need_bias, path=0
):
    wide = accumulate_dtype(weight.dtype)
    empty = grad_y.new_empty
    return (
        empty(grad_y.shape[0], weight.shape[1]) if need_x else empty(0),
        empty(scale_row.shape if need_row else 0, dtype=scale_row.dtype),
        empty(scale_col.shape if need_col else 0, dtype=scale_col.dtype),
        empty(weight.shape[0] if need_bias else 0, dtype=wide),
    )
