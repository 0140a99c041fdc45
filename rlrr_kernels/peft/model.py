"""``RLRRPeftModel``: the tuner that PEFT builds around a model for an :class:`rlrr_kernels.peft.RLRRPeftConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from rlrr_kernels.adapt.bypass import find_bypassed, qkv_bias_switches
from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import under
from rlrr_kernels.nn.rescaled import unfit_reason
from rlrr_kernels.peft.layer import BASE, RLRRPeftLinear
from rlrr_kernels.peft.registry import expand_all_linear
from rlrr_kernels.peft.targets import default_groups, default_targets, end_of_name, exactly, linears
from rlrr_kernels.peft.weighted import add_weighted

_SHOWN = 4


class RLRRPeftModel(BaseTuner):
    """A model whose targeted ``nn.Linear`` are :class:`RLRRPeftLinear`; made by ``peft.get_peft_model``."""

    prefix = "rlrr_"
    tuner_layer_cls = RLRRPeftLinear
    target_module_mapping = {}  # noqa: RUF012  (as PEFT declares it)  Found in the model: _prepare_adapter_config

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        targets = peft_config.target_modules
        if targets is None:
            if peft_config.groups is None:
                peft_config.groups_pattern = default_groups(self.model) | peft_config.groups_pattern
            peft_config.target_modules = default_targets(self.model, ends=peft_config.layers_to_transform is not None)
        elif isinstance(targets, str) and targets.lower() == "all-linear":
            if isinstance(self.model, PreTrainedModel):  # whose output layer PEFT leaves out
                expand_all_linear(peft_config, self.model)
                peft_config.target_modules = exactly(sorted(peft_config.target_modules))
            else:
                peft_config.target_modules = exactly(linears(self.model))
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuses what cannot be adapted before the first layer is replaced.

        Raises:
            ValueError: a targeted layer is no plain ``nn.Linear``, or its parent reads its weight instead of calling
                it, or the groups do not divide its ``out_features``; the first few are named.
        """
        targets: dict[str, Any] = {}
        inside: list[str] = []
        for name, module in model.named_modules():
            if name and not under(name, inside) and self._check_target_module_exists(peft_config, name):
                targets[name] = module
            if isinstance(module, RLRRPeftLinear):
                inside.append(name)
        fresh = [name for name, module in targets.items() if not isinstance(module, RLRRPeftLinear)]
        reasons = {name: reason for name in fresh if (reason := _unfit_reason(targets[name]))}
        plain = [name for name in fresh if name not in reasons]
        reasons |= find_bypassed(model, set(plain) - set(qkv_bias_switches(model, plain)))
        if reasons:
            cases = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN])
            raise ValueError(
                f"{cases}. exclude_modules={sorted({end_of_name(name) for name in reasons})} leaves them alone"
            )
        for name, module in targets.items():
            rows, groups = module.out_features, self._adaptation(peft_config, name).groups_of("")
            if rows % groups:
                raise ValueError(f"{name}: groups must divide out_features = {rows}; got {groups}")

    @staticmethod
    def _adaptation(peft_config: Any, name: str) -> RLRRConfig:
        """What the layer called ``name`` gets."""
        changes = {}
        for field, patterns in (("rank", peft_config.rank_pattern), ("groups", peft_config.groups_pattern)):
            key = get_pattern_key(list(patterns), name)
            if key in patterns:
                changes[field] = patterns[key]
        return peft_config.adaptation(**changes)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adaptation = self._adaptation(peft_config, current_key)
        options = {"random_shift": peft_config.init_weights is False, "inference_mode": peft_config.inference_mode}
        if isinstance(target, RLRRPeftLinear):
            target.update_layer(adapter_name, adaptation, **options)
            return
        if qkv_bias_switches(self.model, [current_key]).get(current_key):
            parent.qkv_bias_separate = True  # else timm multiplies by the weight without calling the layer
        layer = RLRRPeftLinear(target, adapter_name, adaptation, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also hands on the weight of child, which has none where it is a saved head of several layers.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` of the model's forward to the layers."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, RLRRPeftLinear)]
        unknown = set(names) - {BASE}.union(*(layer.residual for layer in layers))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) else list(names)
        in_encoder = {id(module) for module in self._encoder_modules()}  # it sees each input once, whatever the beams
        handles = []
        for module in self.modules():
            if isinstance(module, RLRRPeftLinear | AuxiliaryTrainingWrapper):
                given = names if id(module) in in_encoder else repeated
                handles.append(module.register_forward_pre_hook(partial(_with_names, given), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Adds an adapter that changes the weights by Σ w ΔW of others: exact, with the sum of their ranks.

        It is not active and not trained until ``set_adapter``.

        Args:
            adapters: names of adapters that scale the same sides.
            weights: w of each; they sum to 1 where the adapters have no residual.
            adapter_name: of the new one.
            combination_type: ``cat``; LoRA's other types approximate what this one computes.

        Raises:
            ValueError: an adapter is unknown or trains modules beside its layers, the new name is taken, the
                numbers of names and weights differ, the ranks sum to more than 64, or the sum has no meaning.
        """
        add_weighted(self, adapters, weights, adapter_name, combination_type)

    def _encoder_modules(self) -> Iterator[nn.Module]:
        get_encoder = getattr(self.model, "get_encoder", None)
        encoder = get_encoder() if callable(get_encoder) else None
        return iter(()) if encoder is None or encoder is self.model else encoder.modules()


def _unfit_reason(target: nn.Module) -> str | None:
    """Why ``target`` is no layer that can be adapted, or None."""
    if isinstance(target, nn.Linear):
        return unfit_reason(target)
    return (
        f"Target module {type(target).__name__} is not supported: RLRR adapts torch.nn.Linear. Name layers by more of "
        "their path (attn.proj, not proj)"
    )


def _with_names(names: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}
