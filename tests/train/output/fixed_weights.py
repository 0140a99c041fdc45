"""Weights that no random generator makes: equal on every machine and with every version of torch and timm."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Gives every tensor of ``model`` values that depend on its name and size alone; returns the model in eval mode.

    They are spread evenly over ±0.2, a norm's weight over 1 ± 0.2, so that outputs depend on the input.
    """
    for name, tensor in model.state_dict().items():
        values = spread(tensor.numel(), zlib.crc32(name.encode())) * 0.2
        if tensor.dim() == 1 and name.endswith("weight"):
            values += 1
        tensor.copy_(values.view(tensor.shape))
    return model.eval()


def spread(count: int, seed: int) -> Tensor:
    """``count`` float32 values in [-1, 1): an integer hash of their position and ``seed``, exact in float32."""
    hashed = (torch.arange(count) + seed) * 2654435761 % 2**32
    for factor in (2246822519, 3266489917):
        hashed = (hashed ^ hashed >> 15) * factor % 2**32
    return (hashed >> 8).float() / 2**23 - 1
