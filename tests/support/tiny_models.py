"""Small models of each supported family, built in milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 32}),
    "dinov2": (
        "vit_small_patch14_dinov2",
        {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 28, "init_values": 0.3},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 32}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56, "drop_path_rate": 0.0},
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "beit": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 28}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16, "img_size": 64, "drop_path_rate": 0.0},
    ),
}

"""Families with linear layers beside the head."""

CONVOLUTIONAL = {"resnet": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 24)})}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A timm model of ``family`` with 5 classes and weights that depend on ``seed`` alone, in eval mode."""
    timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    torch.manual_seed(seed)
    name, arguments = (SIZES | CONVOLUTIONAL)[family]
    model = timm.create_model(name, **{"num_classes": 5, **arguments, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model has zero biases, which would hide mistakes with them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_images(family: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Three images of the size ``tiny_model(family)`` takes."""
    size = (SIZES | CONVOLUTIONAL)[family][1].get("img_size", 64)
    return torch.randn(3, 3, size, size, dtype=dtype)


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    """Moves every trained parameter away from where it started, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def backward(model: nn.Module, images: Tensor) -> None:
    """One backward of a loss on the logits, in training mode."""
    logits = model.train()(images)
    logits = logits if isinstance(logits, Tensor) else torch.stack(logits).sum(0)
    nn.functional.cross_entropy(logits, torch.arange(len(images))).backward()
