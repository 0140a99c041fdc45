"""``RLRRLinear``: ``nn.Linear`` with a frozen weight under a trained low-rank rescaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.nn.rescaled import RescaledLinear, check_plain, frozen
from rlrr_kernels.ops.checks import compute_dtype
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.sampling.row_sample import RowSample, check_fraction, sample_rows
from rlrr_kernels.reference import rlrr_linear_reference


class RLRRLinear(RescaledLinear):
    """y = x (W ⊙ (1 + s_r s_c))ᵀ + b + f with W and b frozen; s_r, s_c and the shift f are trained (CVPR 2024, Eq. 16).

    ``weight`` and ``bias`` carry ``nn.Linear``'s state-dict keys, so a checkpoint of the plain layer loads with
    ``strict=False`` and misses only the trained tensors. x [..., K] to y [..., N], with the dtypes of
    :func:`rlrr_kernels.rlrr_linear`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a frozen bias [N].
        rank: r, 1 to 64; 1 is the paper's RLRR, more is the method called HiRA.
        groups: G, divides N; row n uses ``scale_col[n // (N / G)]``. 3 on a fused qkv keeps q, k, v apart.
        shift: whether a shift f [N] is trained; also without a bias.
        residual: ``False`` drops the 1: W' = W ⊙ (s_r s_c).
        sides: ``left`` trains s_r alone (s_c = 1, groups mean nothing), ``right`` s_c alone (s_r = 1); rank 1.
        init: how the scales start; see :meth:`reset_parameters`.
        scale_dtype: dtype of scale_row, scale_col and shift.
        scale_grad_rows: ρ under 1 estimates the gradients of s_r and s_c from a share ρ of the rows of x, without bias:
            2 + ρ matrix products a step instead of 3, and only these rows are kept for the backward. The gradients of x
            and f stay exact. Rows are drawn per image (the first dimension of an x of three or more) from the global
            generator of the device in every forward in training mode, as dropout's are; eval mode draws nothing. With
            four of them or more the images' mean gradients are known to the estimate, see
            :class:`rlrr_kernels.RowSample`.
        prefix_tokens: how many of an image's rows, the first ones, are always used (class and register tokens); the
            last dimension but one counts tokens.
        device, dtype: of the frozen tensors, as in ``nn.Linear``.

    Attributes:
        weight: [N, K], frozen. bias: [N], frozen, or None.
        scale_row: [N, r], None on the right side alone. scale_col: [G, r, K], None on the left side alone.
        shift: [N] or None. (trained)

    Raises:
        TypeError: scale_dtype is not a floating-point dtype, or scale_grad_rows no number.
        ValueError: groups does not divide out_features, rank is not from 1 to 64 (or not 1 for one side), init or sides
            is unknown, scale_grad_rows is not over 0 and at most 1, or prefix_tokens is negative.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 1,
        groups: int = 1,
        shift: bool = True,
        residual: bool = True,
        sides: str = "both",
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
        scale_grad_rows: float = 1.0,
        prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__()
        self._wrap(
            linear, groups, scale_grad_rows, prefix_tokens,
            rank=rank, shift=shift, residual=residual, sides=sides, init=init, scale_dtype=scale_dtype,
        )  # fmt: skip

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 1,
        groups: int = 1,
        shift: bool = True,
        residual: bool = True,
        sides: str = "both",
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
        scale_grad_rows: float = 1.0,
        prefix_tokens: int = 0,
    ) -> RLRRLinear:
        """Wraps ``linear``: its parameter objects become this layer's (and are frozen); nothing is copied.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or not a plain one: its class has a forward of its own, or
                its weight or bias is parametrized, pruned, quantised or sharded.
            ValueError: as for the class.
        """
        check_plain("linear", linear, nn.Linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(
            linear, groups, scale_grad_rows, prefix_tokens,
            rank=rank, shift=shift, residual=residual, sides=sides, init=init, scale_dtype=scale_dtype,
        )  # fmt: skip
        return layer.train(linear.training)

    def _wrap(self, linear: nn.Linear, groups: int, scale_grad_rows: float, prefix_tokens: int, **options: Any) -> None:
        if prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be at least 0; got {prefix_tokens}")
        self.scale_grad_rows, self.prefix_tokens = check_fraction(scale_grad_rows), prefix_tokens
        self._adopt_linear(linear, groups, **options)

    def _rescaled(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.requires_grad:
            weight = frozen(weight)
        return rlrr_linear(
            x, weight, *self.scales(), self._total_bias(),
            residual=self.residual, scale_grad_rows=self._draw_rows(x),
        )  # fmt: skip

    def _formula(self, x: Tensor) -> Tensor:
        x, tensors = x.to(compute_dtype(x)[0]), self._wide_tensors()
        return rlrr_linear_reference(x, *tensors, self._total_bias(), residual=self.residual)

    def _draw_rows(self, x: Tensor) -> RowSample | None:
        """The rows that the gradients of this forward of x [..., K] are estimated from; None where they are exact."""
        # Whether gradients are on must not matter: reentrant checkpointing runs the first forward without them, and a
        # second one that draws more would find the generator's state, and so the dropout masks, elsewhere.
        if self.scale_grad_rows == 1 or not (self.training and any(scale.requires_grad for scale in self.scales())):
            return None
        return sample_rows(x.shape, self.scale_grad_rows, self.prefix_tokens, x.device)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' [N, K] as a new tensor: computed in fp32 (fp64 for float64), rounded once to ``dtype`` (default: W's)."""
        return linear_torch.merge(self.weight, *self.scales(), self.residual, dtype)

    def extra_repr(self) -> str:
        share = "" if self.scale_grad_rows == 1 else f", scale_grad_rows={self.scale_grad_rows}"
        return super().extra_repr() + share
