"""What a run leaves: the adapter, scores on the test images, ``result.json`` and a learning curve."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rlrr_kernels.adapt import AdaptReport
from rlrr_kernels.train.data.folders import (
    ImageDataset,
    make_loader,
)
from rlrr_kernels.train.evaluate import Scores, evaluate
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop.record import FitResult
from rlrr_kernels.train.methods.baselines import (
    TITLES,
    BaselineReport,
)
from rlrr_kernels.train.methods.files import save_trained
from rlrr_kernels.train.output.folder import ADAPTER, CURVE, RESULT
from rlrr_kernels.train.output.progress import track
from rlrr_kernels.train.plot import learning_curve
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.run.start import PreparedRun
from rlrr_kernels.train.task import Task
from rlrr_kernels.writing import write_together

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What came of it.

    Attributes:
        model: adapted, with the best epoch's tensors. adapter: the folder it is saved in. task: what it classifies.
        report: of the adaptation. fit: of the training. test: scores on the test images; None without any; equal to
            ``fit.best`` where the epoch was chosen on them.
    """

    model: nn.Module
    adapter: Path
    task: Task
    report: AdaptReport | BaselineReport
    fit: FitResult
    test: Scores | None


def conclude(
    prepared: PreparedRun, sets: Mapping[str, ImageDataset], result: FitResult, accelerator: Accelerator, talk: bool
) -> FinetuneResult:
    """Saves what was trained, scores it on the test images and writes the results to the run's folder.

    Raises:
        OSError: as for :func:`finetune`.
    """
    config, model, task = prepared.config, prepared.model, prepared.task
    out = Path(config.out)
    adapter = out / ADAPTER
    if accelerator.is_main_process:  # first of all: whatever fails from here on, the work is kept
        _save(model, adapter, task, _metadata(config, task, accelerator, result, None), out)
    if config.epoch_chosen_on == "test":
        test = result.best
    else:
        test = _score(model, sets.get("test"), task, config.train.batch_size, accelerator, talk)
    if accelerator.is_main_process:
        if test is not None:
            _save(model, adapter, task, _metadata(config, task, accelerator, result, test), out)
        _write_result(config, _metadata(config, task, accelerator, result, test), prepared.report, result, talk)
    return FinetuneResult(model, adapter, task, prepared.report, result, test)


def _score(model, test_set, task, batch_size, accelerator, talk) -> Scores | None:
    if test_set is None:
        return None
    loader = accelerator.prepare(make_loader(test_set, batch_size))
    return evaluate(
        model, loader, len(task.classes), accelerator, lambda batches: track(batches, len(loader), "test", enabled=talk)
    )


def _metadata(
    config: FinetuneConfig, task: Task, accelerator: Accelerator, result: FitResult, test: Scores | None
) -> dict[str, Any]:
    return {
        "method": config.method,
        "task": task.to_dict(),
        "training": dataclasses.asdict(config.train)
        | {"lr": config.lr, "weight_decay": config.weight_decay, **config.image_and_gradient_settings()},
        "precision": accelerator.mixed_precision,
        "epoch": result.best_epoch,
        "epoch_chosen_on": config.epoch_chosen_on,
        "validation": dataclasses.asdict(result.best) if config.epoch_chosen_on == "validation" else None,
        "test": None if test is None else dataclasses.asdict(test),
    }


def _save(model: nn.Module, folder: Path, task: Task, metadata: dict[str, Any], out: Path) -> None:
    try:
        save_trained(model, folder, metadata=metadata, usage=task.usage())
    except OSError as error:
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"rlrr-adapter-{out.resolve().name}-"))  # nobody else's
            save_trained(model, elsewhere, metadata=metadata, usage=task.usage())
        except OSError:
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
            rescue = f"make room and run the same command with --resume: {out / checkpoint.NAME} holds the training"
        else:
            rescue = f"it was saved to {elsewhere} instead"
        raise OSError(error.errno, f"{error.strerror}; {rescue}", str(folder)) from error


def _write_result(
    config: FinetuneConfig,
    metadata: dict[str, Any],
    report: AdaptReport | BaselineReport,
    result: FitResult,
    talk: bool,
) -> None:
    out, title = Path(config.out), f"{metadata['task']['model']}, {TITLES[config.method]}"
    document = metadata | {
        "settings": config.settings(),
        "trained_parameters": report.trained,
        "adapter_parameters": report.adapter,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory,
        "exchanged_bytes_per_step": result.exchanged,
        "extended_from_epochs": list(result.extended),
        "history": result.history,
    }
    try:
        write_together(out, {RESULT: json.dumps(document, indent=2).encode()})
        learning_curve(result, out / CURVE, title, chosen_on=metadata["epoch_chosen_on"])
    except OSError as error:  # the adapter is safe already
        if talk:
            warnings.warn(f"not all of the results could be written: {error}", stacklevel=2)
