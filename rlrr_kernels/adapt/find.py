"""Which modules of a model a configuration means: heads, linear layers, convolutions; or an error that names them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rlrr_kernels.adapt.config import RLRRConfig, matches, pattern_of
from rlrr_kernels.adapt.modules import named_modules, unwrap
from rlrr_kernels.nn.rescaled import unfit_reason

HEAD_NAMES = ("head", "head_dist", "heads", "fc", "classifier", "classification_head")
"""What models without timm's ``get_classifier`` call their head."""


def find_heads(model: nn.Module, config: RLRRConfig) -> list[str]:
    """Names of the modules of ``model`` that are trained as they are, by ``config.heads`` or what timm calls them.

    Raises:
        ValueError: a pattern of ``config.heads`` matches no module.
    """
    modules = dict(named_modules(model))
    if config.heads is not None:
        for pattern in config.heads:
            if not any(name and fnmatchcase(name, pattern) for name in modules):
                raise ValueError(
                    f"heads pattern {pattern!r} matches no module of the model; its top-level modules are "
                    f"{', '.join(name for name, _ in model.named_children())}"
                )
        return _outermost(
            name for name in modules if name and any(fnmatchcase(name, pattern) for pattern in config.heads)
        )
    get_classifier: Any = getattr(model, "get_classifier", None)  # timm's
    if callable(get_classifier):
        classifier = get_classifier()
        classifiers = classifier if isinstance(classifier, tuple | list) else (classifier,)
        classifiers = [unwrap(head) for head in classifiers if isinstance(head, nn.Module)]
        found = [name for name, module in modules.items() if any(module is head for head in classifiers)]
    else:
        found = [name for name in HEAD_NAMES if name in modules]
    return [name for name in found if next(modules[name].parameters(), None) is not None]


def _outermost(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def under(name: str, ancestors: Iterable[str]) -> bool:
    """Whether the module called ``name`` is one of ``ancestors`` or lies inside one."""
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def find_linears(modules: dict[str, nn.Module], heads: list[str], config: RLRRConfig, optional: bool) -> list[str]:
    """Names of the ``nn.Linear`` that ``config``, with its ``include`` filled in, means; none is allowed if optional.

    Raises:
        ValueError: a pattern or all of them match nothing, or a matched layer is no plain one.
    """
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not under(name, heads)]
    include = config.include or ()
    layers = [name for name in linears if matches(name, include) and not matches(name, config.exclude)]
    if not layers and not optional:
        raise ValueError(
            f"no linear layer matches include={list(include)} and exclude={list(config.exclude)}; "
            + (f"the model's linear layers are {some(linears)}" if linears else "the model has none beside its head")
            + ("" if linears or not _convs(modules, heads) else "; convs=['*'] adapts its convolutions")
        )
    idle = [p for p in include if not any(matches(name, (p,)) for name in linears)]
    if idle and not optional:
        raise ValueError(f"include patterns match no linear layer: {', '.join(idle)}; these are {some(linears)}")
    _check_plain(modules, layers, "nn.Linear")
    return layers


def _convs(modules: dict[str, nn.Module], heads: list[str]) -> list[str]:
    named = {name: module for name, module in modules.items() if name}  # the model itself cannot be replaced in place
    return [name for name, module in named.items() if isinstance(module, nn.Conv2d) and not under(name, heads)]


def find_convs(modules: dict[str, nn.Module], heads: list[str], config: RLRRConfig) -> list[str]:
    """Names of the ``nn.Conv2d`` that ``config.convs`` means.

    Raises:
        ValueError: a pattern matches nothing, or a matched layer is no plain one.
    """
    convs = _convs(modules, heads)
    idle = [p for p in config.convs if not any(matches(name, (p,)) for name in convs)]
    if idle:
        these = f"these are {some(convs)}" if convs else "the model has none beside its head"
        raise ValueError(f"convs patterns match no nn.Conv2d: {', '.join(idle)}; {these}")
    layers = [name for name in convs if matches(name, config.convs) and not matches(name, config.exclude)]
    _check_plain(modules, layers, "nn.Conv2d")
    return layers


def _check_plain(modules: dict[str, nn.Module], layers: list[str], kind: str) -> None:
    reasons = {name: reason for name in layers if (reason := unfit_reason(modules[name])) is not None}
    if reasons:
        kinds = ", ".join(sorted({type(modules[name]).__name__ for name in reasons}))
        raise ValueError(
            f"only a plain floating-point {kind} can be adapted; {some(reasons)} are of type {kinds}: "
            f"{'; '.join(dict.fromkeys(reasons.values()))}. Leave them alone with {exclude_hint(reasons)}"
        )


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first few of ``names``, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def exclude_hint(names: Iterable[str]) -> str:
    """The ``exclude=`` that leaves the layers called ``names`` alone."""
    return f"exclude={list(dict.fromkeys(map(pattern_of, names)))}"
