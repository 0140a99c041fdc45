"""``add_weighted_adapter``: the weighted sum of adapters as one more adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from rlrr_kernels.adapt.arithmetic import combine_layer
from rlrr_kernels.adapt.config import WITH_BIAS
from rlrr_kernels.peft.layer import RLRRPeftLinear
from rlrr_kernels.peft.targets import exact_pattern, exactly


@torch.inference_mode(False)  # its tensors could not be trained
@torch.no_grad()
def add_weighted(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See :meth:`rlrr_kernels.peft.RLRRPeftModel.add_weighted_adapter`; all is checked before the first change."""
    _check(tuner, adapters, weights, adapter_name, combination_type)
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    layers = {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, RLRRPeftLinear) and any(adapter in module.residual for adapter in adapters)
    }
    made = {}
    for name, layer in layers.items():
        terms = [(layer.tensors(adapter), w) for adapter, w in zip(adapters, weights, strict=True)]
        present, their = zip(*[(term, w) for term, w in terms if term], strict=True)
        made[name] = combine_layer(present, their, residual=configs[0].residual)
    ranks = {name: t["scale_row"].shape[1] if "scale_row" in t else 1 for name, t in made.items()}
    groups = {name: t["scale_col"].shape[0] if "scale_col" in t else 1 for name, t in made.items()}
    tuner.peft_config[adapter_name] = dataclasses.replace(
        configs[0],
        r=max(ranks.values()),
        groups=1,
        shift=next((kind for kind in (True, WITH_BIAS) if any(config.shift == kind for config in configs)), False),
        target_modules=exactly(layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=exact_pattern({name: rank for name, rank in ranks.items() if rank != max(ranks.values())}),
        groups_pattern=exact_pattern({name: count for name, count in groups.items() if count != 1}),
        inference_mode=True,
    )
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        for name, tensors in made.items():
            for part, tensor in layers[name].tensors(adapter_name).items():
                tensor.copy_(tensors[part]) if part in tensors else tensor.zero_()
                tensor.requires_grad_(False)
    except BaseException:
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        del tuner.peft_config[adapter_name]
        raise


def _check(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    if combination_type != "cat":
        raise ValueError(
            f"combination_type must be 'cat', which is exact for RLRR; got {combination_type!r}, which approximates"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"there must be one weight for each adapter; got {list(adapters)} and {list(weights)}")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Adapter {', '.join(unknown)} does not exist; there are {', '.join(tuner.peft_config)}")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name must be new; there is an adapter {adapter_name!r} already")
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    for field in ("residual", "sides"):
        if len({getattr(config, field) for config in configs}) > 1:
            raise ValueError(f"adapters with different {field} have no sum: {', '.join(adapters)}")
    saved = [name for name, config in zip(adapters, configs, strict=True) if config.modules_to_save]
    if saved:
        raise ValueError(f"modules_to_save have no sum, they replace modules: {', '.join(saved)} train some")
