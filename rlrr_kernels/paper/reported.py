"""The accuracies that the paper and its rivals report, in percent (Dong et al., CVPR 2024)."""

from __future__ import annotations

import dataclasses

from rlrr_kernels.paper.hyperparameters import GROUPS, dataset_names


@dataclasses.dataclass(frozen=True)
class Reported:
    """One row of the paper's tables.

    Attributes:
        model: its name in the paper; an asterisk there is ``AugReg`` here.
        benchmark: ``vtab`` or ``fgvc``.
        tasks: dataset → accuracy; datasets whose figure is not known are left out.
        groups: group of VTAB-1k → mean accuracy, as printed; empty where the paper prints tasks.
        over_tasks: the printed mean over the tasks. over_groups: the often quoted mean over the three groups.
    """

    model: str
    benchmark: str
    tasks: dict[str, float]
    groups: dict[str, float]
    over_tasks: float
    over_groups: float | None = None


# fmt: off
_VTAB_TASKS = {
    # CIFAR Caltech DTD  Flowers Pets SVHN  SUN  | Camelyon EuroSAT Resisc Retino |
    # C-cnt C-dist DMLab KITTI dS-loc dS-ori sN-azi sN-ele
    "ViT-B/16": (
        75.6, 92.4, 72.9, 99.3, 91.5, 89.8, 57.0,   86.8, 95.2, 85.3, 75.9,
        79.7, 64.2, 53.9, 82.1, 83.9, 53.7, 33.4, 43.6,
    ),
    # Of dSprites location, 81 to 83 is all that is known.
    "ViT-B/16 AugReg": (
        76.7, 92.7, 76.3, 99.6, 92.6, 91.8, 56.0,   87.8, 96.2, 89.1, 76.3,
        80.4, 63.3, 54.5, 83.3, None, 53.7, 32.0, 41.7,
    ),
}
_VTAB_MEANS = {"ViT-B/16": (74.5, 76.7), "ViT-B/16 AugReg": (75.1, 77.5)}  # over tasks, over groups
_VTAB_GROUPS = {
    # Natural, Specialized, Structured; the mean over tasks
    "ViT-L/16": (83.9, 86.4, 61.9, 75.2),
    "ViT-H/14": (79.4, 85.1, 59.0, 72.0),
    "Swin-B":   (81.3, 86.7, 59.0, 73.0),
}
_FGVC_TASKS = {
    # CUB, NABirds, Flowers, Dogs, Cars; their mean as printed (of the first row's figures it is 90.5)
    "ViT-B/16":        (89.3, 84.7, 99.5, 92.0, 87.0, 90.4),
    "ViT-B/16 AugReg": (89.8, 85.3, 99.6, 90.0, 90.4, 91.0),
}

PEERS = (
    # method on VTAB-1k with a ViT-B/16; mean over tasks
    ("full fine-tuning", 65.6), ("linear probe", 52.9), ("LoRA", 72.3), ("FacT", 73.2), ("ARC", 73.4),
    ("SSF, AugReg", 73.1), ("ARC, AugReg", 74.3),
)
# fmt: on

REPORTED: dict[tuple[str, str], Reported] = (
    {
        ("vtab", model): Reported(
            model=model,
            benchmark="vtab",
            tasks={name: v for name, v in zip(dataset_names("vtab"), values, strict=True) if v is not None},
            groups={},
            over_tasks=_VTAB_MEANS[model][0],
            over_groups=_VTAB_MEANS[model][1],
        )
        for model, values in _VTAB_TASKS.items()
    }
    | {
        ("vtab", model): Reported(model, "vtab", {}, dict(zip(GROUPS, values[:3], strict=True)), values[3])
        for model, values in _VTAB_GROUPS.items()
    }
    | {
        ("fgvc", model): Reported(
            model, "fgvc", dict(zip(dataset_names("fgvc"), values[:5], strict=True)), {}, values[5]
        )
        for model, values in _FGVC_TASKS.items()
    }
)
"""(benchmark, model) → what the paper reports of it."""

_TIMM_NAMES = (
    # beginning of timm's name of a backbone, with its weights' tag where that decides
    ("vit_base_patch16_224.augreg", "ViT-B/16 AugReg"),
    ("vit_base_patch16_224.orig", "ViT-B/16"),
    ("vit_large_patch16_224", "ViT-L/16"),
    ("vit_huge_patch14_224", "ViT-H/14"),
    ("swin_base_patch4_window7_224", "Swin-B"),
)


def reported_models(benchmark: str) -> list[str]:
    """The models the paper reports ``benchmark`` of."""
    return [model for kind, model in REPORTED if kind == benchmark]


def reported_for(benchmark: str, timm_name: str, model: str | None = None) -> Reported | None:
    """What the paper reports for a backbone; None where it has nothing.

    Args:
        benchmark: ``vtab`` or ``fgvc``.
        timm_name: of the backbone. timm's ``augreg`` weights are the paper's asterisk, its ``orig`` ones are not.
        model: the row to take instead, one of :func:`reported_models`.

    Raises:
        ValueError: unknown ``model``.
    """
    if model is not None:
        if (benchmark, model) not in REPORTED:
            raise ValueError(
                f"the paper reports nothing on {benchmark} for {model!r}; it does for "
                f"{', '.join(reported_models(benchmark))}"
            )
        return REPORTED[benchmark, model]
    found = next((row for start, row in _TIMM_NAMES if timm_name.startswith(start)), None)
    return REPORTED.get((benchmark, found)) if found else None
