"""``OutputRescale``: a frozen linear layer or convolution under SSF's trained scale and shift of its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.rescaled import unfit_reason
from rlrr_kernels.ops.norm_rescale.public import fold_norm

_PADDED = {"timm.layers.conv2d_same.Conv2dSame"}
"""Classes whose forward pads x and does nothing else to what the plain one computes."""


def unfoldable_reason(layer: nn.Module) -> str | None:
    """Why a scale cannot be folded into the weight of ``layer``, an ``nn.Linear`` or ``nn.Conv2d``, or None."""
    kind = type(layer)
    return None if f"{kind.__module__}.{kind.__name__}" in _PADDED else unfit_reason(layer)


class OutputRescale(nn.Module):
    """y = γ ⊙ layer(x) + β over the output channels (SSF, Lian et al., NeurIPS 2022, Eq. 1).

    Args:
        layer: ``nn.Linear`` (channels last) or ``nn.Conv2d`` (channels first); it is frozen, nothing is copied.
        init: how γ and β start; see :func:`rlrr_kernels.nn.norm_rescale.reset_ssf`.
        dtype: of γ and β.

    Attributes:
        layer: as given. rescale: γ and β [N], trained.

    Raises:
        TypeError: ``layer`` is neither, or γ cannot be folded into its weight: its class has a forward of its own,
            which may normalise the weight, or the weight is parametrized, pruned, quantised or sharded.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, *, init: str = "paper", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"layer must be an nn.Linear or nn.Conv2d; got {type(layer).__name__}")
        reason = unfoldable_reason(layer)
        if reason is not None:
            raise TypeError(f"layer must be one into which a scale can be folded, but {reason}")
        self.layer = layer.requires_grad_(False)
        self.rescale = ChannelRescale(layer.weight.shape[0], init=init, device=layer.weight.device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that ask a layer for its dtype or device."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """x as the layer takes it, y as the layer gives it."""
        y = self.layer(input)
        if isinstance(self.layer, nn.Linear):
            return self.rescale(y)
        return self.rescale(y.movedim(1, -1)).movedim(-1, 1)

    @torch.no_grad()
    def fold(self) -> nn.Linear | nn.Conv2d:
        """The layer with γ ⊙ W and γ ⊙ b + β in place of its tensors, each rounded once; it always has a bias."""
        scale, bias = fold_norm(None, self.bias, self.rescale.scale, self.rescale.shift)
        weight = self.weight.to(torch.promote_types(scale.dtype, self.weight.dtype))
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        dtype = self.weight.dtype
        self.layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.layer.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
        return self.layer.train(self.training)
