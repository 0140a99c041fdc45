"""``parameter_groups``: which trained parameters decay, by their role in the paper."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rlrr_kernels.adapt.model import adaptation_of, own_parameters
from rlrr_kernels.adapt.modules import named_modules

_MATRIX_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters of an adapted model as two groups for a torch optimizer.

    As the authors' code works out (CVPR 2024): decayed are s_r, s_c, the SSF of the patch tokens and the head's weight;
    not decayed are the shifts f, the SSF of block and final norms and the head's bias. Parameters a user unfroze
    beside these decay when they are a ``weight`` of two dimensions or more.

    Args:
        model: after :func:`rlrr_kernels.adapt_model`.
        lr: learning rate of both groups.
        weight_decay: of the first group; the second has 0.

    Returns:
        ``[{"name": "decay", "params": [...], "lr": lr, "weight_decay": weight_decay}, {"name": "no_decay", ...}]``,
        without a group that would be empty.

    Raises:
        ValueError: the model is not adapted, nothing is trained, or ``lr`` or ``weight_decay`` is negative.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0; got {value}")
    tokens, adapter = adaptation_of(model).tokens, {id(p) for p in own_parameters(model).values()}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    seen: set[int] = set()
    for module, owner in named_modules(model):
        for key, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in adapter:
                decays = key in ("scale_row", "scale_col") or module == tokens
            else:  # by the layer where it has one: FSDP shards a weight into pieces of one dimension
                decays = key == "weight" and (parameter.dim() > 1 or isinstance(owner, _MATRIX_LAYERS))
            (decay if decays else no_decay).append(parameter)
    if not decay and not no_decay:
        raise ValueError("model has no parameter with requires_grad=True, so there is nothing to train")
    groups = [
        {"name": "decay", "params": decay, "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
