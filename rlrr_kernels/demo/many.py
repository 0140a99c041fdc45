"""Two tasks on the demo's photographs, trained side by side, for a server to answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlrr_kernels.demo.backbone import TIMM_NAME
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder, elpv_kinds_folder, fetch_packages
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.many.run import finetune_many
from rlrr_kernels.train.models.backbones import check_image_size
from rlrr_kernels.train.output.folder import hold
from rlrr_kernels.train.output.progress import console
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.run.start import look_for_run

DEFECTS, KINDS = "defects", "kinds"


@dataclasses.dataclass(frozen=True)
class ManyDemoConfig:
    """Where the demo works and how long it trains.

    Args:
        out: gets the run folders of both tasks, which a server takes as they are.
        cache: of the fetched packages, the backbone and the photographs.
        epochs: of the task that tells defective cells.
        kind_epochs: of the task that tells the kinds of cells, which is the easier one.
        image_size: pixels, a multiple of 14.
    """

    out: Path
    cache: Path
    epochs: int = 5
    kind_epochs: int = 1
    image_size: int = 112


@dataclasses.dataclass(frozen=True)
class TrainedDemo:
    """What :func:`train_tasks` leaves.

    Attributes:
        results: result document of each task. weights: file of the backbone. photographs: folder with some to try.
    """

    results: dict[str, dict[str, Any]]
    weights: Path
    photographs: Path


def train_tasks(config: ManyDemoConfig, *, fresh: bool = False) -> TrainedDemo:
    """Fetches backbone and photographs and trains both tasks in one run.

    Args:
        config: of the demo.
        fresh: train anew where ``config.out`` holds a run; else a stopped one is gone on with, a finished one shown.

    Raises:
        ConnectionError: a package could not be fetched.
        ValueError: a setting is not allowed, a file in the cache is damaged, or ``config.out`` holds runs with other
            settings.
    """
    settings = {
        name: FinetuneConfig(
            model=TIMM_NAME,
            out=config.out / name,
            image_size=config.image_size,
            train=TrainConfig(epochs=epochs, warmup_epochs=0.5),
        )
        for name, epochs in ((DEFECTS, config.epochs), (KINDS, config.kind_epochs))
    }
    check_image_size(TIMM_NAME, config.image_size)
    for folder in (config.out, *(each.out for each in settings.values())):
        look_for_run(folder, resume=True)
    fetch_packages(config.cache)
    weights, defects = backbone_file(config.cache), elpv_folder(config.cache)
    folders = {DEFECTS: defects, KINDS: elpv_kinds_folder(config.cache)}
    console.rule("two tasks over one backbone")
    configs = {name: dataclasses.replace(settings[name], data=folders[name], weights=weights) for name in folders}
    if fresh:
        for each in configs.values():
            if each.out.is_dir():
                with hold(each.out):
                    (each.out / checkpoint.NAME).unlink(missing_ok=True)
    return TrainedDemo(finetune_many(configs, resume=True), weights, defects / "test")
