"""RLRR beside what it is compared with, on two real datasets that come with installable packages.

    python -m benchmarks.evidence.runs --cache .cache --out runs/evidence

DINOv2 ViT-S/14 is fine-tuned by every method under the same command and budget. Each method's learning rate is chosen
among the rates of its grid on validation images of the first seed, then kept for the other seeds; ablations of RLRR
keep the rate of RLRR. The epoch is chosen on validation images, test images are scored once a run. The command goes on
where it was stopped and rewrites its report (``evidence.md``, ``.json``, ``.png``) after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.report import write_report
from benchmarks.evidence.trial import limited_run
from rlrr_kernels.demo.backbone import TIMM_NAME
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import stratified_split
from rlrr_kernels.train.finetune import FinetuneConfig
from rlrr_kernels.train.grid.runs import GridRun, finished_result, run_grid
from rlrr_kernels.train.output.progress import console

LEARNING_RATES = (1e-3, 3e-3)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args:
        title: as it is called there.
        settings: of :class:`rlrr_kernels.train.finetune.FinetuneConfig`.
        lrs: learning rates to choose from.
        lr_of: name of the arm whose chosen rate is taken instead.
    """

    title: str
    settings: dict[str, Any]
    lrs: tuple[float, ...] = LEARNING_RATES
    lr_of: str | None = None


MAIN = {
    "probe": Arm("linear probe", {"method": "probe"}, lrs=(1e-3, 3e-3, 1e-2)),
    "full": Arm("full fine-tuning", {"method": "full"}, lrs=(3e-5, 1e-4)),
    "ssf": Arm("SSF", {"method": "ssf"}),
    "lora": Arm("LoRA, rank 8", {"method": "lora"}),
    "hira": Arm("HiRA, rank 32", {"method": "hira"}),
    "rlrr": Arm("RLRR", {}),
    "rlrr-identity": Arm("RLRR, identity init", {"init": "identity"}),
}

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
    partial = folder.with_name(f"digits.{os.getpid()}.partial")
    for split, numbers in splits.items():
        for number in numbers:
            path = partial / split / str(labels[number]) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[number] * (255 / 16)).round().astype("uint8")  # from 0 to 16
            Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC).save(path)
    partial.rename(folder)
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

    def rates(self, method: str) -> tuple[str, tuple[float, ...]]:
        """The arm that chooses the learning rate of ``method``, and the rates it chooses from."""
        chooser = ARMS[method].lr_of or method
        return chooser, ARMS[chooser].lrs

    def chosen_lr(self, dataset: str, method: str) -> float | None:
        """The rate that did best on validation images of the first seed; None while these runs are not finished."""
        chooser, rates = self.rates(method)
        scored = []
        for lr in rates:
            result = finished_result(self.run(dataset, chooser, lr, self.seeds[0]), self.out)
            if result is None:
                return None
            scored.append((result["validation"]["accuracy"], -result["validation"]["loss"], lr))
        return max(scored)[2]

    def finished(self, dataset: str, method: str) -> tuple[float | None, list[dict[str, Any]], int]:
        """The chosen rate, the finished runs' results with it, with their ``folder``; and how many are to come."""
        lr = self.chosen_lr(dataset, method)
        if lr is None:
            return None, [], len(self.seeds)
        runs = [self.run(dataset, method, lr, seed) for seed in self.seeds]
        found = [(run, result) for run in runs if (result := finished_result(run, self.out)) is not None]
        results = [result | {"folder": self.out / run.name} for run, result in found]
        return lr, results, len(runs) - len(results)


def run_evidence(evidence: Evidence, report: Path) -> None:
    """Does what is not done of ``evidence``, most wanted first, and keeps the report up to date."""

    def do(runs: list[GridRun]) -> None:
        for run in runs:
            if finished_result(run, evidence.out) is None:
                run_grid([run], evidence.out, keep_checkpoints=False)
                write_report(evidence, report)

    cells = list(evidence.cells())
    for number, (dataset, method) in enumerate(cells, 1):
        console.rule(f"[bold]{ARMS[method].title}[/bold] on {dataset}: {number} of {len(cells)}")
        chooser, rates = evidence.rates(method)
        do([evidence.run(dataset, chooser, lr, evidence.seeds[0]) for lr in rates])
        lr = evidence.chosen_lr(dataset, method)
        console.print(f"learning rate {lr:g}, best on validation images of seed {evidence.seeds[0]}", highlight=False)
        do([evidence.run(dataset, method, lr, seed) for seed in evidence.seeds])


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where backbone and images are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="where the runs are kept")
    parser.add_argument("--report", type=Path, help="where the report goes (default: OUT)")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--limit", type=int, help="about so many images a split: a trial, its scores mean nothing")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is finished")
    arguments = vars(parser.parse_args())
    report, report_only = arguments.pop("report"), arguments.pop("report_only")
    for name in ("datasets", "methods", "seeds"):
        arguments[name] = tuple(dict.fromkeys(arguments[name]))
    evidence = Evidence(**arguments)
    report = report or evidence.out
    try:
        if not report_only:
            run_evidence(evidence, report)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
    console.print(write_report(evidence, report), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
