"""Derivatives beside the first one by reverse mode: what every ``autograd.Function`` here supports and refuses.

Supported are gradients by a formula that autograd knows. Under ``create_graph=True`` they can be differentiated again:
the kernels' backwards are no functions that autograd knows, so a second derivative of them would be lost in silence.
And a gradient may stand for a batch of them (``is_grads_batched=True``), whose memory no kernel can read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from rlrr_kernels.ops.host import private


class ReverseOnly(torch.autograd.Function):
    """An ``autograd.Function`` that refuses forward-mode derivatives, and says what has them."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "operators of rlrr_kernels have no forward-mode derivative (jvp, jacfwd, hessian, forward_ad); use reverse "
            "mode, or the functions of rlrr_kernels.reference, which are differentiable in every mode"
        )


def differentiable_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad_y: Tensor
) -> list[Tensor | None]:
    """Those gradients of ``formula(*inputs)`` that ``needs`` asks for, as functions of ``inputs`` and ``grad_y``.

    Args:
        formula: the function in operations that autograd knows.
        inputs: its arguments, as they were saved for the backward.
        needs: whether each one's gradient is asked for.
        grad_y: gradient of the result.
    """
    if not any(needs):
        return [None] * len(inputs)
    create_graph = torch.is_grad_enabled()
    with private.NoAutocast(), torch.enable_grad():
        # Of the tensors themselves autograd would go on into the graphs that made them, and run their hooks twice.
        inputs = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad_y, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
