"""``AdditiveLinear``: ``nn.Linear`` with a frozen weight and a trained low-rank matrix beside it, not under it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.nn.rescaled import RescaledLinear, check_plain
from rlrr_kernels.ops.checks import check_float, check_operands, compute_dtype
from rlrr_kernels.ops.dtypes import accumulate_dtype


class AdditiveLinear(RescaledLinear):
    """y = x (W + s_r s_c)ᵀ + b + f: RLRR without the ⊙ W in its ΔW, to see what that does.

    The same trained tensors, names and merging as :class:`rlrr_kernels.RLRRLinear`; no W-sized tensor is made or kept:
    x s_cᵀ [..., G r] comes between the two products.

    Args:
        linear: its parameter objects become this layer's (and are frozen); nothing is copied.
        rank, groups, shift, sides, scale_dtype: as for :class:`rlrr_kernels.RLRRLinear`.
        init: how the scales start; see :meth:`reset_parameters`.

    Attributes:
        weight: [N, K], frozen. bias: [N], frozen, or None.
        scale_row: [N, r] or None. scale_col: [G, r, K] or None. shift: [N] or None. (trained)

    Raises:
        TypeError: ``linear`` is not a plain ``nn.Linear`` (see :meth:`rlrr_kernels.RLRRLinear.from_linear`), or
            scale_dtype is not a floating-point dtype.
        ValueError: as for :class:`rlrr_kernels.RLRRLinear`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 1,
        groups: int = 1,
        shift: bool = True,
        sides: str = "both",
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_plain("linear", linear, nn.Linear)
        options = {"rank": rank, "shift": shift, "sides": sides, "init": init, "scale_dtype": scale_dtype}
        self._adopt_linear(linear, groups, residual=True, **options)
        self.train(linear.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the scales as RLRRLinear does, then multiplies one of them by the root mean square of W.

        So ΔW is as large beside W as RLRR's: 2/√K of it for ``paper``. ``identity`` starts at W.
        """
        super().reset_parameters()
        if self.weight.numel():
            size = self.weight.to(accumulate_dtype(self.weight.dtype)).square().mean().sqrt()
            scale = next(scale for scale in (self.scale_row, self.scale_col) if scale is not None)
            scale.mul_(size.to(scale.dtype))

    def _rescaled(self, x: Tensor) -> Tensor:
        check_operands(x)
        check_float(x)
        x = x.to(compute_dtype(x)[0])
        scale_row, scale_col = (scale.to(x.dtype) for scale in self.scales())
        bias = self._total_bias()
        y = F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        inner = torch.einsum("...k,grk->...gr", x, scale_col)
        outer = scale_row.unflatten(0, (scale_col.shape[0], -1))  # [G, N / G, r]
        return y + torch.einsum("...gr,gnr->...gn", inner, outer).flatten(-2)

    _formula = _rescaled

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + s_r s_c [N, K] as a new tensor: computed in fp32 (fp64), rounded once to ``dtype`` (default: W's)."""
        wide = accumulate_dtype(self.weight.dtype)
        scale_row, scale_col = (scale.to(wide) for scale in self.scales())
        delta = (scale_row.unflatten(0, (scale_col.shape[0], -1)).unsqueeze(-1) * scale_col.unsqueeze(1)).sum(2)
        return (self.weight.to(wide) + delta.flatten(0, 1)).to(dtype or self.weight.dtype)
