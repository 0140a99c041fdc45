"""The paper's ablations: one side, no residual, the start, the layers, ΔW without ⊙ W; as a grid of runs and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrr_kernels.paper.hyperparameters import SEED
from rlrr_kernels.paper.reproduce import ReproduceConfig, check_datasets, grid_runs
from rlrr_kernels.train.config.files import check_types
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.grid.runs import GridRun, Spread, run_grid
from rlrr_kernels.train.models.backbones import HUB
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.writing import write_together

NAME = "ablation"
"""Of the files that hold the tables."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of RLRR: its line in a table, and what it changes in a :class:`FinetuneConfig`."""

    title: str
    settings: Mapping[str, Any]


def _side(sides: str, residual: bool) -> Variant:
    title = {"both": "W ⊙ {} s_r s_c", "left": "W ⊙ {} s_r", "right": "W ⊙ {} s_c"}[sides]
    return Variant(title.format("(1 +" if residual else "(") + ")", {"sides": sides, "residual": residual})


VARIANTS = {
    **{sides: _side(sides, True) for sides in ("left", "right", "both")},
    **{f"{sides}-no-residual": _side(sides, False) for sides in ("left", "right", "both")},
    "identity": Variant("identity: s_r = 0", {"init": "identity"}),
    "normal": Variant("normal: N(0, 0.02)", {"init": "normal"}),
    "attention": Variant("attention", {"layers": "attention"}),
    "mlp": Variant("MLPs", {"layers": "mlp"}),
    "qkv": Variant("q, k and v", {"layers": "qkv"}),
    "additive": Variant("W + s_r s_c", {"form": "additive"}),
}
"""``both`` is RLRR as it is."""

STUDIES = {
    "sides": tuple(name for name in VARIANTS if VARIANTS[name].settings.keys() == {"sides", "residual"}),
    "init": ("both", "identity", "normal"),
    "layers": ("both", "attention", "mlp", "qkv"),
    "form": ("both", "additive"),
}

REPORTED_SIDES = {
    "left-no-residual": 89.2,
    "right-no-residual": 89.3,
    "both-no-residual": 88.9,
    "left": 89.5,
    "right": 89.7,
    "both": 90.4,
}
"""The paper's mean accuracy over FGVC, in percent."""

REPORTED_INIT = {"both": (82.7, 85.8, 61.8), "identity": (82.4, 85.1, 60.8), "normal": (82.9, 85.4, 61.4)}
"""The paper's means over VTAB-1k's Natural, Specialized and Structured, in percent; there ``zeros`` for identity."""

_DEFAULT_TITLES = {"init": "paper: s_r ~ U(±√6), s_c ~ U(±√(6/K))", "layers": "all", "form": "W ⊙ (1 + s_r s_c)"}


_ONLY_WITH = {"data": ("lr", "weight_decay", "batch_size", "augment"), "benchmark": ("tasks",)}
"""Settings of :class:`AblateConfig` that mean nothing beside the other source of images."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the runs of a variant gave: accuracy by seed (a mean over datasets), and how many parameters it trains."""

    accuracies: tuple[float, ...]
    trained: int


def select_variants(studies: Sequence[str]) -> list[str]:
    """Names of the variants that ``studies`` compare, each once.

    Raises:
        ValueError: a study is unknown.
    """
    unknown = [name for name in studies if name not in STUDIES]
    if unknown:
        raise ValueError(f"a study must be one of {', '.join(STUDIES)}; got {', '.join(unknown)}")
    return list(dict.fromkeys(name for study in studies for name in STUDIES[study]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """The runs of RLRR as it is that an ablation varies: on an image folder, or on the paper's datasets.

    Args:
        model: the backbone's name in timm, e.g. vit_base_patch16_224.augreg_in21k.
        data: image folder: FOLDER/<class>/<image> or FOLDER/{train,val,test}/<class>/<image>.
        benchmark: in place of ``data``: ``vtab`` or ``fgvc`` by the paper's settings, the honest split.
        root: with ``benchmark``: folder that holds one folder a dataset.
        tasks: with ``benchmark``: only these datasets.
        out: gets a folder a variant, ``ablation.md`` and ``ablation.json``.
        study: only these of ``sides``, ``init``, ``layers`` and ``form``.
        weights: of the backbone: ``hub`` fetches them, ``none`` is a random start, anything else is a file.
        seeds: how many, from 42 on.
        epochs: of every run; None: 20 with ``data``, else the paper's.
        lr: with ``data``: learning rate of every run.
        weight_decay: with ``data``: weight decay of every run.
        batch_size: with ``data``: images a step.
        augment: with ``data``: ``none``, ``flip``, ``crop`` or ``timm``.
        image_size: pixels; None: what the weights were made for, or the paper's.
        mixed_precision: ``no`` (float32), ``fp16``, ``bf16``, or ``auto``: 16 bits where the device computes with them.
        cpu: leave a GPU alone.

    Raises:
        ValueError: a study is unknown, there are not either ``data`` or ``benchmark`` and ``root``, a setting goes with
            the other of them, or there are no seeds.
    """

    model: str
    data: Path | None = None
    benchmark: str | None = None
    root: Path | None = None
    tasks: tuple[str, ...] = ()
    out: Path = Path("runs/ablate")
    study: tuple[str, ...] = ()
    weights: str | Path = HUB
    seeds: int = 3
    epochs: int | None = None
    lr: float = 3e-3
    weight_decay: float = 5e-5
    batch_size: int = 32
    augment: str = "flip"
    image_size: int | None = None
    mixed_precision: str = "auto"
    cpu: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if (self.data is None) == (self.benchmark is None) or (self.benchmark is None) != (self.root is None):
            raise ValueError("give either --data, an image folder, or --benchmark together with --root")
        kind, other = ("data", "benchmark") if self.benchmark is None else ("benchmark", "data")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        idle = [name for name in _ONLY_WITH[other] if getattr(self, name) != defaults[name]]
        if idle:
            raise ValueError(f"{', '.join(idle)} can be given with {other} alone; got {kind}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1; got {self.seeds}")
        select_variants(self.study)

    def runs(self) -> list[GridRun]:
        """One a seed, and a dataset of the benchmark, whose lists are all read first.

        Raises:
            FileNotFoundError, ValueError: a setting is not allowed, or a dataset of the benchmark cannot be used.
        """
        given = {name: value for name in ("epochs", "image_size") if (value := getattr(self, name)) is not None}
        same = {name: getattr(self, name) for name in ("model", "weights", "cpu")}
        if self.benchmark is not None:
            names = ("benchmark", "root", "out", "seeds", "tasks", "mixed_precision")
            config = ReproduceConfig(**{name: getattr(self, name) for name in names}, **same, **given)
            check_datasets(config)
            return grid_runs(config)
        size = given.pop("image_size", None)
        train = TrainConfig(batch_size=self.batch_size, mixed_precision=self.mixed_precision, **given)
        names = ("data", "lr", "weight_decay", "augment")
        config = FinetuneConfig(**{name: getattr(self, name) for name in names}, **same, image_size=size, train=train)
        return seed_runs(config, range(SEED, SEED + self.seeds))


def seed_runs(config: FinetuneConfig, seeds: Iterable[int]) -> list[GridRun]:
    """``config`` once a seed, named ``seed-1``, ..."""
    return [
        GridRun(f"seed-{seed}", dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)))
        for seed in seeds
    ]


def ablate(
    runs: Sequence[GridRun], out: str | Path, *, studies: Sequence[str] = tuple(STUDIES), quiet: bool = False
) -> str:
    """Does every run of ``runs`` in every variant of the studies, and writes the tables after each.

    Args:
        runs: of RLRR as it is, named ``seed-<n>`` or ``<dataset>/seed-<n>``; done in this order, all variants of a run
            before the next one.
        out: gets a folder a variant with these runs in it, and ``ablation.md`` and ``ablation.json``.
        studies: which of :data:`STUDIES`.
        quiet: print nothing.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError, OSError: as for :func:`select_variants` and :func:`rlrr_kernels.train.grid.runs.run_grid`.
    """
    variants = select_variants(studies)
    grid = [
        dataclasses.replace(run, name=f"{name}/{run.name}", config=_varied(run.config, name))
        for run in runs
        for name in variants
    ]
    done: dict[str, dict[str, Any]] = {}

    def keep(name: str, result: dict[str, Any]) -> None:
        done[name] = result
        _write(out, studies, done)

    run_grid(grid, out, keep_checkpoints=False, on_result=keep, quiet=quiet)
    return _write(out, studies, done)


def _varied(config: FinetuneConfig, name: str) -> FinetuneConfig:
    return dataclasses.replace(config, **VARIANTS[name].settings)


def _write(out: str | Path, studies: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> str:
    images = "test" if all(result["test"] is not None for result in done.values()) else "validation"
    scores = gather(done, images)
    text = tables(scores, studies, images)
    rows = [
        {"run": name, "variant": name.partition("/")[0], "images": images, "accuracy": result[images]["accuracy"]}
        | {key: result[key] for key in ("trained_parameters", "epoch", "epoch_chosen_on", "seconds", "settings")}
        for name, result in done.items()
    ]
    write_together(Path(out), {f"{NAME}.json": json.dumps(rows, indent=1).encode(), f"{NAME}.md": text.encode()})
    return text


def gather(results: Mapping[str, Mapping[str, Any]], images: str) -> dict[str, Scores]:
    """Variant → scores on the ``test`` or ``validation`` images of result documents by ``variant/[dataset/]seed``.

    A seed whose datasets are not all done is left out: a mean over fewer of them would be of something else.
    """
    by_variant: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for name, result in results.items():
        variant, *dataset, seed = name.split("/")
        by_variant.setdefault(variant, {}).setdefault(seed, {})["/".join(dataset)] = result
    datasets = {dataset for seeds in by_variant.values() for found in seeds.values() for dataset in found}
    scores = {}
    for variant, seeds in by_variant.items():
        whole = [found for found in seeds.values() if set(found) == datasets]
        if whole:
            accuracies = tuple(
                sum(result[images]["accuracy"] for result in found.values()) / len(found) for found in whole
            )
            trained = [result["trained_parameters"] for result in whole[0].values()]
            scores[variant] = Scores(accuracies, round(sum(trained) / len(trained)))
    return scores


def tables(scores: Mapping[str, Scores], studies: Sequence[str], images: str) -> str:
    """One Markdown table a study, in percent; ``sides`` in the paper's form with its numbers beside ours."""
    seeds = sorted({len(entry.accuracies) for entry in scores.values()})
    lines = [
        f"Accuracy on the {images} images in percent, mean ± standard deviation over seeds ("
        + (" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "none yet")
        + "). The paper's figures are of other data, which the column names.",
        "",
    ]
    for study in studies:
        lines += _SECTIONS.get(study, _section)(study, scores)
    return "\n".join(lines)


def _sides(study: str, scores: Mapping[str, Scores]) -> list[str]:
    columns = ("left: s_r", "right: s_c", "both")
    lines = ["## Sides and residual", "", "| | " + " | ".join(columns) + " |", "|---" * 4 + "|"]
    for title, end in (("without residual", "-no-residual"), ("with residual", "")):
        names = [f"{side}{end}" for side in ("left", "right", "both")]
        lines.append(f"| {title}, ours | " + " | ".join(_cell(scores.get(name)) for name in names) + " |")
        lines.append(f"| {title}, paper: mean of FGVC | {' | '.join(f'{REPORTED_SIDES[n]:.1f}' for n in names)} |")
    return [*lines, ""]


def _init(study: str, scores: Mapping[str, Scores]) -> list[str]:
    header = ("start", "ours", "paper: Natural", "Specialized", "Structured (VTAB-1k)")
    lines = ["## Start", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in STUDIES["init"]:
        reported = (f"{value:.1f}" for value in REPORTED_INIT[name])
        lines.append(f"| {_title(study, name)} | {_cell(scores.get(name))} | {' | '.join(reported)} |")
    return [*lines, "", "The paper's second line is of zeros.", ""]


def _section(study: str, scores: Mapping[str, Scores]) -> list[str]:
    lines = [f"## {study.capitalize()}", "", f"| {study} | trained parameters | ours |", "|---|---|---|"]
    for name in STUDIES[study]:
        trained = f"{scores[name].trained:,}" if name in scores else "-"
        lines.append(f"| {_title(study, name)} | {trained} | {_cell(scores.get(name))} |")
    return [*lines, ""]


_SECTIONS: dict[str, Callable[[str, Mapping[str, Scores]], list[str]]] = {"sides": _sides, "init": _init}


def _title(study: str, name: str) -> str:
    return _DEFAULT_TITLES[study] if name == "both" else VARIANTS[name].title


def _cell(scores: Scores | None) -> str:
    if scores is None:
        return "-"
    spread = Spread.of(100 * accuracy for accuracy in scores.accuracies)
    return f"{spread.mean:.1f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.1f}")
