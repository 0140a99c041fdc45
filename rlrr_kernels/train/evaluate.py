"""Loss, accuracy and macro-F1 of a classifier over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Scores:
    """Of one pass over ``count`` images. ``recall[c]``: share of class c's images recognised, None without any."""

    loss: float
    accuracy: float
    macro_f1: float
    recall: tuple[float | None, ...]
    count: int


@torch.no_grad()  # not inference_mode: FSDP2 trains on with the tensors it gathered
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    classes: int,
    accelerator: Accelerator,
    track: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> Scores:
    """Scores ``model`` in evaluation mode over ``loader``, both on the device of ``accelerator``, in its precision.

    Args:
        model: images [B, 3, H, W] to logits [B, C].
        loader: yields (images, labels [B]).
        classes: C.
        accelerator: gathers the predictions of all processes.
        track: wraps the batches to show progress.
    """
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

    # Every process holds the gathered predictions of all: a second synchronisation would count them twice.
    options = {"num_classes": classes, "sync_on_compute": False}
    confusion = MulticlassConfusionMatrix(**options).to(accelerator.device)
    f1 = MulticlassF1Score(average="macro", **options).to(accelerator.device)
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for images, labels in track(loader):
        with accelerator.autocast():
            logits = model(images)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        predictions = logits.argmax(1)
        confusion.update(predictions, labels)
        f1.update(predictions, labels)
    model.train(was_training)
    matrix = confusion.compute().double().cpu()
    total = matrix.sum(1)
    return Scores(
        loss=loss.item() / total.sum().item(),
        accuracy=(matrix.trace() / total.sum()).item(),
        macro_f1=f1.compute().item(),
        recall=tuple((matrix[i, i] / n).item() if (n := total[i]) else None for i in range(classes)),
        count=int(total.sum()),
    )
