"""``RLRRConfig``: what is adapted and how, as plain data that a file can carry."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from rlrr_kernels.nn.rescaled import INITS, check_sides
from rlrr_kernels.ops.checks import MAX_RANK
from rlrr_kernels.ops.conv import CONV_LAYOUTS
from rlrr_kernels.ops.sampling.row_sample import check_fraction

SCHEMA_VERSION = 1
"""Version of what :meth:`RLRRConfig.to_dict` writes; raised when an older reader would misread it."""

WITH_BIAS = "with_bias"
RECIPES = ("paper",)
FORMS = ("rescaled", "additive")

LAYER_KINDS = {"all": None, "attention": ("attn.*",), "mlp": ("mlp.*",), "qkv": ("attn.qkv",)}
"""``include`` patterns for usual choices of layers, in the names of timm's transformers."""

_SCALE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted module name, or its end after a dot, matches one of the glob patterns.

    ``qkv`` and ``attn.*`` match ``blocks.0.attn.qkv``; so do ``blocks.*.qkv`` and ``*``. A ``*`` also crosses dots.
    """
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def pattern_of(name: str) -> str:
    """``blocks.*.attn.qkv`` for ``blocks.0.attn.qkv``: the pattern of a layer and its like in other blocks."""
    *path, last = name.split(".")
    return ".".join([*(re.sub(r"(^|_)\d+$", r"\1*", part) for part in path), last])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLRRConfig:
    """What :func:`rlrr_kernels.adapt_model` does to a model.

    Patterns are globs on dotted module names, see :func:`rlrr_kernels.adapt.config.matches`.

    Args:
        rank: r of every layer, 1 to 64; 1 is the paper's RLRR.
        groups: G of every layer, or a mapping pattern → G (first match wins, others 1). None: 1, or the recipe's.
        shift: whether every layer trains a shift f [N], also where it has no bias. ``with_bias``: only where it has
            one, so that merged layers gain no bias that plain timm does not know.
        residual: ``False`` gives W' = W ⊙ (s_r s_c) without the 1.
        sides: ``both`` scales, or ``left`` (s_r alone, s_c = 1) or ``right`` (s_c alone, s_r = 1) with rank 1.
        form: ``rescaled``, or ``additive``: W' = W + s_r s_c, without the ⊙ W (:class:`rlrr_kernels.AdditiveLinear`; on
            linear layers alone).
        init: ``paper``, ``identity`` or ``normal``, as in :class:`rlrr_kernels.RLRRLinear`; with ``identity`` the
            recipe's SSF starts at γ = 1, β = 0 too, so the features start as the backbone's.
        scale_dtype: dtype of the scales and shifts, a torch dtype or its name.
        include: patterns of the linear layers to adapt. None: all, or the recipe's.
        exclude: patterns of linear layers and convolutions to leave alone.
        convs: patterns of the ``nn.Conv2d`` layers to adapt too, see :class:`rlrr_kernels.RLRRConv2d`; none by default.
            One without a bias (as before a batch norm) trains no shift, so that the merged model stays the plain one.
        conv_layout: how their kernels are seen as matrices, ``out,in*kh*kw`` or ``out*kh,in*kw`` (the authors').
        heads: patterns of the modules trained as they are, matched against whole names only. None: what timm calls the
            model's classifier, else top-level modules with the usual names (head, fc, classifier, ...). ``()``: none.
        recipe: ``paper`` adds all that surrounds the layer in the paper: groups = 3 on a ViT's fused qkv, SSF scale
            and shift after block norms, final norm and (ViT) on patch tokens, a zero-initialised head. None: layers
            only.
        scale_grad_rows: ρ under 1 trains the scales of the linear layers by an estimate of their gradients from a share
            ρ of the tokens, see :class:`rlrr_kernels.RLRRLinear`. A setting of the training that no adapter file holds:
            a loaded configuration has 1, the exact gradients.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.
    """

    rank: int = 1
    groups: int | Mapping[str, int] | None = None
    shift: bool | str = True
    residual: bool = True
    sides: str = "both"
    form: str = "rescaled"
    init: str = "paper"
    scale_dtype: torch.dtype | str = torch.float32
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    convs: tuple[str, ...] = ()
    conv_layout: str = CONV_LAYOUTS[0]
    heads: tuple[str, ...] | None = None
    recipe: str | None = None
    scale_grad_rows: float = 1.0

    def __post_init__(self) -> None:
        _check_int("rank", self.rank)
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must be from 1 to {MAX_RANK}; got {self.rank}")
        if isinstance(self.groups, Mapping):
            for pattern, groups in self.groups.items():
                if not isinstance(pattern, str):
                    raise TypeError(f"groups must map name patterns to integers; got the key {pattern!r}")
                _check_groups(f"groups[{pattern!r}]", groups)
            object.__setattr__(self, "groups", dict(self.groups))
        elif self.groups is not None:
            _check_groups("groups", self.groups)
        if not isinstance(self.residual, bool):
            raise TypeError(f"residual must be True or False; got {self.residual!r}")
        if not isinstance(self.shift, bool) and self.shift != WITH_BIAS:
            raise TypeError(f"shift must be True, False or {WITH_BIAS!r}; got {self.shift!r}")
        check_sides(self.sides, self.rank)
        _check_choice("form", self.form, FORMS)
        _check_choice("init", self.init, INITS)
        _check_choice("conv_layout", self.conv_layout, CONV_LAYOUTS)
        if self.recipe is not None:
            _check_choice("recipe", self.recipe, RECIPES)
        object.__setattr__(self, "scale_grad_rows", check_fraction(self.scale_grad_rows))
        object.__setattr__(self, "scale_dtype", _as_dtype(self.scale_dtype))
        for name in ("include", "exclude", "convs", "heads"):
            object.__setattr__(self, name, _as_patterns(name, getattr(self, name)))
        for name in ("exclude", "convs"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        if self.form == "additive" and not self.residual:
            raise ValueError("residual must be True for form='additive': without W nothing of the layer would be left")
        if self.form == "additive" and self.scale_grad_rows != 1:
            raise ValueError(f"scale_grad_rows must be 1 for form='additive'; got {self.scale_grad_rows}")
        if self.form == "additive" and self.convs:
            raise ValueError(f"convs must be empty for form='additive', which is for linear layers; got {self.convs}")

    @property
    def formula(self) -> str:
        """W' in the symbols of the paper, such as ``W ⊙ (1 + s_r s_c)``."""
        scales = {"both": "s_r s_c", "left": "s_r", "right": "s_c"}[self.sides]
        if self.form == "additive":
            return f"W + {scales}" if self.sides == "both" else f"W + {scales} 1"
        return f"W ⊙ (1 + {scales})" if self.residual else f"W ⊙ ({scales})"

    def groups_of(self, name: str) -> int:
        """G of the layer called ``name``."""
        if isinstance(self.groups, Mapping):
            return next((groups for pattern, groups in self.groups.items() if matches(name, (pattern,))), 1)
        return self.groups or 1

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types, with ``schema_version`` and without ``scale_grad_rows``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["scale_grad_rows"]  # how an adapter was trained, not what it is
        values["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        for name in ("include", "exclude", "convs", "heads"):
            values[name] = None if values[name] is None else list(values[name])
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RLRRConfig:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            TypeError: ``values`` is no mapping, or an entry has the wrong type.
            ValueError: ``schema_version`` is missing or not this version's, an entry is unknown or not allowed.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"the configuration must be a mapping; got {type(values).__name__}")
        values = dict(values)
        check_schema_version(values.pop("schema_version", None))
        unknown = sorted(set(values) - set(cls().to_dict()))
        if unknown:
            raise ValueError(f"the configuration has entries this version does not know: {', '.join(unknown)}")
        return cls(**values)


def check_schema_version(version: Any) -> None:
    """Raises ``ValueError`` unless ``version`` is one this package reads."""
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}; got {version!r}"
            + ("; it was written by a newer rlrr_kernels, upgrade to read it" if newer else "")
        )


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")


def _check_groups(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _as_dtype(value: Any) -> torch.dtype:
    if isinstance(value, str):
        value = _SCALE_DTYPES.get(value.removeprefix("torch."), value)
    if value not in _SCALE_DTYPES.values():
        raise ValueError(f"scale_dtype must be one of {', '.join(_SCALE_DTYPES)}; got {value!r}")
    return value


def _as_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise TypeError(f"{name} must be a name pattern or a sequence of them; got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{name} must hold name patterns (non-empty strings); got {pattern!r}")
    return patterns
