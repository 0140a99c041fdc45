"""Every task of a benchmark by the paper's settings, over several seeds, in one folder that survives being killed."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.paper.data import (
    SPLITS,
    Listing,
    augmentation,
    load_splits,
    needed_files,
    preprocessing,
    raise_problems,
    read_listings,
    split_note,
)
from rlrr_kernels.paper.hyperparameters import SEED, DatasetSettings, selected_datasets
from rlrr_kernels.paper.results import FOLDER, Protocol, Run, TaskResults, write_results
from rlrr_kernels.train.config.files import check_types
from rlrr_kernels.train.config.presets import paper_train_config
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import first_lines
from rlrr_kernels.train.grid.runs import GridRun, run_grid
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, check_model_name
from rlrr_kernels.train.output.progress import say
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.writing import check_present, remove_leftovers

RUNS = "runs"
"""Where the run folders lie, in the folder of a reproduction."""

SCHEDULES = ("ran", "meant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What is reproduced, and how far.

    Args:
        benchmark: ``vtab`` or ``fgvc``.
        root: folder that holds one folder a dataset.
        model: the backbone's name in timm, e.g. vit_base_patch16_224.augreg_in21k.
        out: gets ``runs/<dataset>/seed-<seed>`` and ``results/<dataset>.json``; None: ``runs/<benchmark>``.
        weights: of the backbone: ``hub`` fetches them, ``none`` is a random start, anything else is a file.
        seeds: how many, from 42 on.
        split: ``honest``, which scores the test images once, or ``paper``: the best epoch on the test images.
        tasks: only these datasets.
        epochs: a trial, marked so in every output; warm-up, cool-down and lag shrink with it. None: the paper's.
        image_size: pixels; the paper's is 224.
        augmented: mixup, cutmix, smoothing and averaged weights (FGVC).
        schedule: of the learning rate: ``ran``, as the authors' code has it, or ``meant``, as the paper has it.
        method: ``rlrr``, or one to compare it with under the same settings, as for ``rlrr finetune``.
        mixed_precision: ``no`` (float32), ``fp16``, ``bf16``, or ``auto``: 16 bits where the device computes with them.
        workers: processes that load images; None: by the device.
        checkpoint_minutes: a checkpoint is written after every epoch, and within one after so many minutes.
        cpu: leave a GPU alone.

    Raises:
        ValueError: a value is not allowed.
    """

    benchmark: str
    root: Path
    model: str
    out: Path | None = None
    weights: str | Path = HUB
    seeds: int = 3
    split: str = "honest"
    tasks: tuple[str, ...] = ()
    epochs: int | None = None
    image_size: int = 224
    augmented: bool = False
    schedule: str = "ran"
    method: str = "rlrr"
    mixed_precision: str = "auto"
    workers: int | None = None
    checkpoint_minutes: float = 5
    cpu: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        selected_datasets(self.benchmark, self.tasks)
        for name, choices in (("split", SPLITS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("seeds", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        paper_train_config(self.benchmark, augmented=self.augmented)
        if self.out is None:
            object.__setattr__(self, "out", Path("runs") / self.benchmark)


def reproduce(
    config: ReproduceConfig, *, grid: Callable[..., Any] = run_grid, quiet: bool = False
) -> dict[str, TaskResults]:
    """Does every run that is not done yet, the first seed of all tasks first; the same call goes on with a stopped one.

    Each run is one of :func:`run_grid`: killed at any moment, no finished epoch is lost. The
    results file of a task is replaced in one step after each of its runs.

    Args:
        config: what to reproduce.
        grid: does the runs: ``run_grid``, or :func:`rlrr_kernels.train.grid.cluster.submit_grid` with its settings.
        quiet: print nothing.

    Returns:
        Dataset → results, as written to ``config.out/results``.

    Raises:
        FileNotFoundError, ValueError: a split file is missing or damaged (all datasets are looked at before the first
            run, without decoding images); or as for ``run_grid``.
        OSError: a result could not be written.
    """
    datasets = selected_datasets(config.benchmark, config.tasks)
    check_model_name(config.model)
    runs = grid_runs(config)  # a setting that is not allowed shows before many files are read
    notes = check_datasets(config)
    results = {
        settings.name: TaskResults(settings.name, protocol_of(config), _seeds(config), (), notes[settings.name])
        for settings in datasets
    }
    folder = Path(config.out) / FOLDER
    if _is_main_process():
        for settings in datasets:
            remove_leftovers(folder, f"{settings.name}.json")

    def keep(name: str, document: dict[str, Any]) -> None:
        dataset, _, seed = name.partition("/seed-")
        run = Run(
            seed=int(seed),
            test_accuracy=document["test"]["accuracy"],
            validation_accuracy=document["validation"] and document["validation"]["accuracy"],
            best_epoch=document["epoch"],
            trained_parameters=document["trained_parameters"],
            seconds=document["seconds"],
        )
        task = results[dataset]
        finished = sorted((*task.runs, run), key=lambda run: run.seed)
        results[dataset] = dataclasses.replace(task, runs=tuple(finished))
        if _is_main_process():
            write_results(folder, results[dataset])
            if not quiet:
                say(
                    f"{dataset}, seed {run.seed}: test accuracy {100 * run.test_accuracy:.1f} %, "
                    f"epoch {run.best_epoch}, chosen on the {document['epoch_chosen_on']} images"
                )

    grid(runs, Path(config.out) / RUNS, keep_checkpoints=False, on_result=keep, quiet=quiet)
    return results


def grid_runs(config: ReproduceConfig) -> list[GridRun]:
    """Every run, the first seed of all tasks first; their folders lie in ``config.out / RUNS``."""
    return [
        GridRun(
            f"{settings.name}/seed-{seed}",
            finetune_config(config, settings, seed),
            functools.partial(load_splits, config.root, settings, config.split),
        )
        for seed in _seeds(config)
        for settings in selected_datasets(config.benchmark, config.tasks)
    ]


def finetune_config(config: ReproduceConfig, settings: DatasetSettings, seed: int) -> FinetuneConfig:
    """The run of one dataset and seed; its folder is the grid's."""
    swin = config.model.startswith("swin")
    return FinetuneConfig(
        model=config.model,
        weights=config.weights,
        preprocessing=preprocessing(settings, config.image_size),
        method=config.method,
        recipe="paper" if config.method == "rlrr" else "auto",
        drop=settings.drop,
        drop_kind="depth" if swin else "branch",  # as the authors have it
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        augment=augmentation(settings),
        epoch_chosen_on="test" if config.split == "paper" else "validation",
        check=False,  # rlrr data check decodes them, once
        cpu=config.cpu,
        train=_train_config(config, settings, seed),
    )


def protocol_of(config: ReproduceConfig) -> Protocol:
    """What is said of all results of ``config``."""
    weights = str(config.weights)
    return Protocol(
        benchmark=config.benchmark,
        model=config.model,
        weights=weights if weights in (HUB, NO_WEIGHTS) else Path(weights).name,
        split=config.split,
        epoch_chosen_on="test" if config.split == "paper" else "validation",
        image_size=config.image_size,
        epochs=config.epochs or _paper_epochs(config),
        paper_epochs=_paper_epochs(config),
        augmented=config.augmented,
        schedule=config.schedule,
        method=config.method,
    )


def _paper_epochs(config: ReproduceConfig) -> int:
    return paper_train_config(config.benchmark, augmented=config.augmented).epochs


def _train_config(config: ReproduceConfig, settings: DatasetSettings, seed: int) -> TrainConfig:
    whole = paper_train_config(
        config.benchmark,
        restarts=settings.restarts,
        augmented=config.augmented,
        as_ran=config.schedule == "ran",
        drop_last=settings.drop_last and config.augmented,
        seed=seed,
        mixed_precision=config.mixed_precision,
        workers=config.workers,
        checkpoint_minutes=config.checkpoint_minutes,
        **_choice(config),
    )
    if config.epochs is None:
        return whole
    share = config.epochs / whole.epochs
    return dataclasses.replace(
        whole,
        epochs=config.epochs,
        warmup_epochs=whole.warmup_epochs * share,
        cooldown_epochs=whole.cooldown_epochs * share,
        schedule_lag=round(whole.schedule_lag * share),
        choose_from=min(whole.choose_from, config.epochs),
    )


def _choice(config: ReproduceConfig) -> dict[str, Any]:
    """How the authors choose the epoch; ours, with the validation images, is the default of ``TrainConfig``."""
    if config.split == "honest":
        return {}
    return {"ties": "first", "choose_from": 2 if config.benchmark == "vtab" else 1}


def _seeds(config: ReproduceConfig) -> tuple[int, ...]:
    return tuple(range(SEED, SEED + config.seeds))


def check_datasets(config: ReproduceConfig) -> dict[str, str | None]:
    """Reads every list, so that a missing one shows before the first run and not after days.

    Returns:
        Dataset → what to say beside its results: that it is not, or not all of, what was published.

    Raises:
        FileNotFoundError: the data folder does not exist.
        ValueError: a split file is missing or damaged; all of them are named.
    """
    datasets = selected_datasets(config.benchmark, config.tasks)
    check_present(Path(config.root), "the data folder", folder=True)
    problems, notes = [], {}
    for settings in datasets:
        try:
            listings = read_listings(config.root, settings, needed_files(config.root, settings, config.split))
            raise_problems(config.root, settings, listings)
            notes[settings.name] = _note(split_note(config.root, settings), settings, listings)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(datasets)} datasets cannot be used; choose others with --tasks, or repair them:\n"
            + first_lines(problems)
        )
    return notes


def _note(source: str | None, settings: DatasetSettings, listings: Mapping[str, Listing]) -> str | None:
    notes = [source] if source else []
    for name, listing in listings.items():
        found, expected = len(listing.paths), settings.sizes[name]
        if found != expected:
            notes.append(f"{found:,} images in {name}, {expected:,} published")
    return "; ".join(notes) or None


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
