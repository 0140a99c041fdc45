"""What the benchmarks compare with: the literal formula in a whole model, and PEFT's methods."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from rlrr_kernels import NormRescale, RLRRLinear
from rlrr_kernels.reference import norm_rescale_reference, rlrr_linear_reference

PEFT = ("hira", "dora", "lora")
"""Methods of PEFT."""

PEFT_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
"""The linear layers of a timm ViT."""


class ReferenceLinear(RLRRLinear):
    """The layer by the literal formula, as eager PyTorch computes it."""

    def forward(self, x: Tensor) -> Tensor:
        row, col = self.scale_row, self.scale_col
        if self.rank == 1:  # the paper's vectors, which eager computes without a matrix product
            row, col = row[:, 0], col[:, 0]
            col = col[0] if self.groups == 1 else col
        return rlrr_linear_reference(x, self.weight, row, col, self._total_bias(), residual=self.residual)


class ReferenceNorm(NormRescale):
    """LayerNorm, then scale and shift, as eager PyTorch computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_rescale_reference(x, self.weight, self.bias, self.scale, self.shift, self.eps)


def use_reference(model: nn.Module) -> None:
    """Makes every adapted layer of ``model`` compute the literal formula; parameters and names stay."""
    for module in model.modules():
        if type(module) is RLRRLinear:
            module.__class__ = ReferenceLinear
        elif type(module) is NormRescale:
            module.__class__ = ReferenceNorm


@functools.cache
def peft_module() -> ModuleType | None:
    """PEFT, or None where it is not installed; imported at first use, because it takes seconds."""
    try:
        import peft
    except ImportError:
        return None
    return peft


def peft_reason(method: str) -> str | None:
    """Why a method of :data:`PEFT` cannot be had here; None when it can."""
    peft = peft_module()
    if peft is None:
        return "peft is not installed"
    if method == "hira" and not hasattr(peft, "HiraConfig"):
        return f"peft {peft.__version__} has no HiRA; 0.20 brought it"
    return None


def peft_config(method: str, targets: str, hira_rank: int = 1) -> Any:
    """HiRA of rank ``hira_rank``, or LoRA or DoRA of rank 8, on the layers whose names match ``targets``.

    The start is random, not zero: products with zeros can run faster than real ones.
    """
    peft = peft_module()
    if method == "hira":
        return peft.HiraConfig(r=hira_rank, target_modules=targets, init_weights=False)
    return peft.LoraConfig(r=8, target_modules=targets, use_dora=method == "dora", init_lora_weights=False)
