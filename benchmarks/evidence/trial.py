"""Trials of long studies: the same runs on a few images, whose scores mean nothing."""

from __future__ import annotations

import dataclasses

from rlrr_kernels.train.data.folders import Samples, find_splits
from rlrr_kernels.train.finetune import FinetuneConfig
from rlrr_kernels.train.grid.runs import GridRun


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
