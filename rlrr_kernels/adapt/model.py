"""``adapt_model``: plans what a configuration means for a model, checks all of it, then changes the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.bypass import find_bypassed, qkv_bias_switches
from rlrr_kernels.adapt.config import RLRRConfig, matches, pattern_of
from rlrr_kernels.adapt.recipe import Recipe, paper_recipe, with_recipe
from rlrr_kernels.adapt.report import AdaptReport, LayerReport
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.norm_rescale import NormRescale

_HEAD_NAMES = ("head", "head_dist", "heads", "fc", "classifier", "classification_head")

_PLAIN_LINEARS = {"timm.layers.linear.Linear"}
PLAIN_NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}

_ATTRIBUTE = "rlrr_adaptation"


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What was done to a model, by name; kept on the model by :func:`adapt_model`, see :func:`adaptation_of`.

    Attributes:
        config: as given. layers: adapted linear layers. norms: norms with SSF. tokens: the SSF of the patch tokens or
        None. heads: modules trained as they are. patched: layers whose parent's ``qkv_bias_separate`` was switched on.
    """

    config: RLRRConfig
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    tokens: str | None
    heads: tuple[str, ...]
    patched: tuple[str, ...]


def adapt_model(model: nn.Module, config: RLRRConfig | None = None) -> AdaptReport:
    """Puts an :class:`rlrr_kernels.RLRRLinear` over every matched ``nn.Linear`` of ``model``, in place.

    The head stays as it is and is trained; everything else is frozen. All checks come before the first change: a model
    for which this raises is untouched. Works on the meta device.

    Args:
        model: any ``nn.Module``: timm's ViT, DeiT, DINOv2, Swin, ConvNeXt, ...
        config: what to adapt and how; None is ``RLRRConfig()``: every linear layer but the head's, rank 1.

    Returns:
        Layers, groups and counts of trained parameters; ``print`` it.

    Raises:
        TypeError: ``model`` is no module or ``config`` no :class:`RLRRConfig`.
        ValueError: the model is adapted already; no layer, head or group pattern matches; G does not divide N; the
            forward of a matched layer is bypassed (named); a matched layer is no plain ``nn.Linear``; the recipe is not
            defined for the model.
    """
    model = unwrap(model)
    plan = plan_adaptation(model, RLRRConfig() if config is None else config)
    apply_adaptation(model, plan)
    return adapt_report(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s and ``DistributedDataParallel``'s wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def is_adapted(model: nn.Module) -> bool:
    """Whether :func:`adapt_model` was applied to ``model`` and not merged since."""
    return getattr(unwrap(model), _ATTRIBUTE, None) is not None


def adaptation_of(model: nn.Module) -> Adaptation:
    """What :func:`adapt_model` did to ``model``.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation = getattr(unwrap(model), _ATTRIBUTE, None)
    if adaptation is None:
        raise ValueError(f"model ({type(model).__name__}) is not adapted; call adapt_model or load_adapter first")
    return adaptation


def forget_adaptation(model: nn.Module) -> None:
    """Drops the record of :func:`adapt_model`, once nothing of it is left in the model."""
    delattr(unwrap(model), _ATTRIBUTE)


# ---------------------------------------------------------------- plan: everything that can fail


def plan_adaptation(model: nn.Module, config: RLRRConfig) -> Adaptation:
    """What :func:`adapt_model` would do to ``model``, which is not changed; raises what :func:`adapt_model` raises."""
    if not isinstance(config, RLRRConfig):
        raise TypeError(f"config must be an RLRRConfig; got {type(config).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_fresh(model, modules)
    recipe = paper_recipe(model) if config.recipe == "paper" else None
    resolved = with_recipe(config, recipe)
    heads = find_heads(model, config)
    layers = _find_layers(modules, heads, resolved)
    _check_groups(modules, layers, resolved)
    _check_group_patterns(layers, config)
    switches = qkv_bias_switches(model, layers)
    _check_called(find_bypassed(model, [name for name in layers if name not in switches]))
    patched = [name for name, needed in switches.items() if needed]
    norms, tokens = _find_norms(modules, recipe)
    return Adaptation(config, tuple(layers), tuple(norms), tokens, tuple(heads), tuple(patched))


def _check_fresh(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    adapted = [name for name, module in modules.items() if isinstance(module, RLRRLinear | NormRescale)]
    if adapted:
        raise ValueError(
            f"model ({type(model).__name__}) is adapted already: {_some(adapted)}. "
            "Use it as it is, or merge_adapter(model) first"
        )
    if isinstance(model, nn.Linear):
        raise ValueError("model is itself an nn.Linear, which cannot be replaced in place; use RLRRLinear.from_linear")


def find_heads(model: nn.Module, config: RLRRConfig) -> list[str]:
    """Names of the modules of ``model`` that are trained as they are, by ``config.heads`` or what timm calls them.

    Raises:
        ValueError: a pattern of ``config.heads`` matches no module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
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
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()
        classifiers = classifier if isinstance(classifier, tuple | list) else (classifier,)
        found = [name for name, module in modules.items() if any(module is head for head in classifiers)]
    else:
        found = [name for name in _HEAD_NAMES if name in modules]
    return [name for name in found if next(modules[name].parameters(), None) is not None]


def _outermost(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def under(name: str, ancestors: Iterable[str]) -> bool:
    """Whether the module called ``name`` is one of ``ancestors`` or lies inside one."""
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def _find_layers(modules: dict[str, nn.Module], heads: list[str], config: RLRRConfig) -> list[str]:
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not under(name, heads)]
    layers = [name for name in linears if matches(name, config.include) and not matches(name, config.exclude)]
    if not layers:
        raise ValueError(
            f"no linear layer matches include={list(config.include)} and exclude={list(config.exclude)}; "
            + (f"the model's linear layers are {_some(linears)}" if linears else "the model has none beside its head")
        )
    idle = [p for p in config.include if not any(matches(name, (p,)) for name in linears)]
    if idle:
        raise ValueError(f"include patterns match no linear layer: {', '.join(idle)}; these are {_some(linears)}")
    strange = [name for name in layers if not _is_plain_linear(modules[name])]
    if strange:
        kinds = ", ".join(sorted({type(modules[name]).__name__ for name in strange}))
        raise ValueError(
            f"only a plain floating-point nn.Linear can be adapted; {_some(strange)} are of type {kinds}. "
            f"Leave them alone with {_exclude(strange)}"
        )
    return layers


def _is_plain_linear(module: nn.Linear) -> bool:
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__name__}" in _PLAIN_LINEARS
    weight = module._parameters.get("weight")  # a parametrised weight is a property instead
    return plain and weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _check_groups(modules: dict[str, nn.Module], layers: list[str], config: RLRRConfig) -> None:
    bad = {
        (groups, modules[name].out_features): name
        for name in reversed(layers)
        if modules[name].out_features % (groups := config.groups_of(name))
    }
    if bad:
        cases = "; ".join(f"{name}: G = {groups}, N = {rows}" for (groups, rows), name in reversed(bad.items()))
        raise ValueError(f"groups must divide the out_features of the layer: {cases}")


def _check_group_patterns(layers: list[str], config: RLRRConfig) -> None:
    patterns = config.groups if isinstance(config.groups, dict) else ()
    idle = [pattern for pattern in patterns if not any(matches(name, (pattern,)) for name in layers)]
    if idle:
        raise ValueError(f"groups patterns match no adapted layer: {', '.join(idle)}; these are {_some(layers)}")


def _check_called(bypassed: dict[str, str]) -> None:
    if not bypassed:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in bypassed.items():
        by_reason.setdefault(reason, []).append(name)
    cases = "; ".join(f"{_some(names)} ({reason})" for reason, names in by_reason.items())
    raise ValueError(
        f"the model bypasses the forward of {len(bypassed)} matched layers, so an adapter on them would train nothing: "
        f"{cases}. Leave them alone with {_exclude(bypassed)}"
    )


def _find_norms(modules: dict[str, nn.Module], recipe: Recipe | None) -> tuple[list[str], str | None]:
    if recipe is None:
        return [], None
    norms = [
        name
        for name, module in modules.items()
        if any(fnmatchcase(name, pattern) for pattern in recipe.norms) and not isinstance(module, nn.Identity)
    ]
    if not any("." in name for name in norms):
        raise ValueError(f"recipe='paper' needs block norms called {' or '.join(recipe.norms[:2])}; the model has none")
    tokens = recipe.tokens
    if tokens is not None:
        parent = modules.get(tokens.rpartition(".")[0])
        if tokens not in modules or not isinstance(getattr(parent, "proj", None), nn.Conv2d):
            raise ValueError(
                f"recipe='paper' needs a patch embedding with proj (Conv2d) and norm; got {type(parent).__name__}"
            )
    for name in [*norms, *([tokens] if tokens and not isinstance(modules[tokens], nn.Identity) else [])]:
        kind = type(modules[name])
        if f"{kind.__module__}.{kind.__name__}" not in PLAIN_NORMS:
            raise ValueError(f"recipe='paper' puts scale and shift on LayerNorms; {name} is {kind.__name__}")
    return norms, tokens


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _exclude(names: Iterable[str]) -> str:
    return f"exclude={list(dict.fromkeys(map(pattern_of, names)))}"


# ---------------------------------------------------------------- apply


def apply_adaptation(model: nn.Module, plan: Adaptation) -> None:
    """Carries out what :func:`plan_adaptation` planned for ``model``."""
    config = with_recipe(plan.config, paper_recipe(model) if plan.config.recipe else None)
    ssf_options = {"init": "identity" if config.init == "identity" else "paper", "dtype": config.scale_dtype}
    model.requires_grad_(False)

    def adapted(name: str, linear: nn.Module) -> nn.Module:
        return RLRRLinear.from_linear(
            linear,
            rank=config.rank,
            groups=config.groups_of(name),
            shift=config.shift,
            residual=config.residual,
            init=config.init,
            scale_dtype=config.scale_dtype,
        )

    def rescaled(name: str, norm: nn.Module) -> nn.Module:
        if isinstance(norm, nn.Identity):
            proj = model.get_submodule(name.rpartition(".")[0]).proj
            return ChannelRescale(proj.out_channels, device=proj.weight.device, **ssf_options)
        device = next(model.parameters()).device if norm.weight is None else norm.weight.device
        return NormRescale(norm, device=device, **ssf_options)

    replace_submodules(model, plan.layers, adapted)
    replace_submodules(model, [*plan.norms, *([plan.tokens] if plan.tokens else [])], rescaled)
    for name in plan.patched:
        model.get_submodule(name.rpartition(".")[0]).qkv_bias_separate = True
    for name in plan.heads:
        head = model.get_submodule(name).requires_grad_(True)
        if config.recipe == "paper":
            zero_linears(head)
    setattr(model, _ATTRIBUTE, plan)


def replace_submodules(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Puts ``make(name, module)`` in place of each named submodule.

    A module that has several names, itself or through a shared parent, is replaced by one module.
    """
    aliases: dict[int, list[str]] = {}
    for name in names:
        aliases.setdefault(id(model.get_submodule(name)), []).append(name)
    for same in aliases.values():
        old = model.get_submodule(same[0])
        made = make(same[0], old).train(old.training)
        for name in same:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)


@torch.no_grad()
def zero_linears(head: nn.Module) -> None:
    """Sets weight and bias of every ``nn.Linear`` in ``head`` to zero."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


# ---------------------------------------------------------------- what is trained


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by state-dict name: scales, shifts and SSF, without the head's."""
    adaptation, model = adaptation_of(model), unwrap(model)
    found = {}
    for name in adaptation.layers:
        layer = model.get_submodule(name)
        for key in ("scale_row", "scale_col", "shift"):
            if getattr(layer, key) is not None:
                found[f"{name}.{key}"] = getattr(layer, key)
    for name in [*adaptation.norms, *([adaptation.tokens] if adaptation.tokens else [])]:
        module = model.get_submodule(name)
        found[f"{name}.scale"], found[f"{name}.shift"] = module.scale, module.shift
    return found


def head_tensors(model: nn.Module, heads: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the heads by state-dict name, sharing memory with the model."""
    model = unwrap(model)
    return {
        f"{name}.{key}": tensor
        for name in heads
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()
    }


def planned_shapes(model: nn.Module, plan: Adaptation) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that :func:`apply_adaptation` would make trainable, head included."""
    return dict(_planned_shapes(model, plan))


def _planned_shapes(model: nn.Module, plan: Adaptation) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = with_recipe(plan.config, paper_recipe(model) if plan.config.recipe else None)
    for name in plan.layers:
        rows, cols = model.get_submodule(name).weight.shape
        yield f"{name}.scale_row", (rows, config.rank)
        yield f"{name}.scale_col", (config.groups_of(name), config.rank, cols)
        if config.shift:
            yield f"{name}.shift", (rows,)
    for name in [*plan.norms, *([plan.tokens] if plan.tokens else [])]:
        norm = model.get_submodule(name)
        identity = isinstance(norm, nn.Identity)
        parent = model.get_submodule(name.rpartition(".")[0])
        shape = (parent.proj.out_channels,) if identity else tuple(norm.normalized_shape)
        yield f"{name}.scale", shape
        yield f"{name}.shift", shape
    for name, tensor in head_tensors(model, plan.heads).items():
        yield name, tuple(tensor.shape)


def adapt_report(model: nn.Module) -> AdaptReport:
    """The report of an adapted model, as :func:`adapt_model` returned it.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation, model = adaptation_of(model), unwrap(model)
    layers = []
    for name in adaptation.layers:
        layer = model.get_submodule(name)
        shift = layer.shift is not None
        trained = layer.scale_row.numel() + layer.scale_col.numel() + (layer.shift.numel() if shift else 0)
        size = layer.out_features, layer.in_features
        layers.append(LayerReport(name, *size, layer.rank, layer.groups, shift, trained))
    head = {id(p): p for name in adaptation.heads for p in model.get_submodule(name).parameters()}
    adapter = {id(p): p for p in adapter_parameters(model).values()}
    return AdaptReport(
        model=type(model).__name__,
        layers=tuple(layers),
        norms=adaptation.norms,
        tokens=adaptation.tokens,
        heads=adaptation.heads,
        patched=adaptation.patched,
        adapter=sum(p.numel() for p in adapter.values()),
        head=sum(p.numel() for p in head.values()),
        total=sum(p.numel() for p in model.parameters()),
    )
