"""``finetune``: from a timm model and a folder of images to an adapter folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape

from rlrr_kernels.train.data.folders import (
    Samples,
)
from rlrr_kernels.train.loop.distributed import from_main, make_accelerator
from rlrr_kernels.train.loop.fit import fit
from rlrr_kernels.train.methods.baselines import (
    optimizer_groups,
)
from rlrr_kernels.train.models.attention import fastest_attention
from rlrr_kernels.train.output.folder import check_free
from rlrr_kernels.train.output.progress import console
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.run.results import FinetuneResult, conclude
from rlrr_kernels.train.run.start import (
    check_splits,
    check_start,
    describe_run,
    introduce,
    look_for_run,
    prepare,
    take_folder,
)

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]


def finetune(
    config: FinetuneConfig,
    *,
    splits: Mapping[str, Samples] | None = None,
    resume: bool = False,
    title: str | None = None,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes ``config.model`` and saves what was trained, as of the best epoch.

    Args:
        config: the run.
        splits: the images in place of a folder: ``train``, and ``val`` or ``test`` as ``config.epoch_chosen_on`` needs.
        resume: go on from the checkpoint in ``config.out`` where there is one. A run that has ended may get more
            epochs that way; else every setting that changes a number, the images (names, sizes, labels) and the
            backbone's weights have to be the same.
        title: to print above the run, once its input has been found good.
        quiet: print nothing.

    Raises:
        ValueError: bad input; or ``config.out`` holds a run and ``resume`` is not set, or another process is at it.
        FileNotFoundError, ConnectionError, OSError: as for what this function calls; where the adapter cannot be saved,
            the message says where it was saved instead, or how to get it out of the checkpoint.
    """
    out = Path(config.out)
    check_start(config)
    accelerator = make_accelerator(config.train, cpu=config.cpu)
    from_main(accelerator, lambda: check_free(out))
    found = from_main(accelerator, lambda: look_for_run(out, resume))
    talk = accelerator.is_main_process and not quiet
    prepared = prepare(config, splits)
    if config.check:  # last: it may take minutes, what comes before takes seconds
        from_main(accelerator, lambda: check_splits([prepared.splits], talk))
    if talk:
        if title is not None:
            console.rule(escape(title))
        introduce(prepared, found, resume)
    with contextlib.ExitStack() as held:
        held.enter_context(fastest_attention(prepared.model, accelerator, prepared.task.preprocessing.image_size))
        from_main(accelerator, lambda: take_folder(out, held))
        found = from_main(accelerator, lambda: look_for_run(out, resume))  # another run may just have ended there
        sets = prepared.sets()
        result = fit(
            prepared.model,
            optimizer_groups(prepared.model, config.lr, config.weight_decay),
            sets["train"],
            sets[config.deciding],
            config.train,
            out,
            identity=prepared.identity,
            accelerator=accelerator,
            chosen_on=config.epoch_chosen_on,
            resume=found,
            started=lambda: from_main(accelerator, lambda: describe_run(config, accelerator, found)),
            quiet=quiet,
        )
        return conclude(prepared, sets, result, accelerator, talk)
