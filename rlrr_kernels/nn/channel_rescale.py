"""``ChannelRescale``: SSF's trained scale and shift of the last dimension, where no norm comes before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlrr_kernels.nn.norm_rescale import reset_ssf


class ChannelRescale(nn.Module):
    """y = γ ⊙ x + β over the last dimension (SSF; the recipe of RLRR has it on the patch tokens of a ViT).

    Args:
        size: D.
        init: how γ and β start; see :func:`rlrr_kernels.nn.norm_rescale.reset_ssf`.
        device, dtype: of γ and β.

    Attributes:
        scale: γ [D]. shift: β [D]. (trained)
    """

    def __init__(
        self,
        size: int,
        *,
        init: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws γ and β anew."""
        reset_ssf(self.scale, self.shift, self.init)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., D] to y [..., D] in the dtype of x; a 16-bit x is scaled and shifted in the dtype of γ."""
        return (input * self.scale + self.shift).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.scale.shape[0]}"
