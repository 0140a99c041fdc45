"""From an adapter folder to a plain checkpoint of the merged model."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import torch
from torch import nn

from rlrr_kernels.adapt import MergeReport, is_adapted, merge_adapter
from rlrr_kernels.train.methods.baselines import BaselineMergeReport, merge_baseline
from rlrr_kernels.train.models.task import Task, load_task
from rlrr_kernels.train.output.folder import remove_leftovers, write_files


@dataclasses.dataclass(frozen=True)
class Merged:
    """What :func:`merge_to_file` did.

    Attributes:
        difference: largest absolute difference of logits, merged against adapted. largest: of these, absolute.
        image_size_argument: whether timm's model takes ``img_size``.
    """

    task: Task
    report: MergeReport | BaselineMergeReport
    difference: float
    largest: float
    image_size_argument: bool


def merge_to_file(adapter: str | Path, file: str | Path, weights: str | Path | None = None) -> Merged:
    """Merges the folder ``adapter``, of RLRR or a baseline, into its backbone; writes the state dict as safetensors.

    Args:
        adapter: written by ``rlrr finetune``.
        file: replaced in one step.
        weights: of the backbone, as for :meth:`rlrr_kernels.train.models.task.Task.backbone`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for :func:`rlrr_kernels.train.models.task.load_task`.
        OSError: the file cannot be written; one that was there is untouched.
    """
    from safetensors.torch import save

    model, task = load_task(adapter, weights)
    images = example_images(task)
    before = logits(model, images)
    report = merge_adapter(model) if is_adapted(model) else merge_baseline(model)
    after = logits(model, images)
    file = Path(file)
    remove_leftovers(file.parent, file.name, older_than_minutes=60)
    try:
        write_files(file.parent, {file.name: save(model.state_dict(), {"format": "pt"})})
    except OSError as error:
        message = f"the merged model could not be written ({error.strerror}); a file that was there is untouched"
        raise OSError(error.errno, message, str(file)) from error
    return Merged(
        task,
        report,
        (after - before).abs().max().item(),
        before.abs().max().item(),
        "img_size" in inspect.signature(type(model).__init__).parameters,
    )


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
