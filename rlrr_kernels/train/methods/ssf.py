"""SSF (Lian et al., NeurIPS 2022) as a method of its own: a trained scale and shift after every operation."""

from __future__ import annotations

import dataclasses

from torch import nn

from rlrr_kernels.adapt.bypass import find_bypassed
from rlrr_kernels.adapt.find import some, under
from rlrr_kernels.adapt.model import PLAIN_NORMS
from rlrr_kernels.adapt.modules import replace_submodules
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.nn.output_rescale import OutputRescale, unfoldable_reason


@dataclasses.dataclass(frozen=True)
class SSFPlaces:
    """Names of the modules that get a scale and shift: ``outputs`` of linear layers and convolutions, and ``norms``."""

    outputs: tuple[str, ...]
    norms: tuple[str, ...]


def find_places(model: nn.Module, layers: tuple[str, ...], heads: tuple[str, ...]) -> SSFPlaces:
    """The operations of ``model`` that SSF follows: ``layers``, every Conv2d and every LayerNorm, heads left out.

    Norms over anything but the last dimension stay as they are.

    Raises:
        ValueError: the forward of one of them is bypassed, or its scale could not be folded into it (named).
    """
    modules = {name: module for name, module in model.named_modules() if not under(name, heads)}
    convs = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    norms = [
        name
        for name, module in modules.items()
        if f"{type(module).__module__}.{type(module).__name__}" in PLAIN_NORMS and len(module.normalized_shape) == 1
    ]
    bypassed = find_bypassed(model, [*convs, *norms])
    if bypassed:
        raise ValueError(
            f"method ssf cannot rescale what the model computes without calling it: {'; '.join(bypassed.values())}"
        )
    unfit = {name: reason for name in convs if (reason := unfoldable_reason(modules[name])) is not None}
    if unfit:
        raise ValueError(
            f"method ssf cannot fold its scales into {some(unfit)}: {'; '.join(dict.fromkeys(unfit.values()))}"
        )
    return SSFPlaces((*layers, *convs), tuple(norms))


def put_ssf(model: nn.Module, places: SSFPlaces) -> None:
    """Puts γ ~ N(1, 0.02) and β ~ N(0, 0.02) after every operation of ``places``, in place."""
    device = next(model.parameters()).device
    replace_submodules(model, places.outputs, lambda _, layer: OutputRescale(layer))
    replace_submodules(model, places.norms, lambda _, norm: NormRescale(norm, device=device))


def fold_ssf(model: nn.Module, places: SSFPlaces) -> None:
    """Folds every scale and shift into the operation before it, in place; a layer without bias gains one."""
    replace_submodules(model, places.outputs, lambda _, rescaled: rescaled.fold())
    replace_submodules(model, places.norms, lambda _, norm: norm.to_layer_norm().requires_grad_(False))
