"""Adapters of a small backbone whose answers tell which adapter gave them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import torch
from PIL import Image

from rlrr_kernels import RLRRConfig, adapt_model, save_adapter
from rlrr_kernels.train.models.backbones import NO_WEIGHTS, create_model
from rlrr_kernels.train.task import Task
from tests.support.tiny_models import disturb

MODEL, PIXELS = "vit_tiny_patch16_224", 32


def save_marked(folder: Path, name: str, classes: int = 3, *, version: int = 0, pixels: int = PIXELS) -> Path:
    """An adapter whose first class, ``<name> <version>``, has a probability above 0.9 on every image."""
    model, preprocessing = create_model(MODEL, 1, image_size=pixels, weights=NO_WEIGHTS)  # one, as the server's
    model.reset_classifier(classes)
    adapt_model(model, RLRRConfig(recipe="paper"))
    torch.manual_seed(version)
    disturb(model, 0.01)
    with torch.no_grad():
        model.head.weight.mul_(0.01)
        model.head.bias.copy_(torch.tensor([6.0] + [0.0] * (classes - 1)))
    task = Task(MODEL, NO_WEIGHTS, tuple(f"{name} {version}-{i}" for i in range(classes)), preprocessing)
    return save_adapter(model, folder, metadata={"task": task.to_dict()})


def png(size: tuple[int, int] = (40, 50), color: tuple[int, int, int] = (200, 30, 90), kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def gif_header(width: int, height: int) -> bytes:
    """The first bytes of a GIF: enough to open it, and its pixels would fill the memory."""
    frame = struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + frame + b"\x08"


def save_folder(root: Path) -> Path:
    """``root`` with the adapters ``cells`` and ``flowers é&/?`` as run folders, and what is no adapter."""
    for i, name in enumerate(("cells", "flowers é&/?")):
        save_marked(root / name.replace("/", "-") / "adapter", name, 2 + i)
    (root / "notes.txt").write_text("no adapter")
    (root / ".hidden").mkdir()
    return root
