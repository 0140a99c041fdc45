"""Recipes: how a layer's backward computes its input again from tensors that are kept anyway, instead of keeping it.

A function whose result is cheap to compute attaches a recipe to it. ``rlrr_linear`` then saves the recipe's tensors,
which that function saved too, and not its input. Whoever does not know recipes, and every tensor that a view or another
operation derives from the result, is unaffected: nothing but memory depends on a recipe being seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_rlrr_recipe"


class Recipe(NamedTuple):
    """``compute(dtype, *tensors)`` gives the tensor again, bit by bit, cast to ``dtype``.

    ``versions`` are those of the tensor and of what it is computed from.
    """

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]


def attach_recipe(result: Tensor, compute: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    """Attaches a recipe to ``result`` where a backward can follow."""
    present = [tensor for tensor in (result, *tensors) if tensor is not None]
    if torch.is_grad_enabled() and not any(tensor.is_inference() for tensor in present):
        setattr(result, _ATTRIBUTE, Recipe(compute, tensors, tuple(tensor._version for tensor in present)))


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe of ``x``; None where it has none, something was changed in place since, or a transform is at work."""
    recipe = None if torch.compiler.is_compiling() else getattr(x, _ATTRIBUTE, None)
    if recipe is None or torch._C._are_functorch_transforms_active():
        return None
    present = [tensor for tensor in (x, *recipe.tensors) if tensor is not None]
    return recipe if recipe.versions == tuple(tensor._version for tensor in present) else None
