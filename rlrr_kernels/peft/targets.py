"""Which linear layers a model adapts where nobody names them, and which it never does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from rlrr_kernels.adapt.bypass import find_bypassed, qkv_bias_switches
from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import find_heads, under
from rlrr_kernels.adapt.recipe import paper_recipe


def exactly(names: Iterable[str]) -> str:
    """``target_modules`` of PEFT that mean the layers called ``names`` alone: names in a list are ends of names."""
    return "|".join(map(re.escape, names))


def exact_pattern(values: Mapping[str, int]) -> dict[str, int]:
    """``rank_pattern`` or ``groups_pattern`` of PEFT that give each layer its own value, and no other layer one."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of ``model``, adapted or not, without its head."""
    names, inside = [], find_heads(model, RLRRConfig())
    for name, module in model.named_modules():
        if under(name, inside):
            continue
        if isinstance(module, nn.Linear | BaseTunerLayer):
            names.append(name)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside.append(name)
    return names


def default_targets(model: nn.Module, *, ends: bool) -> set[str] | str:
    """The linear layers in the numbered blocks of a model of timm's or transformers': what the paper adapts in a ViT.

    Embeddings, poolers and heads are in no such block, so they are left alone, as are layers whose parents read their
    weight instead of calling them.

    Args:
        model: the base model.
        ends: whether the ends of their names are wanted, from which ``layers_to_transform`` chooses blocks.

    Raises:
        ValueError: the model is neither, or has no such layer.
    """
    found = []
    if isinstance(model, PreTrainedModel) or callable(getattr(model, "get_classifier", None)):
        found = [name for name in linears(model) if any(part.isdigit() for part in name.split(".")[:-1])]
        bypassed = find_bypassed(model, set(found) - set(qkv_bias_switches(model, found)))
        found = [name for name in found if name not in bypassed]
    if not found:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: there is a default for models of timm and transformers "
            f"with linear layers in numbered blocks, not for {type(model).__name__}"
        )
    return {end_of_name(name) for name in found} if ends else exactly(found)


def end_of_name(name: str) -> str:
    """What follows the last number in ``name`` that a word follows: ``mlp.0`` of ``blocks.3.mlp.0``; else all of it."""
    parts = name.split(".")
    words = [index for index, part in enumerate(parts) if not part.isdigit()]
    numbers = [index for index, part in enumerate(parts[: max(words, default=0)]) if part.isdigit()]
    return ".".join(parts[max(numbers, default=-1) + 1 :])


def default_groups(model: Any) -> dict[str, int]:
    """Regular expression → G of the paper's recipe for ``model``; empty where it has none."""
    try:
        groups = paper_recipe(model).groups
    except ValueError:
        return {}
    return {pattern.replace(".", r"\.").replace("*", ".*"): count for pattern, count in groups.items()}
