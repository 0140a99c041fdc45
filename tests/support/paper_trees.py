"""Small trees of real image files in the layouts of the published VTAB-1k and FGVC archives."""

import json
import random
from pathlib import Path

from PIL import Image

from rlrr_kernels.paper.hyperparameters import dataset_settings


def draw(label: int, classes: int, numbers: random.Random, size: tuple[int, int] = (10, 8)) -> Image.Image:
    """An image that is the redder the later its class, under noise; no two are equal."""
    red = int(200 * label / max(classes - 1, 1)) + numbers.randrange(40)
    noise = [Image.frombytes("L", size, numbers.randbytes(size[0] * size[1])) for _ in range(2)]
    return Image.merge("RGB", (Image.new("L", size, red), *noise))


def make_vtab(root: Path, name: str, train: int = 800, val: int = 200, test: int | None = None) -> Path:
    """``root/name`` with the four lists; ``test`` None: as many images as the published list has.

    As published, every list names its own copies: train800val200 shows the images of train800 and val200 once more.
    """
    settings = dataset_settings(name)
    numbers = random.Random(name)
    images = {
        split: [(draw(i % settings.classes, settings.classes, numbers), i % settings.classes) for i in range(count)]
        for split, count in (("train800", train), ("val200", val), ("test", test or settings.sizes["test"]))
    }
    images["train800val200"] = images["train800"] + images["val200"]
    for split, drawn in images.items():
        (root / name / "images" / split).mkdir(parents=True)
        lines = []
        for i, (image, label) in enumerate(drawn):
            lines.append(f"images/{split}/{i:06}.jpg {label}")
            image.save(root / name / f"images/{split}/{i:06}.jpg")
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
                file = root / name / settings.image_folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                draw(label, settings.classes, numbers).save(file)
                entries[path] = label + first
        (root / name / f"{split}.json").write_text(json.dumps(entries))
    return root / name
