"""The paper's recipe around the layer: which layers, groups, norms and tokens it names in which family of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from rlrr_kernels.adapt.config import RLRRConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the recipe means in one family of models; patterns as in :class:`RLRRConfig`.

    Args:
        families: model classes, with their subclasses, as ``module.Class``; named, so that timm is not imported.
        include: linear layers.
        groups: pattern → G.
        norms: LayerNorms that get SSF's scale and shift.
        tokens: the module that comes last in the patch embedding (identity or norm), which gets SSF too. None: none.
    """

    families: tuple[str, ...]
    include: tuple[str, ...]
    groups: Mapping[str, int]
    norms: tuple[str, ...]
    tokens: str | None


# The authors keep q, k and v of a ViT as three layers with an s_c each; their Swin has one fused layer with one s_c.
PAPER = (
    Recipe(
        families=(
            "timm.models.vision_transformer.VisionTransformer",
            "timm.models.beit.Beit",
            "timm.models.eva.Eva",
        ),
        include=("blocks.*",),
        groups={"blocks.*.qkv": 3},
        norms=("blocks.*.norm1", "blocks.*.norm2", "norm", "fc_norm"),
        tokens="patch_embed.norm",
    ),
    Recipe(
        families=("timm.models.swin_transformer.SwinTransformer",),
        include=("layers.*",),
        groups={},
        norms=("layers.*.blocks.*.norm1", "layers.*.blocks.*.norm2", "norm"),
        tokens=None,
    ),
)


def paper_recipe(model: nn.Module) -> Recipe:
    """The recipe for ``model``.

    Raises:
        ValueError: the paper's recipe is not defined for this kind of model.
    """
    families = {f"{cls.__module__}.{cls.__name__}" for cls in type(model).__mro__}
    for recipe in PAPER:
        if families.intersection(recipe.families):
            return recipe
    known = ", ".join(family.rpartition(".")[2] for recipe in PAPER for family in recipe.families)
    raise ValueError(
        f"recipe='paper' is defined for timm's {known} and their subclasses; got {type(model).__name__}. "
        "recipe=None adapts the linear layers of any module"
    )


def with_recipe(config: RLRRConfig, recipe: Recipe | None) -> RLRRConfig:
    """``config`` with what it leaves open (include, groups) filled in."""
    include = config.include if config.include is not None else (recipe.include if recipe else ("*",))
    groups = config.groups if config.groups is not None else (recipe.groups if recipe else 1)
    return dataclasses.replace(config, include=include, groups=groups)
