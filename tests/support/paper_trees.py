"""Small trees of real image files in the layouts of the published VTAB-1k and FGVC archives."""

import json
import random
from pathlib import Path

from PIL import Image

from rlrr_kernels.paper.hyperparameters import dataset_settings


def draw(path: Path, label: int, classes: int, numbers: random.Random, size: tuple[int, int] = (10, 8)) -> None:
    """An image that is the redder the later its class, under noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    red = int(200 * label / max(classes - 1, 1)) + numbers.randrange(40)
    Image.new("RGB", size, (red, numbers.randrange(99), numbers.randrange(99))).save(path)


def make_vtab(root: Path, name: str, train: int = 800, val: int = 200, test: int | None = None) -> Path:
    """``root/name`` with the four lists; ``test`` None: as many images as the published list has."""
    settings = dataset_settings(name)
    numbers = random.Random(name)
    lists: dict[str, list[str]] = {}
    for split, count in (("train800", train), ("val200", val), ("test", test or settings.sizes["test"])):
        lists[split] = []
        for i in range(count):
            label = i % settings.classes
            path = f"images/{split.rstrip('0123456789')}/{i:06}.png"
            draw(root / name / path, label, settings.classes, numbers)
            lists[split].append(f"{path} {label}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (root / name / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root / name


def make_fgvc(root: Path, name: str, counts: tuple[int, int, int] = (1, 1, 1), first: int = 1) -> Path:
    """``root/name`` with the three JSON files and ``counts`` images a class; class numbers start at ``first``."""
    settings = dataset_settings(name)
    numbers = random.Random(name)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        entries = {}
        for label in range(settings.classes):
            for i in range(count):
                path = f"{label + 1:03}.kind/{split}_{i}.jpg"
                draw(root / name / settings.image_folder / path, label, settings.classes, numbers)
                entries[path] = label + first
        (root / name / f"{split}.json").write_text(json.dumps(entries))
    return root / name
