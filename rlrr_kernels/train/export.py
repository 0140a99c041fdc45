"""From an adapter folder to a plain checkpoint of the merged model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlrr_kernels.adapt import MergeReport, is_adapted, merge_adapter
from rlrr_kernels.adapt.folder.save_load import check_values
from rlrr_kernels.train.methods.baselines import BaselineMergeReport, merge_baseline
from rlrr_kernels.train.models.backbones import is_made_for_one_size
from rlrr_kernels.train.task import Task, load_task
from rlrr_kernels.writing import write_together


@dataclasses.dataclass(frozen=True)
class Merged:
    """What :func:`merge_to_file` did.

    Attributes:
        difference: largest absolute difference of logits, merged against adapted. largest: of these, absolute.
        image_size_argument: whether timm's model was made with ``img_size``.
    """

    task: Task
    report: MergeReport | BaselineMergeReport
    difference: float
    largest: float
    image_size_argument: bool

    def loading(self, file: str | Path) -> str:
        """Python that makes the merged model of ``file``: timm's own where the model has a place for every tensor."""
        options = f"num_classes={len(self.task.classes)}"
        if self.image_size_argument:
            options += f", img_size={self.task.preprocessing.image_size}"
        name, path = json.dumps(self.task.model), json.dumps(str(file), ensure_ascii=False)
        if self.report.gained:
            return f"from {__name__} import {load_merged.__name__}; {load_merged.__name__}({path}, {name}, {options})"
        return f"timm.create_model({name}, {options}, checkpoint_path={path})"


def merge_to_file(adapter: str | Path, file: str | Path, weights: str | Path | None = None) -> Merged:
    """Merges the folder ``adapter``, of RLRR or a baseline, into its backbone; writes the state dict as safetensors.

    Args:
        adapter: written by ``rlrr finetune``.
        file: replaced in one step.
        weights: of the backbone, as for :meth:`rlrr_kernels.train.task.Task.backbone`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for :func:`rlrr_kernels.train.task.load_task`.
        OSError: the file cannot be written; one that was there is untouched.
    """
    from safetensors.torch import save

    model, task = load_task(adapter, weights)
    images = example_images(task)
    before = logits(model, images)
    report = merge_adapter(model) if is_adapted(model) else merge_baseline(model)
    after = logits(model, images)
    file = Path(file)
    try:
        write_together(file.parent, {file.name: save(model.state_dict(), {"format": "pt"})})
    except OSError as error:
        message = f"the merged model could not be written ({error.strerror}); a file that was there is untouched"
        raise OSError(error.errno, message, str(file)) from error
    return Merged(
        task,
        report,
        (after - before).abs().max().item(),
        before.abs().max().item(),
        is_made_for_one_size(task.model),
    )


def load_merged(file: str | Path, name: str, **options: Any) -> nn.Module:
    """The timm model ``name`` with the weights that :func:`merge_to_file` wrote to ``file``.

    Unlike timm's ``checkpoint_path`` it also takes files with biases that the model does not have, as a trained shift
    leaves them in Swin's reduction and EVA-02's qkv: these layers get one.

    Args:
        file: safetensors.
        name: timm's.
        options: of ``timm.create_model``: ``num_classes``, ``img_size``, ...

    Raises:
        ValueError: the file does not fit the model, or is damaged; names it.
        FileNotFoundError: it does not exist.
    """
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = timm.create_model(name, **options)
    try:
        state = load_file(file)
        for key in [key for key in state if key.endswith(".bias") and key not in model.state_dict()]:
            parent, _, child = key.removesuffix(".bias").rpartition(".")
            parent = model.get_submodule(parent)
            getattr(parent, child).bias = nn.Parameter(torch.empty_like(state[key]))
            if child == "qkv" and hasattr(parent, "qkv_bias_separate"):
                parent.qkv_bias_separate = True  # else timm multiplies by the weight without calling the layer
        check_values(Path(file), state, model.state_dict(keep_vars=True))
        model.load_state_dict(state)
    except (AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} is no merged model of {name}: {error}") from error
    return model


def example_images(task: Task, count: int = 4) -> torch.Tensor:
    """Random images [count, 3, H, W], the same every time, to compare models by."""
    size = task.preprocessing.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[B, C] in evaluation mode, on the device of the model."""
    was_training = model.training
    result = model.eval()(images.to(next(model.parameters()).device))
    model.train(was_training)
    return result.cpu()
