"""Where a task's tensors come from: adapter folders, PEFT's, or memory; checked against the backbone before use."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import find_heads, some
from rlrr_kernels.adapt.folder.files import TENSORS, read_adapter
from rlrr_kernels.adapt.folder.save_load import check_values, differences, misfit, trained_tensors, warn_other_weights
from rlrr_kernels.adapt.model import Adaptation, adaptation_of, apply_adaptation, plan_adaptation, planned_shapes
from rlrr_kernels.adapt.modules import find_module, named_modules, named_tensors
from rlrr_kernels.nn.multi.batch import Form, TaskTensors

PEFT_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter in memory.

    Attributes:
        config: how a backbone is adapted for it.
        tensors: scales, shifts, SSF and head by state-dict name, as ``adapter.safetensors`` holds them.
        metadata: JSON types; ``rlrr finetune`` keeps the class names there.
    """

    config: RLRRConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter is beside its tensors.

    Attributes:
        config: how a backbone is adapted for it. metadata: JSON types.
        classes: outputs of its head; None where it has no head of its own.
    """

    config: RLRRConfig
    metadata: Mapping[str, Any]
    classes: int | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a configuration means for a backbone: the plan, and the shapes of its tensors with the backbone's head."""

    plan: Adaptation
    shapes: Mapping[str, tuple[int, ...]]
    form: Form


class Backbone:
    """A plain model that adapters are checked against: the structure of the served one, with the same parameters.

    Args:
        model: not adapted. Its modules are copied, its tensors are not; they are frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        self.plain = shared_copy(model, {})
        self._heads = find_heads(self.plain, RLRRConfig())
        self._tensors = dict(named_tensors(self.plain))
        self._recognised: set[str] = set()  # samples of weights that were found to be this backbone's
        self._layouts: dict[str, Layout] = {}
        self._forms: dict[Hashable, Form] = {}

    def layout(self, config: RLRRConfig) -> Layout:
        """What ``config`` means here.

        Raises:
            ValueError: as for :func:`rlrr_kernels.adapt_model`; or the additive form, which has no W'.
        """
        key = json.dumps(config.to_dict(), sort_keys=True)
        found = self._layouts.get(key)
        if found is None:
            if config.form != "rescaled":
                raise ValueError(f"a bank holds adapters of form='rescaled'; got form={config.form!r}")
            plan = plan_adaptation(self.plain, config)
            shapes = planned_shapes(self.plain, plan)
            owned = tuple(f"{head}." for head in plan.heads)
            assert isinstance(config.scale_dtype, torch.dtype)
            vectors = tuple((name, shape) for name, shape in shapes.items() if not name.startswith(owned))
            alike = vectors, config.scale_dtype, plan.heads, config.residual, config.conv_layout
            form = self._forms.setdefault(alike, Form(*alike))
            found = self._layouts[key] = Layout(plan, shapes, form)
        return found

    def expected(self, layout: Layout, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes that ``layout`` asks for, with as many classes as the head in ``found`` has."""
        expected = dict(layout.shapes)
        for name in self._classifiers(layout):
            shape, given = expected[f"{name}.weight"], found.get(f"{name}.weight", ())
            if len(given) == len(shape) and given[0] > 0:
                expected[f"{name}.weight"] = (given[0], *shape[1:])
                if f"{name}.bias" in expected:
                    expected[f"{name}.bias"] = given[:1]
        return expected

    def classes(self, config: RLRRConfig, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """How many classes the head of an adapter with tensors of these shapes has; None where it has no own one."""
        return next((shapes[f"{name}.weight"][0] for name in self._classifiers(self.layout(config))), None)

    def _classifiers(self, layout: Layout) -> list[str]:
        """Names of the layers whose rows are the classes: of each head its last linear layer or convolution.

        What else is trained as it is, such as norms in a PEFT folder, is none where the model says what its heads are.
        """
        heads = [head for head in layout.plan.heads if head in self._heads or not self._heads]
        return [name for head in heads if (name := _classifier(self.plain, head)) is not None]

    def read(
        self, source: str | os.PathLike[str] | AdapterState, recipe: str | None, tensors: bool = True
    ) -> tuple[Adapter, TaskTensors | None]:
        """What an adapter is, and its tensors unless they are not asked for, when everything fits the backbone.

        Raises:
            FileNotFoundError, ValueError: as for :func:`rlrr_kernels.load_adapter`; or it trains more than adapter and
                head.
        """
        if isinstance(source, AdapterState):
            where, state, sample = Path("memory"), source, None
            info_shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
        elif (Path(source) / PEFT_CONFIG).is_file():
            where, state, sample = Path(source), self._from_peft(Path(source), recipe), None
            info_shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
        else:
            where = Path(source)
            info, read = read_adapter(where, tensors)
            sample = info.backbone_sample
            if info.also_trained:
                raise ValueError(
                    f"the adapter in {where} trains more than adapter and head, which samples of other tasks in the "
                    f"batch would get too: {some(info.also_trained)}"
                )
            state, info_shapes = AdapterState(info.config, read, info.metadata), info.shapes
        if not isinstance(state.config, RLRRConfig):
            raise TypeError(f"config must be an RLRRConfig; got {type(state.config).__name__}")
        layout = self._check_shapes(where, state.config, info_shapes)
        if sample is not None:
            self._recognise(where, sample)
        adapter = Adapter(state.config, dict(state.metadata), self.classes(state.config, info_shapes))
        if not tensors and not state.tensors:
            return adapter, None
        check_values(where / TENSORS, state.tensors, self._tensors)
        return adapter, self.task(layout, state.tensors)

    def _recognise(self, where: Path, sample: Mapping[str, list[float]]) -> None:
        """Warns, as :func:`rlrr_kernels.load_adapter` does, where the adapter was trained on other weights."""
        key = json.dumps(sample, sort_keys=True)
        if key not in self._recognised and not warn_other_weights(where, self.plain, sample, stacklevel=4):
            self._recognised.add(key)

    def _check_shapes(self, where: Path, config: RLRRConfig, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        try:
            layout = self.layout(config)
        except ValueError as error:
            raise ValueError(misfit(where, self.plain, [str(error)])) from error
        problems = differences(shapes, self.expected(layout, shapes))
        if problems:
            raise ValueError(misfit(where, self.plain, problems))
        return layout

    def _from_peft(self, folder: Path, recipe: str | None) -> AdapterState:
        from rlrr_kernels.peft.convert import load_peft, read_peft

        present, own = self._tensors, {}
        for name, tensor in read_peft(folder)[2].items():
            if name in present:
                mine = present[name].detach()
                own[name] = mine.clone() if mine.shape == tensor.shape else mine.new_zeros(tensor.shape)
        model = shared_copy(self.plain, own)
        load_peft(model, folder, recipe=recipe)
        return AdapterState(adaptation_of(model).config, trained_tensors(model)[0])

    def task(self, layout: Layout, tensors: Mapping[str, Tensor]) -> TaskTensors:
        """``tensors``, which fit, as copies on the device of the backbone."""
        with torch.inference_mode(False), torch.no_grad():  # a batch for inference may be what reads an adapter again
            form, device = layout.form, next(iter(self._tensors.values())).device
            pieces = [tensors[name].reshape(-1).to(device, form.dtype) for name, _ in form.shapes]
            flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=form.dtype, device=device)
            heads = {}
            for head in form.heads:
                plain = find_module(self.plain, head)
                own = {
                    key: tensors[f"{head}.{key}"].to(tensor.device, tensor.dtype, copy=True)
                    for key, tensor in named_tensors(plain)
                }
                heads[head] = shared_copy(plain, own)
            return TaskTensors(form, flat, heads)

    @torch.inference_mode(False)  # it could not be trained
    def adapted(
        self, config: RLRRConfig, tensors: Mapping[str, Tensor] | None, classes: int | None = None
    ) -> nn.Module:
        """A model with the backbone's frozen parameters and trained ones of its own, adapted as ``config`` says.

        Args:
            tensors: values of the trained ones, which fit; None: drawn as :func:`rlrr_kernels.adapt_model` draws them,
                after those of a fresh head.
            classes: of a fresh head; None: as many as the backbone's has.
        """
        layout = self.layout(config)
        own = {
            f"{head}.{key}": tensor.detach().clone()
            for head in layout.plan.heads
            for key, tensor in named_tensors(find_module(self.plain, head))
        }
        if tensors is not None:
            own = {name: tensors[name].detach().clone() for name in own}
        model = shared_copy(self.plain, own)
        classifiers = self._classifiers(layout)
        if tensors is None:
            for name in classifiers:
                module = find_module(model, name)
                if classes is not None:
                    _resize(module, classes)
                module.reset_parameters()
        if classifiers and isinstance(getattr(model, "num_classes", None), int):
            vars(model)["num_classes"] = int(find_module(model, classifiers[0]).weight.shape[0])
        apply_adaptation(model, layout.plan)
        if tensors is not None:
            with torch.no_grad():
                for name, tensor in trained_tensors(model)[0].items():
                    tensor.copy_(tensors[name])
        return model


def _classifier(model: nn.Module, head: str) -> str | None:
    """Name of the last linear layer or convolution of a head."""
    names = [
        name
        for name, module in named_modules(find_module(model, head), head)
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return names[-1] if names else None


def _resize(layer: Any, classes: int) -> None:
    """Gives a linear layer or convolution ``classes`` outputs, with values that are still to be drawn."""
    for key, parameter in layer._parameters.items():
        if parameter is not None:
            shape = (classes, *parameter.shape[1:])
            setattr(layer, key, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    _tell_size(layer)


def _tell_size(layer: Any) -> None:
    """Sets the attribute that names the number of outputs of a linear layer or convolution to its weight's."""
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", layer.weight.shape[0])


def shared_copy(module: nn.Module, own: Mapping[str, Tensor]) -> Any:
    """A copy of ``module`` with the same parameters and buffers, but for those that ``own`` has by name."""
    memo: dict[int, Any] = {}
    for name, tensor in [*named_tensors(module), *module.named_buffers(remove_duplicate=False)]:
        given = own.get(name)
        if given is None:
            memo.setdefault(id(tensor), tensor)
        elif isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(given, requires_grad=False)
        else:
            memo[id(tensor)] = given
    made = copy.deepcopy(module, memo)
    for layer in made.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            _tell_size(layer)
    return made
