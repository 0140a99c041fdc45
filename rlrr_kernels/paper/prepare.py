"""Datasets that torchvision can fetch, written to the disk in the layout of the published archives.

The lists drawn here are not those of the published VTAB-1k: every result on them says so (:func:`data.split_note`).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from rlrr_kernels.paper.data import SOURCE
from rlrr_kernels.paper.hyperparameters import DatasetSettings
from rlrr_kernels.writing import new_folder


@dataclasses.dataclass(frozen=True)
class TorchvisionSource:
    """Where torchvision has a dataset's images.

    Attributes:
        dataset: name of its class in ``torchvision.datasets``.
        train: arguments of each part that training images are drawn from. test: of the test images; None: these are
            drawn from ``train`` too.
        val: of the validation images, where the dataset has some that are the published ones.
        label_offset: subtracted from torchvision's label.
    """

    dataset: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any] | None
    val: dict[str, Any] | None = None
    label_offset: int = 0


def _splits(*names: str) -> tuple[dict[str, Any], ...]:
    return tuple({"split": name} for name in names)


TORCHVISION: dict[str, TorchvisionSource] = {
    "cifar": TorchvisionSource("CIFAR100", ({"train": True},), {"train": False}),
    "caltech101": TorchvisionSource("Caltech101", ({},), None),  # without its class of backgrounds
    "dtd": TorchvisionSource("DTD", _splits("train", "val"), {"split": "test"}),
    "oxford_flowers102": TorchvisionSource("Flowers102", _splits("train", "val"), {"split": "test"}),
    "oxford_iiit_pet": TorchvisionSource("OxfordIIITPet", _splits("trainval"), {"split": "test"}),
    "svhn": TorchvisionSource("SVHN", _splits("train"), {"split": "test"}),
    "sun397": TorchvisionSource("SUN397", ({},), None),
    "patch_camelyon": TorchvisionSource("PCAM", _splits("train", "val"), {"split": "test"}),
    "eurosat": TorchvisionSource("EuroSAT", ({},), None),
    # Labels are numbers of objects, 3 to 10.
    "clevr_count": TorchvisionSource("CLEVRClassification", _splits("train"), {"split": "val"}, label_offset=3),
    "OxfordFlowers": TorchvisionSource("Flowers102", _splits("train"), {"split": "test"}, val={"split": "val"}),
    "StanfordCars": TorchvisionSource("StanfordCars", _splits("train"), {"split": "test"}),
}


def prepare_dataset(
    root: str | Path,
    settings: DatasetSettings,
    *,
    downloads: str | Path | None = None,
    download: bool = True,
    seed: int = 0,
    track: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Path:
    """Writes a dataset to ``root/<dataset>`` as PNG files and the split files of its benchmark.

    VTAB-1k: 800 and 200 images drawn from the training images, and all test images, or as many as the published list
    has where torchvision knows no test images. FGVC: validation images drawn from the training images, unless the
    dataset has its own. Images are copied without loss.

    Args:
        root: gets one folder more.
        settings: of the dataset; its name must be in :data:`TORCHVISION`.
        downloads: where torchvision keeps its archives; default: ``root/torchvision``.
        download: whether torchvision may fetch them.
        seed: of what is drawn.
        track: wraps the images to show progress; gets them and their number.

    Returns:
        The dataset's folder.

    Raises:
        ValueError: torchvision does not have the dataset, or fewer images than needed.
        FileExistsError: the folder is there already.
        OSError: the archives are missing or cannot be fetched.
    """
    if settings.name not in TORCHVISION:
        raise ValueError(
            f"torchvision does not have the dataset {settings.name}, the published archive is needed; "
            f"it has {', '.join(TORCHVISION)}"
        )
    root = Path(root)
    folder = root / settings.name
    if folder.exists():
        raise FileExistsError(f"the dataset folder {folder} exists already; remove it to prepare it anew")
    source = TORCHVISION[settings.name]
    parts = _draw(source, settings, Path(downloads or root / "torchvision"), download, seed)
    items = [(name, image, index) for name, chosen in parts.items() for image, index in chosen]
    written: dict[str, list[tuple[str, int]]] = {name: [] for name in parts}
    with new_folder(folder) as partial:
        (partial / "images").mkdir()
        for name, dataset, index in track(items, len(items)):
            image, label = dataset[index]
            path = f"images/{name}_{len(written[name]):06}.png"
            _rgb(image).save(partial / path)
            written[name].append((path, int(label) - source.label_offset))
        _write_splits(partial, settings, written)
        document = {
            "source": f"torchvision's {source.dataset}",
            "seed": seed,
            "published_split": source.val is not None,
        }
        (partial / SOURCE).write_text(json.dumps(document, indent=2) + "\n")
    return folder


def _draw(
    source: TorchvisionSource, settings: DatasetSettings, downloads: Path, download: bool, seed: int
) -> dict[str, list[tuple[Any, int]]]:
    """(dataset, index) of the images of each split."""
    from torchvision import datasets

    def every(arguments: dict[str, Any]) -> list[tuple[Any, int]]:
        try:
            part = getattr(datasets, source.dataset)(str(downloads), download=download, **arguments)
        except (OSError, RuntimeError, ImportError) as error:  # no network, "not found or corrupted", no h5py or scipy
            raise OSError(f"torchvision could not fetch or read {source.dataset} in {downloads}: {error}") from error
        return [(part, index) for index in range(len(part))]

    first, second = ("train800", "val200") if settings.benchmark == "vtab" else ("train", "val")
    sizes = settings.sizes
    pool = [item for arguments in source.train for item in every(arguments)]
    random.Random(f"{seed} {settings.name}").shuffle(pool)
    parts: dict[str, list[tuple[Any, int]]] = {}
    if source.val is not None:
        parts[second], parts[first] = every(source.val), pool
    else:
        # All that is left trains in FGVC; VTAB-1k has a thousand images whatever the dataset has.
        count = sizes[first] if settings.benchmark == "vtab" else len(pool) - sizes[second]
        parts[first], parts[second] = pool[:count], pool[count : count + sizes[second]]
    if source.test is not None:
        parts["test"] = every(source.test)
    else:
        used = sizes[first] + sizes[second]
        parts["test"] = pool[used : used + sizes["test"]]
    short = [name for name, needed in ((first, sizes[first]), (second, sizes[second])) if len(parts[name]) < needed]
    short += [] if parts["test"] else ["test"]
    if short:
        raise ValueError(
            f"torchvision's {source.dataset} has too few images for {', '.join(short)} of {settings.name}: "
            f"{len(pool):,} training images"
        )
    return parts


def _write_splits(folder: Path, settings: DatasetSettings, written: dict[str, list[tuple[str, int]]]) -> None:
    if settings.benchmark == "fgvc":
        for name, entries in written.items():
            (folder / f"{name}.json").write_text(json.dumps(dict(entries), indent=0) + "\n")
        return
    written = written | {"train800val200": written["train800"] + written["val200"]}
    for name, entries in written.items():
        (folder / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in entries))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
