"""Dropping residual branches while training: the authors' branch dropout, or stochastic depth."""

from __future__ import annotations

import math

from torch import nn

DROP_KINDS = ("branch", "depth")

_PLACES = ("drop_path", "drop_path1", "drop_path2", "drop_path3")
"""What timm's blocks call the module through which a residual branch passes last."""


def set_drop(model: nn.Module, rate: float, kind: str = "depth") -> dict[str, float]:
    """Sets how the residual branches of ``model`` are dropped in training, in place; in eval mode nothing is.

    The rate rises linearly over the L blocks, block l = 0, 1, ..., L - 1 having rate · l / (L - 1). All branches of a
    block share its rate. What is kept is divided by 1 - rate.

    Args:
        model: a timm model whose blocks name the place (``drop_path1``, ...): ViT, DeiT, DINOv2, BEiT, EVA, Swin,
            ConvNeXt, ResNet, ... Adapted or not: the modules put there have no parameters.
        rate: of the last block, 0 ≤ rate < 1; 0 takes every drop away.
        kind: ``branch`` drops single elements of the branch's output (``nn.Dropout``), which the code of the RLRR
            authors (CVPR 2024) does in their ViT; ``depth`` drops the branch for whole images (timm's ``DropPath``),
            as stochastic depth is meant (Huang et al., ECCV 2016) and as their Swin does.

    Returns:
        Name of each place → its rate.

    Raises:
        ValueError: ``rate`` or ``kind`` is not allowed, or the model has no such place for a ``rate`` above 0.
    """
    check_drop(rate, kind)
    blocks = _blocks(model)
    if not blocks and rate > 0:
        raise ValueError(
            f"drop needs residual blocks with a module called {' or '.join(_PLACES[:3])}, as timm's ViT, Swin and "
            f"ConvNeXt have them; {type(model).__name__} has none"
        )
    rates = {}
    for index, (name, places) in enumerate(blocks.items()):
        block, block_rate = model.get_submodule(name), rate * index / max(len(blocks) - 1, 1)
        for place in places:
            setattr(block, place, _drop_module(block_rate, kind).train(block.training))
            rates[f"{name}.{place}" if name else place] = block_rate
    return rates


def check_drop(rate: float, kind: str) -> None:
    """Raises ``ValueError`` unless :func:`set_drop` takes ``rate`` and ``kind``."""
    if not (math.isfinite(rate) and 0 <= rate < 1):
        raise ValueError(f"drop must be at least 0 and less than 1; got {rate}")
    if kind not in DROP_KINDS:
        raise ValueError(f"drop_kind must be one of {', '.join(DROP_KINDS)}; got {kind!r}")


def _blocks(model: nn.Module) -> dict[str, list[str]]:
    """Name of each block, in order of depth → its places. timm has None or an identity where nothing is dropped."""
    found = {}
    for name, module in model.named_modules():
        places = [place for place in _PLACES if place in module._modules or place in vars(module)]
        places = [place for place in places if _is_drop(getattr(module, place))]
        if places:
            found[name] = places
    return found


def _is_drop(module: object) -> bool:
    return module is None or isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__ == "DropPath"


def _drop_module(rate: float, kind: str) -> nn.Module:
    from timm.layers import DropPath

    if rate == 0:
        return nn.Identity()
    return nn.Dropout(rate) if kind == "branch" else DropPath(rate)
