"""Which of timm's two attentions a model computes by: PyTorch's fused one, or plain products and a softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

PLAIN_UP_TO = 300
"""Tokens. On an AMD EPYC with AVX512_BF16, timm's ``Attention`` (384 channels, 6 heads, frozen weights), fused against
plain in turns, the fastest of a dozen each: under bf16 a training step takes 2.2 times as long at 65 tokens of 32
images (3.5 times on two threads), 1.6 to 1.9 times at 197 and 257, 1.3 times at 1370; a forward 1.1 to 1.8 times. In
float32 fused is ahead, by at most a fifth of what is a tenth of a ViT's step, and by more than twice at 1370 tokens.
One rule for both: runs that were begun in float32 go on with the same numbers. Plain keeps six bytes for each pair of
tokens, head and image, 0.1 GB a layer at this limit, and four times that at twice the tokens: there memory counts."""


@contextlib.contextmanager
def fastest_attention(model: nn.Module, accelerator: Accelerator, image_size: int) -> Iterator[None]:
    """Within, ``model`` computes attention by what is faster on the device of ``accelerator``: plainly on a CPU over up
    to :data:`PLAIN_UP_TO` tokens, else as timm made it. Equal within rounding.

    Args:
        model: timm's; of one whose number of tokens is not known, nothing is changed.
        accelerator: of the run.
        image_size: pixels, height and width.
    """
    changed = []
    if accelerator.device.type == "cpu":
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        patch = patch[0] if isinstance(patch, tuple) else patch
        whole = (image_size // patch) ** 2 if patch else PLAIN_UP_TO + 1
        for module in model.modules():
            if getattr(module, "fused_attn", False) and getattr(module, "window_area", whole) <= PLAIN_UP_TO:
                module.fused_attn = False
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            module.fused_attn = True
