"""The datasets of the paper's tables: what each one is, how the authors trained on it, how many images it has."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

BENCHMARKS = ("vtab", "fgvc")

GROUPS = ("Natural", "Specialized", "Structured")
"""Of the VTAB-1k tasks, in the paper's order."""

SEED = 42
"""The authors'. Further ones are 43, 44, ..."""


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """One dataset of the paper.

    Attributes:
        name: of its folder.
        title: of its column in the paper's table.
        benchmark: ``vtab`` or ``fgvc``.
        group: one of :data:`GROUPS`; ``FGVC`` for the fine-grained ones.
        classes: their number.
        lr, weight_decay: of AdamW.
        drop: rate of the dropout on the branches of the last block; it rises linearly over the depth.
        flip: whether training images are flipped (always, after a random crop, in FGVC).
        restarts: whether the learning rate restarts every 5 epochs (with augmentation it does so everywhere).
        drop_last: whether a short last batch is left out in runs with augmentation.
        sizes: split file, without ending → expected number of images.
        varying: the splits whose published number is not the same everywhere: another one is worth a warning only.
        image_folder: where, inside its folder, the paths of an FGVC split file start.
    """

    name: str
    title: str
    benchmark: str
    group: str
    classes: int
    lr: float
    weight_decay: float
    drop: float
    flip: bool
    restarts: bool
    drop_last: bool
    sizes: dict[str, int]
    varying: tuple[str, ...]
    image_folder: str = "."


# fmt: off
# VTAB-1k, in the order of the paper's table. Test sizes: the lists made from the TensorFlow datasets; Caltech-101's has
# 6,084 or 6,085 images by the version of that dataset.
_VTAB = (
    # name                  title          group          classes    lr    wd  drop  flip    test
    ("cifar",               "CIFAR-100",   "Natural",         100, 3e-3, 5e-5,  .1, False, 10000),
    ("caltech101",          "Caltech101",  "Natural",         102, 1e-3, 5e-5,  .1, False,  6084),
    ("dtd",                 "DTD",         "Natural",          47, 2e-3, 5e-5,  .1, True,   1880),
    ("oxford_flowers102",   "Flowers102",  "Natural",         102, 3e-3, 5e-2,  .3, False,  6149),
    ("oxford_iiit_pet",     "Pets",        "Natural",          37, 1e-3, 5e-5,  .1, True,   3669),
    ("svhn",                "SVHN",        "Natural",          10, 5e-3, 5e-5,  .3, False, 26032),
    ("sun397",              "SUN397",      "Natural",         397, 1e-3, 5e-5,  .1, False, 21750),
    ("patch_camelyon",      "Camelyon",    "Specialized",       2, 3e-3, 5e-2,  .3, True,  32768),
    ("eurosat",             "EuroSAT",     "Specialized",      10, 1e-3, 5e-5,  .1, True,   5400),
    ("resisc45",            "Resisc45",    "Specialized",      45, 3e-3, 5e-5,  .0, False,  6300),
    ("diabetic_retinopathy", "Retinopathy", "Specialized",      5, 5e-3, 5e-5,  .1, True,  42670),
    ("clevr_count",         "Clevr-Count", "Structured",        8, 5e-3, 5e-5,  .5, True,  15000),
    ("clevr_dist",          "Clevr-Dist",  "Structured",        6, 1e-2, 5e-5,  .2, True,  15000),
    ("dmlab",               "DMLab",       "Structured",        6, 5e-3, 5e-5,  .3, True,  22735),
    ("kitti",               "KITTI-Dist",  "Structured",        4, 3e-3, 5e-2,  .3, True,    711),
    ("dsprites_loc",        "dSpr-Loc",    "Structured",       16, 1e-2, 5e-5,  .1, False, 73728),
    ("dsprites_ori",        "dSpr-Ori",    "Structured",       16, 5e-3, 5e-5,  .1, False, 73728),
    ("smallnorb_azi",       "sNORB-Azim",  "Structured",       18, 5e-3, 5e-2,  .3, False, 12150),
    ("smallnorb_ele",       "sNORB-Elev",  "Structured",        9, 1e-3, 5e-5,  .3, True,  12150),
)

# FGVC, in the order of the paper's table. Sizes: the splits published with VPT (repository KMnP/vpt); where a dataset
# has no validation images of its own, a tenth of its training images was drawn at random for them, so these two vary.
_FGVC = (
    # name             title       classes    lr    wd drop  restarts last   train   val   test drawn  images
    ("CUB_200_2011",   "CUB",          200, 3e-3, 5e-2, .1, True,  False,  5394,  600,  5794, True,  "images"),
    ("NABirds",        "NABirds",      555, 5e-4, 5e-2, .3, False, True,  21536, 2393, 24633, True,  "images"),
    ("OxfordFlowers",  "Flowers",      102, 3e-3, 5e-2, .2, False, False,  1020, 1020,  6149, False, "."),
    ("StanfordDogs",   "Dogs",         120, 1e-4, 5e-2, .0, True,  False, 10800, 1200,  8580, True,  "Images"),
    ("StanfordCars",   "Cars",         196, 3e-3, 5e-2, .2, False, False,  7329,  815,  8041, True,  "."),
)
# fmt: on

DATASETS: dict[str, DatasetSettings] = {
    name: DatasetSettings(
        name=name,
        title=title,
        benchmark="vtab",
        group=group,
        classes=classes,
        lr=lr,
        weight_decay=weight_decay,
        drop=drop,
        flip=flip,
        restarts=False,
        drop_last=False,
        sizes={"train800": 800, "val200": 200, "train800val200": 1000, "test": test},
        varying=("test",) if name == "caltech101" else (),
    )
    for name, title, group, classes, lr, weight_decay, drop, flip, test in _VTAB
} | {
    name: DatasetSettings(
        name=name,
        title=title,
        benchmark="fgvc",
        group="FGVC",
        classes=classes,
        lr=lr,
        weight_decay=weight_decay,
        drop=drop,
        flip=True,
        restarts=restarts,
        drop_last=drop_last,
        sizes={"train": train, "val": val, "trainval": train + val, "test": test},
        varying=("train", "val") if drawn else (),
        image_folder=images,
    )
    for name, title, classes, lr, weight_decay, drop, restarts, drop_last, train, val, test, drawn, images in _FGVC
}
"""Every dataset by name: the 19 tasks of VTAB-1k, then the five of FGVC, each in the paper's order."""


def dataset_names(benchmark: str | None = None) -> list[str]:
    """The names of all datasets, or of those of a benchmark, in the paper's order.

    Raises:
        ValueError: unknown benchmark.
    """
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}; got {benchmark!r}")
    return [name for name, settings in DATASETS.items() if benchmark in (None, settings.benchmark)]


def dataset_settings(name: str, benchmark: str | None = None) -> DatasetSettings:
    """The settings of a dataset.

    Args:
        name: a folder's name, as in :data:`DATASETS`; upper and lower case count.
        benchmark: that it must belong to; None: any.

    Raises:
        ValueError: unknown name; the nearest are suggested.
    """
    names = dataset_names(benchmark)
    if name not in names:
        spellings = {known.lower(): known for known in names}
        spellings |= {DATASETS[known].title.lower(): known for known in names}
        nearest = difflib.get_close_matches(name.lower(), spellings, n=2, cutoff=0.5)
        suggestions = list(dict.fromkeys(spellings[spelling] for spelling in nearest))
        hint = f"did you mean {' or '.join(suggestions)}?" if suggestions else f"there are {', '.join(names)}"
        what = "dataset" if benchmark is None else f"dataset of {benchmark}"
        raise ValueError(f"there is no {what} called {name!r}; {hint}")
    return DATASETS[name]


def selected_datasets(benchmark: str, names: Sequence[str] | None) -> list[DatasetSettings]:
    """The datasets of a benchmark, or of it those named, in the paper's order.

    Raises:
        ValueError: unknown benchmark or name.
    """
    chosen = {dataset_settings(name, benchmark).name for name in names} if names else set(dataset_names(benchmark))
    return [DATASETS[name] for name in dataset_names(benchmark) if name in chosen]
