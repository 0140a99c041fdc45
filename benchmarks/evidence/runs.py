"""The runs of the comparison on real data: methods, datasets, learning rates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlrr_kernels.demo.backbone import TIMM_NAME
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import Samples, find_splits, stratified_split
from rlrr_kernels.train.grid.runs import METRICS, GridRun, finished_result, run_grid
from rlrr_kernels.train.output.folder import ENVIRONMENT
from rlrr_kernels.train.output.progress import console
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.writing import new_folder

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
LOW_RATES = (3e-4, 1e-3, 3e-3)

MOST_BEYOND = 3
"""How many rates are tried beyond those of an arm while the best lies at an end."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args:
        title: as it is called there.
        settings: of :class:`rlrr_kernels.train.run.config.FinetuneConfig`.
        lrs: learning rates to choose from.
        lr_of: name of the arm whose chosen rate is taken instead.
    """

    title: str
    settings: dict[str, Any]
    lrs: tuple[float, ...] = LEARNING_RATES
    lr_of: str | None = None


MAIN = {
    "rlrr": Arm("RLRR", {}),
    "lora": Arm("LoRA, rank 8", {"method": "lora"}, lrs=LOW_RATES),
    "ssf": Arm("SSF", {"method": "ssf"}),
    "probe": Arm("linear probe", {"method": "probe"}, lrs=(3e-3, 1e-2, 3e-2)),
    "rlrr-identity": Arm("RLRR, identity init", {"init": "identity"}, lrs=LOW_RATES),
    "hira": Arm("HiRA, rank 32", {"method": "hira"}, lrs=LOW_RATES),
    "full": Arm("full fine-tuning", {"method": "full"}, lrs=(1e-5, 3e-5, 1e-4)),
}
"""In the order of the runs: what says most comes first. Each grid has the best of an earlier, smaller budget inside."""

ABLATIONS = {
    "rlrr-no-residual": Arm("RLRR, no residual", {"residual": False}, lr_of="rlrr"),
    "rlrr-left": Arm("RLRR, left alone", {"sides": "left"}, lr_of="rlrr"),
    "rlrr-right": Arm("RLRR, right alone", {"sides": "right"}, lr_of="rlrr"),
    "rlrr-left-no-residual": Arm("left alone, no residual", {"sides": "left", "residual": False}, lr_of="rlrr"),
    "rlrr-right-no-residual": Arm("right alone, no residual", {"sides": "right", "residual": False}, lr_of="rlrr"),
    "rlrr-additive": Arm("RLRR without ⊙ W", {"form": "additive"}, lr_of="rlrr"),
    "rlrr-normal": Arm("RLRR, normal init", {"init": "normal"}, lr_of="rlrr"),
    "rlrr-attention": Arm("RLRR on attention", {"layers": "attention"}, lr_of="rlrr"),
    "rlrr-mlp": Arm("RLRR on MLPs", {"layers": "mlp"}, lr_of="rlrr"),
    "rlrr-layers": Arm("RLRR without SSF", {"recipe": "layers"}, lr_of="rlrr"),
    "rlrr-rank-10": Arm("RLRR, rank 10", {"rank": 10}, lr_of="rlrr"),
}

ARMS = MAIN | ABLATIONS


def digits_folder(cache: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 upscaled to 112, as ``digits/{train,val,test}/<digit>/``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = cache / "digits"
    if folder.exists():
        return folder
    digits = load_digits()
    labels = digits.target.tolist()
    rest, test = stratified_split(labels, 1 / 3, 0)
    train, val = stratified_split([labels[i] for i in rest], 1 / 4, 0)
    splits = {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}
    with new_folder(folder) as partial:
        for split, numbers in splits.items():
            for number in numbers:
                path = partial / split / str(labels[number]) / f"{number:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = (digits.images[number] * (255 / 16)).round().astype("uint8")  # from 0 to 16
                Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC).save(path)
    return folder


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset: makes its image folder in the cache; ``augment`` of its training images."""

    folder: Callable[[Path], Path]
    augment: str


DATASETS = {
    "elpv": Source(elpv_folder, "flip"),
    "digits": Source(digits_folder, "none"),  # a digit in the mirror is another one, or none
}


def limited_run(name: str, config: FinetuneConfig, limit: int | None) -> GridRun:
    """The run ``name``; with a ``limit`` a trial on about so many images of every split, in a folder of its own."""
    if limit is None:
        return GridRun(name, config)

    def first_images() -> dict[str, Samples]:
        return {
            split: samples.subset(range(0, len(samples), max(1, len(samples) // limit)))
            for split, samples in find_splits(config.data).items()
        }

    return GridRun(f"trial-{limit}/{name}", dataclasses.replace(config, data=None), first_images)


def result_row(run: GridRun, out: Path) -> dict[str, Any] | None:
    """What a report needs of a finished run, with what it ran on; None where it is not finished."""
    result = finished_result(run, out)
    if result is None:
        return None
    session = json.loads((out / run.name / ENVIRONMENT).read_bytes())["sessions"][-1]
    return {
        "seed": result["settings"]["train.seed"],
        "epochs": result["settings"]["train.epochs"],
        "epoch": result["epoch"],
        "epoch_chosen_on": result["epoch_chosen_on"],
        "image_size": result["task"]["preprocessing"]["image_size"],
        "trial": run.splits is not None,
        **{name: result[part][key] for name, (part, key) in METRICS.items()},
        "test_images": result["test"]["count"],
        **{key: result[key] for key in ("trained_parameters", "adapter_parameters", "seconds", "peak_memory_bytes")},
        "precision": result["precision"],
        "cpu": session["processor"],
        "device": session["device"],
        "threads": session["threads"],
        "torch": session["versions"]["torch"],
        "commit": session["commit"],
    }


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The grid: which arms on which datasets and seeds, and the budget of every run."""

    cache: Path
    out: Path
    datasets: tuple[str, ...] = tuple(DATASETS)
    methods: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int = 5
    image_size: int = 112
    limit: int | None = None

    def cells(self) -> Iterator[tuple[str, str]]:
        """(dataset, method), the main methods on every dataset before the ablations."""
        for part in (MAIN, ABLATIONS):
            for dataset in self.datasets:
                for method in part:
                    if method in self.methods:
                        yield dataset, method

    def run(self, dataset: str, method: str, lr: float, seed: int) -> GridRun:
        """The run of one arm."""
        source = DATASETS[dataset]
        config = FinetuneConfig(
            model=TIMM_NAME,
            weights=backbone_file(self.cache),
            data=source.folder(self.cache),
            image_size=self.image_size,
            augment=source.augment,
            lr=lr,
            check=False,
            train=TrainConfig(epochs=self.epochs, warmup_epochs=min(0.5, self.epochs / 2), seed=seed),
            **{"out": self.out, **ARMS[method].settings},
        )
        name = f"{dataset}/{method}/lr-{lr:g}/seed-{seed}"
        return limited_run(name, config, self.limit)

    def chooser(self, method: str) -> str:
        """The arm that chooses the learning rate of ``method``."""
        return ARMS[method].lr_of or method

    def candidates(self, dataset: str, method: str) -> dict[float, dict[str, Any] | None]:
        """Learning rate, ascending → result of the first seed, None where it is not finished.

        Those of the arm; and where the best of them lies at an end, the next one beyond it, so that it is no end.
        """
        chooser = self.chooser(method)
        rates = sorted(ARMS[chooser].lrs)
        most = len(rates) + MOST_BEYOND if len(rates) > 1 else 1
        while True:
            runs = {lr: self.run(dataset, chooser, lr, self.seeds[0]) for lr in rates}
            found = {lr: finished_result(run, self.out) for lr, run in runs.items()}
            best = _best(found)
            if best not in (rates[0], rates[-1]) or len(rates) == most:
                return found
            rates = sorted([*rates, next_rate(best, up=best == rates[-1])])

    def chosen_lr(self, dataset: str, method: str) -> float | None:
        """The rate that did best on validation images of the first seed; None while these runs are not finished."""
        return _best(self.candidates(dataset, method))

    def rows(self, dataset: str, method: str) -> list[dict[str, Any]]:
        """A row for every finished run with the chosen rate; none while that is not chosen."""
        lr = self.chosen_lr(dataset, method)
        head = {"dataset": dataset, "method": method, "lr": lr, "lr_candidates": list(self.candidates(dataset, method))}
        runs = [] if lr is None else [self.run(dataset, method, lr, seed) for seed in self.seeds]
        return [head | row for run in runs if (row := result_row(run, self.out)) is not None]


def _best(results: dict[float, dict[str, Any] | None]) -> float | None:
    """The learning rate of the best result on validation images; None while one is missing."""
    scored = [
        (result["validation"]["accuracy"], -result["validation"]["loss"], lr)
        for lr, result in results.items()
        if result is not None
    ]
    return max(scored)[2] if len(scored) == len(results) else None


def next_rate(lr: float, *, up: bool) -> float:
    """The rate after ``lr``, or before it, in ..., 0.001, 0.003, 0.01, 0.03, ..."""
    series = [float(f"{digit}e{exponent}") for exponent in range(-12, 3) for digit in (1, 3)]
    return min(rate for rate in series if rate > lr) if up else max(rate for rate in series if rate < lr)


def run_evidence(evidence: Evidence, report: Callable[[], object]) -> None:
    """Does what is not done of ``evidence``, most wanted first, and calls ``report`` after every run."""

    def do(runs: list[GridRun]) -> None:
        for run in runs:
            if finished_result(run, evidence.out) is None:
                run_grid([run], evidence.out, keep_checkpoints=False)
                report()

    cells = list(evidence.cells())
    for number, (dataset, method) in enumerate(cells, 1):
        console.rule(f"[bold]{ARMS[method].title}[/bold] on {dataset}: {number} of {len(cells)}")
        chooser = evidence.chooser(method)
        while (lr := evidence.chosen_lr(dataset, method)) is None:
            candidates = evidence.candidates(dataset, method)
            do([evidence.run(dataset, chooser, lr, evidence.seeds[0]) for lr in candidates])
        console.print(f"learning rate {lr:g}, best on validation images of seed {evidence.seeds[0]}", highlight=False)
        do([evidence.run(dataset, method, lr, seed) for seed in evidence.seeds])
