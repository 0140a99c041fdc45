"""Several tasks trained side by side over one backbone, beside the same runs one after the other.

    python -m benchmarks.many --model vit_base_patch16_224 --tasks 8 --batch-size 4

Every task has random images of its own. Both ways train all tasks for one epoch from the same start, in turns after a
round that does not count; the table has medians over the rounds, of whole calls, from making the models to writing the
adapters. ``seconds`` are the clock's; other programs on the machine disturb ``processor seconds`` less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.support.common import markdown_table
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.many.run import finetune_many
from rlrr_kernels.train.models.backbones import NO_WEIGHTS
from rlrr_kernels.train.run.config import FinetuneConfig

TOGETHER, ALONE = "side by side", "one after the other"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name; its weights are random")
    parser.add_argument("--image-size", type=int, help="pixels; default: the model's")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=32, help="training images of each task")
    parser.add_argument("--batch-size", type=int, default=4, help="of each task")
    parser.add_argument("--mixed-precision", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {TOGETHER: [], ALONE: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            for way in (TOGETHER, ALONE) if number % 2 else (ALONE, TOGETHER):
                spent = measure(way, options, Path(folder), number)
                if number:  # the first makes threads and buffers, and imports
                    seconds[way].append(spent)
    images = options.tasks * options.images
    medians = {way: [statistics.median(values) for values in zip(*rows, strict=True)] for way, rows in seconds.items()}
    rows: list[list[object]] = [
        [way, clock, images / clock, clock / medians[ALONE][0], cpu, cpu / medians[ALONE][1]]
        for way, (clock, cpu) in medians.items()
    ]
    print(
        f"{options.model}, {options.tasks} tasks, {options.images} images and batches of {options.batch_size} each, "
        f"{torch.get_num_threads()} threads, median of {options.rounds} rounds in turns\n"
    )
    heads = ["", "seconds", "images a second", "ratio", "processor seconds", "ratio"]
    print("\n".join(markdown_table(heads, rows)))


def measure(way: str, options: argparse.Namespace, folder: Path, round_number: int) -> tuple[float, float]:
    """Seconds of the clock and of the processor of one round of ``way``."""
    configs = {
        f"task-{i}": FinetuneConfig(
            model=options.model,
            data=make_images(folder / "images" / str(i), i, options.images),
            out=folder / f"{way} {round_number}" / f"task-{i}",
            weights=NO_WEIGHTS,
            image_size=options.image_size,
            check=False,
            train=TrainConfig(epochs=1, batch_size=options.batch_size, mixed_precision=options.mixed_precision, seed=i),
        )
        for i in range(options.tasks)
    }
    clock, processor = time.perf_counter(), time.process_time()
    if way == TOGETHER:
        finetune_many(configs, quiet=True)
    else:
        for config in configs.values():
            finetune(config, quiet=True)
    return time.perf_counter() - clock, time.process_time() - processor


def make_images(folder: Path, seed: int, count: int) -> Path:
    """``count`` training images of random colours in two classes, and a validation image of each, made once."""
    numbers = random.Random(seed)
    for split, images in (("train", count), ("val", 2)):
        for i in range(images):
            place = folder / split / ("odd" if i % 2 else "even")
            place.mkdir(parents=True, exist_ok=True)
            colour = (numbers.randrange(256), numbers.randrange(256), numbers.randrange(256))
            Image.new("RGB", (64, 64), colour).save(place / f"{i}.png")
    return folder


if __name__ == "__main__":
    main()
