"""Adapter folders of ``rlrr`` as PEFT's, and PEFT's as those of ``rlrr``: with the backbone that both are about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlrr_kernels.adapt import AdaptReport, save_adapter
from rlrr_kernels.adapt.find import HEAD_NAMES
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, create_model
from rlrr_kernels.train.task import Task, load_task


def adapter_to_peft(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], weights: str | Path | None = None
) -> None:
    """Writes the adapter folder ``adapter``, of ``rlrr finetune``, as a PEFT folder to ``out``.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for :func:`load_task` and
            :func:`rlrr_kernels.peft.to_peft`.
        ImportError: PEFT is not installed.
    """
    from rlrr_kernels.peft import to_peft

    to_peft(load_task(Path(adapter), weights)[0], out)


def peft_to_adapter(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str,
    weights: str | Path = HUB,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    recipe: str | None = None,
) -> AdaptReport:
    """Makes an adapter folder, as ``rlrr evaluate`` and ``merge`` take it, of a PEFT folder with a saved head.

    Args:
        folder: with an RLRR adapter of a timm model and its head among the ``modules_to_save``.
        out: the adapter folder.
        model, weights, image_size: the backbone, see :func:`create_model`.
        classes: names in label order; None: their numbers.
        recipe: see :func:`rlrr_kernels.peft.load_peft`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, OSError: the backbone cannot be read, the adapter does not fit
            it or has no head, ``classes`` are not as many as the head's outputs, or ``out`` cannot be written.
        ImportError: PEFT is not installed.
    """
    from rlrr_kernels.peft import load_peft
    from rlrr_kernels.peft.convert import read_peft

    beside = read_peft(folder)[2]
    heads = [tensor for name, tensor in beside.items() if name.split(".")[0] in HEAD_NAMES and tensor.dim() == 2]
    if not heads:
        raise ValueError(f"{folder} has no head among its modules_to_save, so the number of classes is unknown")
    count = len(heads[0])
    classes = tuple(map(str, range(count))) if classes is None else tuple(classes)
    if len(classes) != count:
        raise ValueError(f"classes must be {count} names, as many as the head's outputs; got {len(classes)}")
    backbone, transform = create_model(model, count, image_size=image_size, weights=weights)
    report = load_peft(backbone, folder, recipe=recipe)
    origin = str(weights) if str(weights) in (HUB, NO_WEIGHTS) else Path(weights).name
    task = Task(model, origin, classes, transform)
    save_adapter(backbone, out, metadata={"task": task.to_dict()}, usage=task.usage())
    return report
