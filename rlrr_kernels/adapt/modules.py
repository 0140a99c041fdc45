"""A model's modules and tensors by the names they have without wrappers, and how a module is put in another's place.

``torch.compile``, activation checkpointing, FSDP and DDP wrap a module in one of their own, at any depth: every name
below gains a part such as ``_orig_mod``. Here wrappers are looked through, so names are those of the plain model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rlrr_kernels.nn.channel_rescale import ChannelRescale
from rlrr_kernels.nn.multi.modules import Multi
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.nn.output_rescale import OutputRescale
from rlrr_kernels.nn.rescaled import Rescaled

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch's wrappers call the module inside."""

_AROUND = nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel
"""Wrappers that call it ``module``, as a model may call one of its own."""

_FUSING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that ``timm.utils.reparameterize_model`` and its like call, to compute new weights from those of layers."""

_OWN = "_own"
"""Attribute of an adapted module: names of what it has of its own, and what waits for the next plain module."""

_PLACES = "_parameters", "_buffers", "_modules"

_ADAPTED = (Rescaled, NormRescale, ChannelRescale, OutputRescale, Multi)


def _wrapped_key(module: nn.Module) -> str | None:
    for key in _WRAPPED:
        if key in module._modules:
            return key
    return "module" if isinstance(module, _AROUND) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile``, activation checkpointing, FSDP, DDP and averaging."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    while (key := _wrapped_key(model)) is not None:
        model = model.get_submodule(key)
    return model


def plain_name(name: str) -> str:
    """``name`` of a state dict without the parts that wrappers add, but DDP's ``module``, which may be the model's."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules(remove_duplicate=False)``, without wrappers: a module stands for what wraps it."""
    model = unwrap(model)
    yield prefix, model
    for key, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{key}" if prefix else key)


def find_module(model: nn.Module, name: str) -> Any:
    """The module that :func:`named_modules` calls ``name``; which attributes it has, the caller knows.

    Raises:
        AttributeError: there is none.
    """
    module = unwrap(model)
    for key in name.split(".") if name else ():
        child = module._modules.get(key)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {name}")
        module = unwrap(child)
    return module


def named_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers as ``model.state_dict(keep_vars=True)`` names them, without wrappers."""
    for name, module in named_modules(model, prefix):
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                yield (f"{name}.{key}" if name else key), tensor


def wrappers(model: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    """Names of the modules in ``model`` that are wrapped by a class whose name is among ``kinds``."""
    return [name or "the model" for name, module in model.named_modules() if type(module).__name__ in kinds]


def class_name(module: nn.Module) -> str:
    """What the class of ``module`` is called; FSDP2 gives a module that it shards one of its own (``FSDP...``)."""
    kind, bases = type(module), type(module).__bases__
    return (bases[1] if bases[0].__name__ == "FSDPModule" and len(bases) == 2 else kind).__name__


def check_not_sharded(model: nn.Module) -> None:
    """Raises ``ValueError`` where FSDP1 keeps the parameters of the model or a part in pieces, not as what they are."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel" and module.training_state.name != "SUMMON_FULL_PARAMS":
            raise ValueError(
                f"the weights of {name or 'the model'} are sharded by FullyShardedDataParallel; do this inside "
                "`with FullyShardedDataParallel.summon_full_params(model):`, in every process"
            )


# ---------------------------------------------------------------- replacing


def replace_submodules(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Puts ``make(name, module)`` in place of each named submodule, inside its wrappers, with its hooks and with
    what others set on it.

    A module that has several names, itself or through a shared parent, is replaced by one module. Modules around that
    compute new weights from those of the layers inside (timm's ``fuse`` and ``reparameterize``) refuse to while what
    they would read is adapted.
    """
    modules = dict(named_modules(model))
    aliases: dict[int, list[str]] = {}
    for name in names:
        aliases.setdefault(id(modules[name]), []).append(name)
    gained = []
    for same in aliases.values():
        old = modules[same[0]]
        had_bias = getattr(old, "bias", None) is not None
        made = make(same[0], old).train(old.training)
        _move_hooks(old, made)
        _move_attributes(old, made)
        for name in same:
            parent, _, child = name.rpartition(".")
            _put(modules[parent], child, made)
            modules[name] = made  # the parent of what others put inside a layer, which may be replaced, too
        if not had_bias and not isinstance(made, _ADAPTED) and getattr(made, "bias", None) is not None:
            gained += same
    _guard_fusing(modules, [name for same in aliases.values() for name in same], gained)


def _put(parent: nn.Module, child: str, module: nn.Module) -> None:
    holder: Any = parent
    key = child
    while (inner := _wrapped_key(holder._modules[key])) is not None:
        holder, key = holder._modules[key], inner
    setattr(holder, key, module)
    if key == "_orig_mod":
        holder._initialize()  # torch.compile's wrapper calls what it was made for


def _move_attributes(old: nn.Module, made: nn.Module) -> None:
    """Gives ``made`` what others set on ``old``, before or after it was adapted: attributes, tensors, submodules.

    Each is put where it was: a module that hides in an attribute, so as to be no submodule, becomes none. What an
    adapted layer has of its own stays with it; an attribute of a plain one that is called like one of these waits for
    the next plain one.
    """
    own, waiting = _names_in(nn.Module()), dict[str, Any]()
    if isinstance(old, _ADAPTED):  # without a record of one that was made by hand
        own, waiting = vars(old).get(_OWN, (_names_in(old), waiting))
    own_of_made = _names_in(made)
    moved, waits = [], {}
    for place in (None, *_PLACES):
        source, target = (vars(module) if place is None else vars(module)[place] for module in (old, made))
        given = {name: value for name, value in source.items() if name not in own and name != _OWN}
        for name, value in (waiting | given if place is None else given).items():
            if not hasattr(made, name):
                target[name] = value
                moved.append(name)
            elif place is None:
                waits[name] = value
    made._non_persistent_buffers_set.update(old._non_persistent_buffers_set.intersection(moved))
    if isinstance(made, _ADAPTED):
        vars(made)[_OWN] = own_of_made, waits


def _names_in(module: nn.Module) -> set[str]:
    return {*vars(module)}.union(*(vars(module)[place] for place in _PLACES))


def _move_hooks(old: nn.Module, made: nn.Module) -> None:
    """Gives ``made`` the hooks of ``old``: the same dictionaries, so that their handles still remove them."""
    for name, empty in vars(nn.Module()).items():
        if "hook" in name and name in vars(old):
            setattr(made, name, getattr(old, name))
            setattr(old, name, empty)
    hook: Any
    for hook in made._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(made)


class _Refusal:
    """Stands in for a method that must not be called; ``lasting`` after the adapter is merged, too."""

    def __init__(self, message: str, lasting: bool) -> None:
        self.message, self.lasting = message, lasting

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(self.message)


def _guard_fusing(modules: dict[str, nn.Module], names: list[str], gained: list[str]) -> None:
    """Has the fusing methods of all modules around ``names`` refuse where they would compute something else."""
    around = {name[:dot] for name in names for dot, letter in enumerate(name) if letter == "."} | {""}
    for name in around:
        module = modules[name]
        for method in _FUSING:
            if not callable(getattr(type(module), method, None)):
                continue
            called, present = f"{name or type(module).__name__}.{method}()", vars(module).get(method)
            without_bias = [layer for layer in gained if not name or layer.startswith(f"{name}.")]
            if without_bias:
                message = (
                    f"{called} would lose the bias that {without_bias[0]} has gained from a trained shift; "
                    "RLRRConfig(shift='with_bias') trains none where a layer has no bias"
                )
                setattr(module, method, _Refusal(message, lasting=True))
            elif isinstance(present, _Refusal) and present.lasting:
                continue
            elif any(isinstance(inside, _ADAPTED) for inside in module.modules()):
                message = f"{called} would read the frozen weights and lose the adapter; merge_adapter(model) first"
                setattr(module, method, _Refusal(message, lasting=False))
            elif isinstance(present, _Refusal):
                delattr(module, method)
