"""HiRA's linear layer in plain torch: what PEFT could compute, without a dependency, and keep nothing W-sized."""

import torch
import torch.nn.functional as F


class HiraFunction(torch.autograd.Function):
    """y = x (W ⊙ (1 + B A))ᵀ + b for x [..., K], a frozen W [N, K], B [N, r], A [r, K] and b [N] or None."""

    @staticmethod
    def rescaled(weight, B, A):
        factor = B @ A
        return factor.add_(1).mul_(weight)  # in the dtype of the adapters, freed after the product

    @staticmethod
    def forward(ctx, x, weight, B, A, bias):
        ctx.save_for_backward(x, weight, B, A)
        y = F.linear(x.to(A.dtype), HiraFunction.rescaled(weight, B, A), None if bias is None else bias.to(A.dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, B, A = ctx.saved_tensors
        g = grad_y.reshape(-1, weight.shape[0]).to(A.dtype)
        grad_x = grad_B = grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ HiraFunction.rescaled(weight, B, A)).view_as(x).to(x.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            G = (g.t() @ x.reshape(-1, weight.shape[1]).to(A.dtype)).mul_(weight)
            grad_B, grad_A = G @ A.t(), B.t() @ G
        if ctx.needs_input_grad[4]:
            grad_bias = g.sum(0).to(x.dtype)
        return grad_x, None, grad_B, grad_A, grad_bias
