"""``rlrr_mlp``: two rescaled linear layers with an activation between them that is computed again in the backward."""

from __future__ import annotations

from torch import Tensor

from rlrr_kernels.ops.activation.functions import check_name
from rlrr_kernels.ops.checks import check_linear, check_parameters, check_tensors
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.sampling.row_sample import RowSample, check_sample


def rlrr_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_scale_row: Tensor | None,
    fc1_scale_col: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_scale_row: Tensor | None,
    fc2_scale_col: Tensor | None,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    residual: bool = True,
    backend: str = "auto",
    fc1_scale_grad_rows: RowSample | None = None,
    fc2_scale_grad_rows: RowSample | None = None,
) -> Tensor:
    """y = act(h) W₂'ᵀ + b₂ with h = x W₁'ᵀ + b₁ and W' = W ⊙ (1 + s_r s_c): the MLP of a transformer under RLRR.

    Two calls of :func:`rlrr_kernels.rlrr_linear`, the second with ``input_activation``: between forward and backward x,
    the pre-activation h [..., H] and the parameters are kept, act(h) is not. The backward computes act(h) again for
    ∂s_r and ∂s_c of fc2, and ∂h = (g W₂') ⊙ act'(h). Second derivatives and forward mode: as there.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; under autocast it is cast as ``F.linear`` would cast it.
        fc1_weight, fc1_scale_row, fc1_scale_col, fc1_bias: of the first layer, K to H, as in ``rlrr_linear``.
        fc2_weight, fc2_scale_row, fc2_scale_col, fc2_bias: of the second layer, H to N.
        activation: ``gelu`` (exact) or ``gelu_tanh``, computed in fp32 (fp64 for float64).
        residual: as in ``rlrr_linear``, of both layers.
        backend: as in ``rlrr_linear``.
        fc1_scale_grad_rows, fc2_scale_grad_rows: as in ``rlrr_linear``; all of h is kept for ∂h in any case.

    Returns:
        y, [..., N] in the dtype of x after autocast.

    Raises:
        TypeError: as ``rlrr_linear``, naming the argument.
        ValueError: likewise; or ``fc2_weight`` does not take H values, or the activation is unknown.
    """
    fc1 = fc1_weight, fc1_scale_row, fc1_scale_col, fc1_bias
    fc2 = fc2_weight, fc2_scale_row, fc2_scale_col, fc2_bias
    check_name("activation", activation)
    check_linear(x, *fc1, prefix="fc1_")
    check_tensors(x, *fc2, prefix="fc2_")
    hidden = fc1_weight.shape[0]
    if fc2_weight.dim() != 2 or fc2_weight.shape[1] != hidden:
        raise ValueError(
            f"fc2_weight must be [N, H] with H = {hidden}, the rows of fc1_weight; got shape {tuple(fc2_weight.shape)}"
        )
    check_parameters(*fc2, prefix="fc2_")
    for name, sample in (("fc1_scale_grad_rows", fc1_scale_grad_rows), ("fc2_scale_grad_rows", fc2_scale_grad_rows)):
        if sample is not None:
            check_sample(name, sample, x)
    h = rlrr_linear(x, *fc1, residual=residual, backend=backend, scale_grad_rows=fc1_scale_grad_rows)
    return rlrr_linear(
        h, *fc2, residual=residual, input_activation=activation, backend=backend, scale_grad_rows=fc2_scale_grad_rows
    )
