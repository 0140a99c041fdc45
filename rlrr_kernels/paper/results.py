"""One JSON file a task: the scores of its finished runs, and everything that decides what they can be compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlrr_kernels.paper.hyperparameters import dataset_names
from rlrr_kernels.train.config.files import check_types, read_json
from rlrr_kernels.writing import check_present, write_together

FOLDER = "results"
"""Where the files lie, in the folder of a reproduction."""

_FORMAT = "rlrr_task_results"


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run. Accuracies from 0 to 1; ``validation_accuracy`` None where there were no such images."""

    seed: int
    test_accuracy: float
    validation_accuracy: float | None
    best_epoch: int
    trained_parameters: int
    seconds: float

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the runs of a table were made; results of different protocols do not go into one table.

    Attributes:
        benchmark: ``vtab`` or ``fgvc``.
        model: timm's name. weights: ``hub``, ``none`` or a file's name.
        split: ``paper`` or ``honest``, see :data:`rlrr_kernels.paper.data.SPLITS`.
        epoch_chosen_on: ``test`` or ``validation``.
        image_size: pixels.
        epochs: of each run. paper_epochs: the paper's; a run with another number is a trial.
        augmented: whether mixup, cutmix, smoothing and averaged weights were used (FGVC).
        schedule: ``ran`` or ``meant``, see :func:`rlrr_kernels.train.config.presets.paper_train_config`.
        method: ``rlrr``, or one to compare it with.
    """

    benchmark: str
    model: str
    weights: str
    split: str
    epoch_chosen_on: str
    image_size: int
    epochs: int
    paper_epochs: int
    augmented: bool = False
    schedule: str = "ran"
    method: str = "rlrr"

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """The finished runs of a dataset.

    Attributes:
        dataset: its name.
        protocol: of the runs.
        seeds: all that were asked for, finished or not.
        runs: the finished ones.
        note: what to say beside the result, such as that the split is not the published one.
    """

    dataset: str
    protocol: Protocol
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    note: str | None = None

    def __post_init__(self) -> None:
        check_types(self)


def write_results(folder: str | Path, results: TaskResults) -> Path:
    """Writes ``folder/<dataset>.json``, replacing an older one in one step.

    Raises:
        OSError: it cannot be written; the older one is still there.
    """
    document = {"format": _FORMAT, "version": 1} | dataclasses.asdict(results)
    name = f"{results.dataset}.json"
    write_together(Path(folder), {name: (json.dumps(document, indent=2) + "\n").encode()})
    return Path(folder) / name


def read_results(folder: str | Path) -> dict[str, TaskResults]:
    """Reads the results files in ``folder``, or in its folder ``results``; by dataset, in the paper's order.

    Raises:
        FileNotFoundError: the folder does not exist or holds none.
        ValueError: a file is damaged, of an unknown dataset, or the files are of different protocols.
    """
    folder = Path(folder)
    check_present(folder, "the results folder", folder=True)
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no results (<dataset>.json), as rlrr reproduce writes them")
    found = {}
    for file in files:
        results = _read(file)
        found[results.dataset] = results
    first = next(iter(found.values()))
    for results in found.values():
        ours, theirs = dataclasses.asdict(first.protocol), dataclasses.asdict(results.protocol)
        differing = [f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
        if differing:
            raise ValueError(
                f"the results of {first.dataset} and {results.dataset} in {folder} do not belong in one table: "
                + ", ".join(differing)
            )
    return {name: found[name] for name in dataset_names(first.protocol.benchmark) if name in found}


def _read(file: Path) -> TaskResults:
    try:
        document: dict[str, Any] = read_json(file)
        if document.pop("format", None) != _FORMAT or document.pop("version", None) != 1:
            raise ValueError("it is of another format or version")
        document["protocol"] = Protocol(**document["protocol"])
        document["runs"] = tuple(Run(**run) for run in document["runs"])
        document["seeds"] = tuple(document["seeds"])
        results = TaskResults(**document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is damaged or no results file of rlrr reproduce: {reason}") from error
    if results.dataset not in dataset_names(results.protocol.benchmark):
        raise ValueError(f"{file} is of {results.dataset!r}, which is no dataset of {results.protocol.benchmark}")
    return results
