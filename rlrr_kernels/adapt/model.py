"""``adapt_model``: plans what a configuration means for a model, checks all of it, then changes the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rlrr_kernels.adapt.bypass import find_bypassed, qkv_bias_switches
from rlrr_kernels.adapt.config import WITH_BIAS, RLRRConfig, matches
from rlrr_kernels.adapt.find import exclude_hint, find_convs, find_heads, find_linears, some
from rlrr_kernels.adapt.modules import (
    check_not_sharded,
    class_name,
    find_module,
    named_modules,
    named_tensors,
    replace_submodules,
    unwrap,
    wrappers,
)
from rlrr_kernels.adapt.recipe import Recipe, paper_recipe, with_recipe
from rlrr_kernels.adapt.report import AdaptReport, LayerReport
from rlrr_kernels.nn.additive import AdditiveLinear
from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.conv import RLRRConv2d
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.nn.rescaled import REPLACED_FORWARD, Rescaled, has_replaced_forward
from rlrr_kernels.ops.conv import matrix_shape

PLAIN_NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}

_ATTRIBUTE = "rlrr_adaptation"
_ROLE = "rlrr_role"
"""On modules whose class does not say what they are to the adaptation: ``head``, ``tokens``, ``patched``."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What is done to a model, by name; see :func:`plan_adaptation` and :func:`adaptation_of`.

    Attributes:
        config: as given. layers: adapted linear layers and convolutions. norms: norms with SSF. tokens: the SSF of the
        patch tokens or None. heads: modules trained as they are. patched: layers whose parent's ``qkv_bias_separate``
        was switched on.
    """

    config: RLRRConfig
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    tokens: str | None
    heads: tuple[str, ...]
    patched: tuple[str, ...]


def adapt_model(model: nn.Module, config: RLRRConfig | None = None) -> AdaptReport:
    """Puts an :class:`rlrr_kernels.RLRRLinear` over every matched ``nn.Linear`` of ``model``, in place.

    So too an :class:`rlrr_kernels.RLRRConv2d` over every ``nn.Conv2d`` that ``config.convs`` matches. The head stays as
    it is and is trained; everything else is frozen. All checks come before the first change: a model for which this
    raises is untouched. Works on the meta device. Batch norms are frozen in their parameters; a loop of your own has to
    call their ``eval()`` after ``model.train()``, as ``rlrr finetune`` does, or their statistics, which no adapter
    holds, move.

    Args:
        model: any ``nn.Module``: timm's ViT, DeiT, DINOv2, Swin, ConvNeXt, ...
        config: what to adapt and how; None is ``RLRRConfig()``: every linear layer but the head's, rank 1.

    Returns:
        Layers, groups and counts of trained parameters; ``print`` it.

    Raises:
        TypeError: ``model`` is no module or ``config`` no :class:`RLRRConfig`.
        ValueError: the model is adapted already; no layer, head or group pattern matches; G does not divide N; the
            forward of a matched layer is bypassed (named); a matched layer is no plain ``nn.Linear`` or ``nn.Conv2d``,
            or its ``forward`` was replaced (accelerate's hooks); the recipe is not defined for the model; the model is
            wrapped by DDP or FSDP, which would not know the new parameters.
    """
    plain = unwrap(model)
    check_not_distributed(model)
    plan = plan_adaptation(plain, RLRRConfig() if config is None else config)
    apply_adaptation(plain, plan)
    return adapt_report(plain)


def is_adapted(model: nn.Module) -> bool:
    """Whether :func:`adapt_model` was applied to ``model`` and not merged since."""
    return getattr(unwrap(model), _ATTRIBUTE, None) is not None


def adaptation_of(model: nn.Module) -> Adaptation:
    """What :func:`adapt_model` did to ``model``, by the names that its modules have now.

    A pruned or renamed block takes its layers along: they are known by what they are, not by what they were called.

    Raises:
        ValueError: the model is not adapted.
    """
    record = getattr(unwrap(model), _ATTRIBUTE, None)
    if record is None:
        raise ValueError(f"model ({type(model).__name__}) is not adapted; call adapt_model or load_adapter first")
    found: dict[str, list[str]] = {"layer": [], "norm": [], "tokens": [], "head": [], "patched": []}
    for name, module in named_modules(model):
        role = vars(module).get(_ROLE)
        if isinstance(module, Rescaled):
            found["layer"].append(name)
        elif role is None and isinstance(module, NormRescale | ChannelRescale):
            found["norm"].append(name)
        if role is not None:
            found[role].append(name)
    return Adaptation(
        config=record.config,
        layers=tuple(found["layer"]),
        norms=tuple(found["norm"]),
        tokens=next(iter(found["tokens"]), None),
        heads=tuple(found["head"] or _new_heads(model, record.heads)),
        patched=tuple(found["patched"]),
    )


def _new_heads(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that call a trained module again, where ``reset_classifier`` has replaced the heads."""
    modules = dict(named_modules(model))
    return [
        name
        for name in names
        if name in modules
        and any(p.requires_grad for p in modules[name].parameters())
        and not any(isinstance(module, Rescaled) for module in modules[name].modules())
    ]


def forget_adaptation(model: nn.Module) -> None:
    """Drops the record of :func:`adapt_model`, once nothing of it is left in the model."""
    for module in unwrap(model).modules():
        vars(module).pop(_ROLE, None)
    delattr(unwrap(model), _ATTRIBUTE)


# ---------------------------------------------------------------- plan: everything that can fail


def plan_adaptation(model: nn.Module, config: RLRRConfig) -> Adaptation:
    """What :func:`adapt_model` would do to ``model``, which is not changed; raises what :func:`adapt_model` raises."""
    if not isinstance(config, RLRRConfig):
        raise TypeError(f"config must be an RLRRConfig; got {type(config).__name__}")
    modules = dict(named_modules(model))
    _check_fresh(model, modules)
    recipe = paper_recipe(model) if config.recipe == "paper" else None
    resolved = with_recipe(config, recipe)
    heads = find_heads(model, config)
    convs = find_convs(modules, heads, resolved)
    linears = find_linears(modules, heads, resolved, optional=bool(convs) and config.include is None)
    _check_groups(modules, linears, resolved)
    _check_group_patterns(linears, config)
    found = {*convs, *linears}
    layers = [name for name in modules if name in found]
    _check_tied(modules, layers, heads)
    switches = qkv_bias_switches(model, layers)
    _check_called(find_bypassed(model, [name for name in layers if name not in switches]))
    patched = [name for name, needed in switches.items() if needed]
    norms, tokens = _find_norms(modules, recipe)
    check_forwards(modules, [*norms, *([tokens] if tokens else [])])
    return Adaptation(config, tuple(layers), tuple(norms), tokens, tuple(heads), tuple(patched))


def check_not_distributed(model: nn.Module) -> None:
    """Raises ``ValueError`` where DDP or FSDP wraps the model or a part: they know the parameters of that moment."""
    found = wrappers(model, ("DistributedDataParallel", "FullyShardedDataParallel"))
    if found:
        raise ValueError(
            f"{some(found)} is wrapped by DistributedDataParallel or FullyShardedDataParallel, which would not "
            "exchange new parameters; adapt the model first, then wrap it"
        )


def check_forwards(modules: dict[str, nn.Module], names: Iterable[str]) -> None:
    """Raises ``ValueError`` where a forward was replaced on the module itself: another module would not have it."""
    found = [name for name in names if has_replaced_forward(modules[name])]
    if found:
        raise ValueError(f"{some(found)} cannot be replaced: {REPLACED_FORWARD}")


def _check_fresh(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    adapted = [name for name, module in modules.items() if isinstance(module, Rescaled | NormRescale)]
    if adapted:
        raise ValueError(
            f"model ({type(model).__name__}) is adapted already: {some(adapted)}. "
            "Use it as it is, or merge_adapter(model) first"
        )
    if isinstance(model, nn.Linear):
        raise ValueError("model is itself an nn.Linear, which cannot be replaced in place; use RLRRLinear.from_linear")


def _check_groups(modules: Mapping[str, Any], layers: list[str], config: RLRRConfig) -> None:
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
        raise ValueError(f"groups patterns match no adapted layer: {', '.join(idle)}; these are {some(layers)}")


def _check_tied(modules: Mapping[str, nn.Module], layers: list[str], heads: Iterable[str]) -> None:
    """A tensor is either frozen in a layer or trained in a head."""
    frozen = {id(parameter): name for name in layers for parameter in modules[name].parameters()}
    for head in heads:
        tied = next((frozen[id(p)] for p in modules[head].parameters() if id(p) in frozen), None)
        if tied is not None:
            raise ValueError(
                f"{head} is to be trained, but shares a weight with {tied}, which is to be adapted: leave that one "
                f"alone with {exclude_hint([tied])}, or untie them"
            )


def _check_called(bypassed: dict[str, str]) -> None:
    if not bypassed:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in bypassed.items():
        by_reason.setdefault(reason, []).append(name)
    cases = "; ".join(f"{some(names)} ({reason})" for reason, names in by_reason.items())
    raise ValueError(
        f"the model bypasses the forward of {len(bypassed)} matched layers, so an adapter on them would train nothing: "
        f"{cases}. Leave them alone with {exclude_hint(bypassed)}"
    )


def _find_norms(modules: Mapping[str, Any], recipe: Recipe | None) -> tuple[list[str], str | None]:
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
        embedding = tokens.rpartition(".")[0]
        if tokens not in modules or not isinstance(modules.get(f"{embedding}.proj"), nn.Conv2d):
            raise ValueError(
                f"recipe='paper' needs a patch embedding with proj (Conv2d) and norm; got "
                f"{type(modules.get(embedding)).__name__}"
            )
    for name in [*norms, *([tokens] if tokens and not isinstance(modules[tokens], nn.Identity) else [])]:
        kind = type(modules[name])
        if f"{kind.__module__}.{kind.__name__}" not in PLAIN_NORMS:
            raise ValueError(f"recipe='paper' puts scale and shift on LayerNorms; {name} is {kind.__name__}")
        shape = tuple(modules[name].normalized_shape)
        if len(shape) != 1:
            raise ValueError(
                f"recipe='paper' puts scale and shift on norms of one dimension; {name} has normalized_shape {shape}"
            )
    return norms, tokens


# ---------------------------------------------------------------- apply


def apply_adaptation(model: nn.Module, plan: Adaptation) -> None:
    """Carries out what :func:`plan_adaptation` planned for ``model``."""
    config = with_recipe(plan.config, paper_recipe(model) if plan.config.recipe else None)
    ssf_init = "identity" if config.init == "identity" else "paper"
    ssf_options: dict[str, Any] = {"init": ssf_init, "dtype": config.scale_dtype}
    model.requires_grad_(False)

    prefix_tokens = getattr(model, "num_prefix_tokens", 0)  # timm's name; models without tokens have none
    layer_options: dict[str, Any] = {name: getattr(config, name) for name in ("rank", "sides", "init", "scale_dtype")}

    def adapted(name: str, layer: Any) -> nn.Module:
        options = layer_options | {"shift": has_shift(layer, config)}
        if isinstance(layer, nn.Conv2d):
            return RLRRConv2d.from_conv(layer, layout=config.conv_layout, residual=config.residual, **options)
        options["groups"] = config.groups_of(name)
        if config.form == "additive":
            return AdditiveLinear(layer, **options)
        options |= {"scale_grad_rows": config.scale_grad_rows, "prefix_tokens": prefix_tokens}
        return RLRRLinear.from_linear(layer, residual=config.residual, **options)

    def rescaled(name: str, norm: Any) -> nn.Module:
        if isinstance(norm, nn.Identity):
            proj = find_module(model, f"{name.rpartition('.')[0]}.proj")
            return ChannelRescale(proj.out_channels, device=proj.weight.device, **ssf_options)
        device = next(model.parameters()).device if norm.weight is None else norm.weight.device
        return NormRescale(norm, device=device, **ssf_options)

    replace_submodules(model, plan.layers, adapted)
    replace_submodules(model, [*plan.norms, *([plan.tokens] if plan.tokens else [])], rescaled)
    for name in plan.patched:
        find_module(model, name.rpartition(".")[0]).qkv_bias_separate = True
    for name in plan.heads:
        head = find_module(model, name).requires_grad_(True)
        if config.recipe == "paper":
            zero_linears(head)
    roles = {"tokens": (plan.tokens,) if plan.tokens else (), "head": plan.heads, "patched": plan.patched}
    for role, names in roles.items():
        for name in names:
            setattr(find_module(model, name), _ROLE, role)
    setattr(model, _ATTRIBUTE, plan)


def has_shift(layer: nn.Module, config: RLRRConfig) -> bool:
    """Whether a shift is trained on ``layer``, an ``nn.Linear`` or ``nn.Conv2d``."""
    # A batch norm follows a convolution without bias: one that it gained would keep plain timm from loading it.
    if layer.bias is None and (isinstance(layer, nn.Conv2d) or config.shift == WITH_BIAS):
        return False
    return config.shift is not False


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
    adaptation, modules = adaptation_of(model), dict(named_modules(model))
    found = {}
    for name in adaptation.layers:
        layer = modules[name]
        for key in ("scale_row", "scale_col", "shift"):
            if getattr(layer, key) is not None:
                found[f"{name}.{key}"] = getattr(layer, key)
    for name in [*adaptation.norms, *([adaptation.tokens] if adaptation.tokens else [])]:
        module = modules[name]
        found[f"{name}.scale"], found[f"{name}.shift"] = module.scale, module.shift
    return found


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same, where what is trained must be these parameters themselves.

    Raises:
        ValueError: one is pruned or parametrized.
    """
    found = adapter_parameters(model)
    for name in found:
        module, _, key = name.rpartition(".")
        owner = find_module(model, module)
        if key not in owner._parameters and (f"{key}_orig" in owner._parameters or is_parametrized(owner, key)):
            raise ValueError(
                f"{name} is computed from another tensor, by pruning or a parametrization, for which an adapter has no "
                "place; torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations ends that"
            )
    return found


def head_tensors(model: nn.Module, heads: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the heads by state-dict name, sharing memory with the model."""
    return {key: tensor for name in heads for key, tensor in named_tensors(find_module(model, name), name)}


def planned_shapes(model: nn.Module, plan: Adaptation) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that :func:`apply_adaptation` would make trainable, head included."""
    return dict(_planned_shapes(model, plan))


def _planned_shapes(model: nn.Module, plan: Adaptation) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = with_recipe(plan.config, paper_recipe(model) if plan.config.recipe else None)
    modules: dict[str, Any] = dict(named_modules(model))
    for name in plan.layers:
        layer = modules[name]
        conv = isinstance(layer, nn.Conv2d)
        rows, cols = matrix_shape(layer.weight.shape, config.conv_layout) if conv else layer.weight.shape
        if config.sides != "right":
            yield f"{name}.scale_row", (rows, config.rank)
        if config.sides != "left":
            yield f"{name}.scale_col", (1 if conv else config.groups_of(name), config.rank, cols)
        if has_shift(layer, config):
            yield f"{name}.shift", (layer.weight.shape[0],)
    for name in [*plan.norms, *([plan.tokens] if plan.tokens else [])]:
        norm = modules[name]
        identity = isinstance(norm, nn.Identity)
        projection = f"{name.rpartition('.')[0]}.proj"
        shape = (modules[projection].out_channels,) if identity else tuple(norm.normalized_shape)
        yield f"{name}.scale", shape
        yield f"{name}.shift", shape
    for name, tensor in head_tensors(model, plan.heads).items():
        yield name, tuple(tensor.shape)


def adapt_report(model: nn.Module) -> AdaptReport:
    """The report of an adapted model, as :func:`adapt_model` returned it.

    Raises:
        ValueError: the model is not adapted, or its weights are in pieces (FSDP1, outside ``summon_full_params``).
    """
    if any(p.dim() == 1 for name, p in adapter_parameters(model).items() if name.endswith(("scale_row", "scale_col"))):
        check_not_sharded(model)
    adaptation, model = adaptation_of(model), unwrap(model)
    modules: dict[str, Any] = dict(named_modules(model))
    layers = []
    for name in adaptation.layers:
        layer = modules[name]
        trained = sum(p.numel() for p in (layer.scale_row, layer.scale_col, layer.shift) if p is not None)
        scale_row, scale_col = layer.scales()
        groups, rank, cols = scale_col.shape
        layers.append(LayerReport(name, scale_row.shape[0], cols, rank, groups, layer.shift is not None, trained))
    head = {id(p): p for name in adaptation.heads for p in modules[name].parameters()}
    adapter = {id(p): p for p in adapter_parameters(model).values()}
    return AdaptReport(
        model=class_name(model),
        formula=adaptation.config.formula,
        layers=tuple(layers),
        norms=adaptation.norms,
        tokens=adaptation.tokens,
        heads=adaptation.heads,
        patched=adaptation.patched,
        adapter=sum(p.numel() for p in adapter.values()),
        head=sum(p.numel() for p in head.values()),
        total=sum(p.numel() for p in model.parameters()),
    )
