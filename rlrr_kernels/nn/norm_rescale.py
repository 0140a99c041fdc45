"""``NormRescale``: ``nn.LayerNorm`` with frozen parameters under SSF's trained scale and shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.nn.rescaled import call_in_graph, frozen, is_proxy, refuse_script
from rlrr_kernels.ops.norm_rescale.public import fold_norm, norm_rescale

SSF_INITS = ("paper", "identity")


def reset_ssf(scale: Tensor, shift: Tensor, init: str) -> None:
    """``paper``: γ ~ N(1, 0.02), β ~ N(0, 0.02). ``identity``: γ = 1, β = 0. In place.

    Raises:
        ValueError: ``init`` is neither.
    """
    if init not in SSF_INITS:
        raise ValueError(f"init must be one of {', '.join(SSF_INITS)}; got {init!r}")
    std = 0.02 if init == "paper" else 0.0
    with torch.no_grad():
        scale.normal_(1.0, std)
        shift.normal_(0.0, std)


class NormRescale(nn.Module):
    """γ ⊙ LayerNorm(x) + β with a frozen LayerNorm and trained γ, β (SSF, in the recipe of RLRR, CVPR 2024).

    ``weight`` and ``bias`` carry ``nn.LayerNorm``'s state-dict keys.

    Args:
        norm: normalises the last dimension; its parameter objects become this module's (and are frozen).
        init: how γ and β start; see :func:`reset_ssf`.
        device: of γ and β; by default that of ``norm``.
        dtype: of γ and β.

    Attributes:
        weight: w [D] or None, frozen. bias: b [D] or None, frozen. scale: γ [D]. shift: β [D]. (trained)
        keep_output: as in :func:`rlrr_kernels.norm_rescale`; :func:`rlrr_kernels.recompute_activations` sets it.

    Raises:
        TypeError: ``norm`` is not an ``nn.LayerNorm``, or its weight or bias is parametrized.
        ValueError: ``norm`` normalises more than one dimension, or init is unknown.
    """

    def __init__(
        self,
        norm: nn.LayerNorm,
        *,
        init: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"norm must be an nn.LayerNorm; got {type(norm).__name__}")
        if "weight" not in norm._parameters or "bias" not in norm._parameters:
            raise TypeError("norm must have a weight and bias of its own; they are computed from other tensors")
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"norm must normalise one dimension; got normalized_shape {tuple(norm.normalized_shape)}")
        self.normalized_shape, self.eps, self.init = tuple(norm.normalized_shape), norm.eps, init
        self.keep_output = True
        self.weight = None if norm.weight is None else norm.weight.requires_grad_(False)
        self.bias = None if norm.bias is None else norm.bias.requires_grad_(False)
        if device is None and norm.weight is not None:
            device = norm.weight.device
        self.scale = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws γ and β anew; the frozen tensors stay."""
        reset_ssf(self.scale, self.shift, self.init)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., D] to y [..., D]; dtypes as in :func:`rlrr_kernels.norm_rescale`."""
        if type(input) is not Tensor and is_proxy(input):
            return call_in_graph(self, input)
        weight, bias = self.weight, self.bias
        if weight is not None and weight.requires_grad:
            weight, bias = frozen(weight), None if bias is None else frozen(bias)
        keep_output = self.keep_output or bool(self._forward_hooks)  # which may change y as no version shows
        return norm_rescale(input, weight, bias, self.scale, self.shift, self.eps, keep_output=keep_output)

    __prepare_scriptable__ = refuse_script

    def _slow_forward(self, input: Tensor) -> Tensor:  # while torch.jit.trace records, see Rescaled
        y = F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return (self.scale * y + self.shift).to(y.dtype)

    @torch.no_grad()
    def to_layer_norm(self) -> nn.LayerNorm:
        """A plain ``nn.LayerNorm`` with weight γ ⊙ w and bias γ ⊙ b + β, rounded once to w's dtype; shares nothing."""
        weight, bias = fold_norm(self.weight, self.bias, self.scale, self.shift)
        dtype = self.scale.dtype if self.weight is None else self.weight.dtype
        norm = nn.LayerNorm(self.normalized_shape, self.eps, device="meta", dtype=dtype)
        norm.weight = nn.Parameter(weight.to(dtype, copy=True))
        norm.bias = nn.Parameter(bias.to(dtype, copy=True))
        return norm.train(self.training)

    def extra_repr(self) -> str:
        has = f"weight={self.weight is not None}, bias={self.bias is not None}"
        return f"{self.normalized_shape[0]}, eps={self.eps}, {has}"
