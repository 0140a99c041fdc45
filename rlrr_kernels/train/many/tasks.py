"""Which tasks are trained together: from a TOML file, from the command line, or both."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrr_kernels.train.config.files import read_text
from rlrr_kernels.train.config.options import config_of_options, options_of
from rlrr_kernels.train.grid.runs import check_names
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS
from rlrr_kernels.train.run.config import FinetuneConfig

SETTINGS = tuple(option.name for option in options_of(FinetuneConfig))
"""What a task can set: the options of ``rlrr finetune``, by their names in Python."""

_TABLE = "tasks"
_PATHS = ("data", "weights", "out")


def read_tasks(file: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings for all tasks and those of each task, by name, in a TOML file::

        model = "vit_base_patch16_224.augreg_in21k"
        epochs = 20

        [tasks.birds]
        data = "data/birds"
        lr = 1e-3

    Relative paths start at the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, has no task, or a setting that ``rlrr finetune`` does not have (the nearest is
            suggested).
        ImportError: Python is older than 3.11, which cannot read TOML.
    """
    try:
        import tomllib
    except ImportError as error:
        raise ImportError("a file of tasks needs Python 3.11; name the tasks with --task NAME=FOLDER") from error
    file = Path(file)
    text = read_text(file, "the file of tasks")
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    tables = document.pop(_TABLE, None)
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError(f'{file} must have a table for each task, such as [{_TABLE}.birds] with data = "FOLDER"')
    shared = _settings(document, str(file), file.parent)
    return shared, {name: _settings(table, f"{file}, task {name}", file.parent) for name, table in tables.items()}


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a task given as ``NAME=FOLDER`` or ``NAME=FOLDER,lr=1e-3,epochs=50``.

    A comma that no ``setting=`` follows is part of the folder's name.

    Raises:
        ValueError: it is none, or a setting is unknown.
    """
    name, equals, rest = text.partition("=")
    folder, *settings = re.split(r",(?=[\w-]+=)", rest)
    if not (name and equals and folder):
        raise ValueError(f"a task must be NAME=FOLDER or NAME=FOLDER,lr=1e-3,...; got {text!r}")
    values = {key: _value(value) for key, _, value in (setting.partition("=") for setting in settings)}
    return name, _settings({"data": folder} | values, f"task {name}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _settings(given: Mapping[str, Any], where: str, folder: Path | None = None) -> dict[str, Any]:
    """``given`` by the names in Python, paths from ``folder``."""
    settings = {name.replace("-", "_"): value for name, value in given.items()}
    for name, value in settings.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: rlrr finetune has no setting {name!r}{hint}")
        if folder is not None and name in _PATHS and isinstance(value, str) and value not in (HUB, NO_WEIGHTS):
            settings[name] = str(folder / value)
    return settings


def configs_of(shared: Mapping[str, Any], tasks: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, FinetuneConfig]:
    """Name → the run of each task, in the folder of its name under ``shared["out"]``.

    Args:
        shared: settings for all tasks, by name.
        tasks: name and own settings of each, which come before the shared ones.

    Raises:
        ValueError: a name occurs twice or cannot be a folder's, or a value is not allowed; the task is named.
    """
    if not tasks:
        raise ValueError("no task is given; name them with --task NAME=FOLDER, or in a file with --tasks FILE.toml")
    names = [name for name, _ in tasks]
    check_names(names)
    for name in names:
        if "/" in name or name.startswith("."):
            raise ValueError(f"the name of a task must be that of a folder, without a slash or first dot; got {name!r}")
    configs = {}
    for name, own in tasks:
        settings = dict(shared) | own
        if "out" in own:
            raise ValueError(f"task {name}: out is set for all tasks, which get the folders of their names there")
        settings["out"] = Path(shared["out"]) / name
        try:
            configs[name] = config_of_options(FinetuneConfig, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"task {name}: {error}") from error
    return configs
