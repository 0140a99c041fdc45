"""The demo: a real fine-tune from nothing but a package index, and a look at what came of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlrr_kernels.adapt.folder.files import FILES
from rlrr_kernels.demo.backbone import TIMM_NAME
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder, fetch_packages
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, find_splits
from rlrr_kernels.train.export import logits, merge_to_file
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.methods.probe import ProbeResult, linear_probe
from rlrr_kernels.train.models.backbones import check_image_size, create_model
from rlrr_kernels.train.output.folder import ADAPTER, CURVE, hold
from rlrr_kernels.train.output.progress import command, console, say, track
from rlrr_kernels.train.plot import learning_curve
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.run.results import FinetuneResult
from rlrr_kernels.train.run.start import look_for_run
from rlrr_kernels.train.task import load_task
from rlrr_kernels.writing import write_together

DEFAULT_LRS = (3e-3,)
"""Of 1e-3 and 3e-3 the one that was best on the validation images; ``--lr 1e-3 --lr 3e-3`` trains both again."""

DEFAULT_SEED = 42

TABLE = "table.json"

COMPARED = 32
"""Test images whose logits are compared."""

MERGED_TOLERANCE = 1e-4
"""Of the largest logit: far above the rounding of float32 in twelve blocks, far below what a wrong merge would do."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Where the demo works and how it trains. With several ``lrs`` each is tried; validation images choose."""

    out: Path
    cache: Path
    epochs: int = 5
    lrs: tuple[float, ...] = DEFAULT_LRS
    image_size: int = 112


@dataclasses.dataclass(frozen=True)
class _Inputs:
    weights: Path
    data: Path


def run_demo(config: DemoConfig, seed: int, *, fresh: bool = False) -> None:
    """Fetches, probes, fine-tunes, saves, loads, merges, and prints what came of each.

    Args:
        config: of the demo.
        seed: of everything random.
        fresh: train anew where ``config.out`` holds a run; else a stopped one is gone on with, a finished one shown.

    Raises:
        ConnectionError: a package could not be fetched.
        ValueError: a setting is not allowed, or a file in the cache is damaged.
        RuntimeError: the saved adapter or the merged model does not give the logits it must.
    """
    _check(config, [seed])
    inputs = _prepare(config)
    probe = _probe(config, inputs)
    result, lr = _finetune(config, inputs, seed, config.out, fresh)
    rows = [_probe_row(probe), _rlrr_row(result, lr)]
    console.rule("results")
    console.print(_table(rows, seed))
    write_together(config.out, {TABLE: json.dumps(rows, indent=2).encode()})
    curve = learning_curve(
        result.fit,
        config.out / CURVE,
        f"RLRR on DINOv2 ViT-S/14, solar cells, learning rate {lr:g}",
        baseline=("linear probe", probe.scores["val"].accuracy),
    )
    say(f"learning curve: {curve}")
    _check_adapter(result, inputs)
    _say_next(config, result, inputs)


def _say_next(config: DemoConfig, result: FinetuneResult, inputs: _Inputs) -> None:
    weights = ("--weights", inputs.weights)
    own = ("--image-size", config.image_size, "--data", "FOLDER", "--out", "runs/mine")
    say(f"next: {command('evaluate', result.adapter, '--data', inputs.data, *weights)}")
    say(f"then your own images: {command('finetune', '--model', TIMM_NAME, *weights, *own)}")


def run_seeds(config: DemoConfig, seeds: list[int], *, fresh: bool = False) -> None:
    """The demo's fine-tune once a seed, and mean and spread of the test scores.

    The split of the photographs is the same for all, so the spread is that of initialisation and order alone.

    Raises:
        ConnectionError, ValueError: as for :func:`run_demo`.
    """
    _check(config, seeds)
    inputs = _prepare(config)
    probe = _probe(config, inputs)
    results = [_finetune(config, inputs, seed, config.out / f"seed-{seed}", fresh) for seed in seeds]
    rows = [_rlrr_row(result, lr) for result, lr in results]
    console.rule("results")
    table = Table("seed", "learning rate", "epoch", "val accuracy", "test accuracy", "test macro-F1", "time")
    for seed, row in zip(seeds, rows, strict=True):
        table.add_row(
            str(seed),
            f"{row['lr']:g}",
            str(row["epoch"]),
            *(f"{row[key]:.4f}" for key in ("val_accuracy", "test_accuracy", "test_macro_f1")),
            f"{row['seconds']:.0f} s",
        )
    console.print(table)
    summary: dict[str, Any] = {"seeds": seeds, "runs": rows, "linear_probe": _probe_row(probe)}
    for key, name in (("test_accuracy", "accuracy"), ("test_macro_f1", "macro-F1")):
        values = [row[key] for row in rows]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        summary[key] = {"mean": mean, "standard_deviation": spread, "min": min(values), "max": max(values)}
        say(
            f"test {name}: {mean:.4f} ± {spread:.4f} (standard deviation over {len(seeds)} seeds, "
            f"{min(values):.4f} to {max(values):.4f}); linear probe {summary['linear_probe'][key]:.4f}, no seed in it"
        )
    write_together(config.out, {TABLE: json.dumps(summary, indent=2).encode()})


def _check(config: DemoConfig, seeds: list[int]) -> None:
    """Raises ``ValueError`` for settings that are not allowed: what follows fetches and trains for minutes."""
    for seed in seeds:
        for lr in config.lrs:
            _settings(config, seed, lr)
    check_image_size(TIMM_NAME, config.image_size)
    look_for_run(config.out, resume=True)


def _settings(config: DemoConfig, seed: int, lr: float) -> FinetuneConfig:
    """Of a run, but for what it works on and where."""
    train = TrainConfig(epochs=config.epochs, warmup_epochs=0.5, seed=seed)
    return FinetuneConfig(model=TIMM_NAME, image_size=config.image_size, lr=lr, train=train)


def _prepare(config: DemoConfig) -> _Inputs:
    fetch_packages(config.cache)
    weights, data = backbone_file(config.cache), elpv_folder(config.cache)
    say(f"{weights}: timm's {TIMM_NAME}; {data}: folders of classes")
    return _Inputs(weights, data)


def _probe(config: DemoConfig, inputs: _Inputs) -> ProbeResult:
    console.rule("linear probe")
    splits = find_splits(inputs.data)
    model, preprocessing = create_model(
        TIMM_NAME, len(splits["train"].classes), image_size=config.image_size, weights=inputs.weights
    )
    sets = {name: ImageDataset(samples, preprocessing.transform()) for name, samples in splits.items()}
    result = linear_probe(
        model, sets, track=lambda batches, total, name: track(batches, total, f"features of the {name} images")
    )
    say(
        f"val accuracy {result.scores['val'].accuracy:.3f} with an L2 penalty of {result.penalty:g}, chosen on it; "
        f"{result.seconds:.0f} s"
    )
    return result


def _finetune(config: DemoConfig, inputs: _Inputs, seed: int, out: Path, fresh: bool) -> tuple[FinetuneResult, float]:
    """The run of the learning rate that does best on the validation images, in ``out``."""
    console.rule(f"RLRR, seed {seed}")
    results = []
    for lr in config.lrs:
        folder = out if len(config.lrs) == 1 else out / f"lr-{lr:g}"
        if fresh and folder.is_dir():
            with hold(folder):
                (folder / checkpoint.NAME).unlink(missing_ok=True)
        settings = _settings(config, seed, lr)
        finetuning = dataclasses.replace(settings, data=inputs.data, out=folder, weights=inputs.weights)
        results.append((finetune(finetuning, resume=(folder / checkpoint.NAME).exists()), lr))
    result, lr = max(results, key=lambda pair: (pair[0].fit.best.accuracy, -pair[0].fit.best.loss))
    if len(results) > 1:
        say(f"learning rate {lr:g} is best on the validation images")
        files = {name: (result.adapter / name).read_bytes() for name in FILES}
        write_together(out / ADAPTER, files)
        result = dataclasses.replace(result, adapter=out / ADAPTER)
    return result, lr


def _probe_row(probe: ProbeResult) -> dict[str, Any]:
    return {
        "method": "linear probe",
        "val_accuracy": probe.scores["val"].accuracy,
        "test_accuracy": probe.scores["test"].accuracy,
        "test_macro_f1": probe.scores["test"].macro_f1,
        "trained_parameters": probe.trained,
        "seconds": probe.seconds,
        "peak_memory_bytes": probe.peak_memory,
    }


def _rlrr_row(result: FinetuneResult, lr: float) -> dict[str, Any]:
    return {
        "method": "RLRR",
        "val_accuracy": result.fit.best.accuracy,
        "test_accuracy": result.test.accuracy,
        "test_macro_f1": result.test.macro_f1,
        "trained_parameters": result.report.trained,
        "seconds": result.fit.seconds,
        "peak_memory_bytes": result.fit.peak_memory,
        "epoch": result.fit.best_epoch,
        "lr": lr,
    }


def _table(rows: list[dict[str, Any]], seed: int) -> Table:
    title = f"defective solar cells, test images, seed {seed}"
    table = Table("method", "accuracy", "macro-F1", "trained", "time", "peak memory", title=title)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['test_accuracy']:.4f}",
            f"{row['test_macro_f1']:.4f}",
            f"{row['trained_parameters']:,}",
            f"{row['seconds']:.0f} s",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    return table


def _check_adapter(result: FinetuneResult, inputs: _Inputs) -> None:
    """Compares logits of test images: the trained model, the saved adapter in a fresh backbone, plain timm merged."""
    import timm

    size = sum(file.stat().st_size for file in result.adapter.iterdir())
    say(f"adapter: {result.adapter}, {size / 1e6:.2f} MB")
    task = result.task
    dataset = ImageDataset(find_splits(inputs.data)["test"], task.preprocessing.transform())
    images = torch.stack([dataset[i][0] for i in range(0, len(dataset), max(1, len(dataset) // COMPARED))])
    trained = logits(result.model, images)

    loaded, _ = load_task(result.adapter, inputs.weights)
    # On the device of the trained model: another one sums in another order.
    if not torch.equal(logits(loaded.to(next(result.model.parameters()).device), images), trained):
        raise RuntimeError(f"the adapter saved in {result.adapter} does not give the trained model's logits")
    say(f"loaded into a fresh backbone: the logits of {len(images)} test images are equal, bit by bit")

    file = result.adapter.parent / "merged.safetensors"
    merge_to_file(result.adapter, file, inputs.weights)
    plain = timm.create_model(
        task.model, num_classes=len(task.classes), img_size=task.preprocessing.image_size, checkpoint_path=str(file)
    )
    difference = (logits(plain, images) - trained).abs().max().item() / trained.abs().max().item()
    if difference > MERGED_TOLERANCE:
        raise RuntimeError(f"the merged model's logits differ by {difference:.1e} of the largest")
    say(f"merged: {file}, a checkpoint of plain timm; its logits are equal within rounding ({difference:.1e})")
