"""Small generated image folders."""

import random
from pathlib import Path

from PIL import Image


def make_images(folder: Path, classes: dict[str, int], size: int = 40) -> Path:
    """``classes[name]`` PNGs in ``folder/name``; the more red, the later the class, under noise."""
    numbers = random.Random(str(folder.name))
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            red = numbers.randrange(90) + 110 * label
            colour = (red, numbers.randrange(200), numbers.randrange(200))
            Image.new("RGB", (size, size + 8), colour).save(folder / name / f"{i:03}.png")
    return folder


def make_splits(folder: Path, train: int = 12, val: int = 6, test: int = 6) -> Path:
    """``folder/{train,val,test}/{blue,red}``."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        make_images(folder / split, {"blue": count, "red": count})
    return folder
