"""What a FLOP counter counts for the operators: their matrix products, 2 M N K each, as for ``aten::mm``.

The products that the scales' gradients need count, what is elementwise does not. A forward is 2 M N K, like that of a
frozen ``nn.Linear``; a backward as much for ∂x, and as much for G = gᵀx of the scales, or of the sampled rows alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rlrr_kernels.ops.host import private


def linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of ``torch.ops.rlrr_kernels.linear``, from the shapes of its tensors."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)


def linear_backward_flops(
    grad_shape: Sequence[int], x_shape: Sequence[int] | None, weight_shape: Sequence[int], row_shape: Sequence[int],
    col_shape: Sequence[int], residual: bool, backend: str, needs: Sequence[bool], input_activation: str | None = None,
    rows_shape: Sequence[int] | None = None, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Of ``torch.ops.rlrr_kernels.linear_backward``, from the shapes of its tensors."""
    need_x, need_row, need_col, _ = needs
    rows = math.prod(grad_shape[:-1])
    products = rows if need_x else 0
    if need_row or need_col:
        products += rows if rows_shape is None else rows_shape[0]
    return 2 * products * math.prod(weight_shape)


def linear_multi_backward_flops(
    grad_shape: Sequence[int], x_shape: Sequence[int] | None, weight_shape: Sequence[int], row_shape: Sequence[int],
    col_shape: Sequence[int], index_shape: Sequence[int], residual: bool, backend: str, needs: Sequence[bool],
    **kwargs: Any,
) -> int:  # fmt: skip
    """Of ``torch.ops.rlrr_kernels.linear_multi_backward``: as many as of one adapter on all samples."""
    shapes = grad_shape, x_shape, weight_shape, row_shape, col_shape
    return linear_backward_flops(*shapes, residual, backend, needs[:4])


def tell_counters() -> None:
    """Has ``torch.utils.flop_counter`` count the operators, the counters at work included.

    Called when a mode sees an operator: to import the counter, and Triton with it, at ``import rlrr_kernels`` would
    cost more than the whole package, and a counter copies the formulas when it is made.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    formulas = {
        torch.ops.rlrr_kernels.linear: linear_flops,
        torch.ops.rlrr_kernels.linear_backward: linear_backward_flops,
        torch.ops.rlrr_kernels.linear_multi: linear_flops,
        torch.ops.rlrr_kernels.linear_multi_backward: linear_multi_backward_flops,
    }
    for target, formula in formulas.items():
        if target not in module.flop_registry:
            module.register_flop_formula(target)(formula)
    for mode in private.active_modes():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        for target in formulas if isinstance(registry, dict) else ():
            registry.setdefault(target, module.flop_registry[target])
