"""The settings of a run as plain data: what makes its numbers what they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrr_kernels.train.config.train_config import CHANGES_NO_NUMBER

if TYPE_CHECKING:
    from rlrr_kernels.train.finetune import FinetuneConfig

_CHANGES_NO_NUMBER = ("out", "check", "cpu", "recompute", *(f"train.{name}" for name in CHANGES_NO_NUMBER))


def settings_of(config: FinetuneConfig) -> dict[str, Any]:
    """All settings of ``config`` that change a number, as JSON types, those of training as ``train.epochs``.

    Files and folders by their name alone, so that a result can be moved and shared.
    """
    values = dataclasses.asdict(config)
    values |= {f"train.{name}": value for name, value in values.pop("train").items()}
    for name in _CHANGES_NO_NUMBER:
        del values[name]
    for name in ("data", "weights"):
        values[name] = None if values[name] is None else Path(values[name]).name
    return json.loads(json.dumps(values))


def differing_settings(config: FinetuneConfig, written: dict[str, Any]) -> list[str]:
    """``name was X, is Y`` for every setting of ``config`` that is another in ``written``, by :func:`settings_of`.

    A setting that did not exist when ``written`` was made had what is now its default.
    """
    ours = settings_of(config)
    defaults = settings_of(type(config)(model="", out=Path()))
    return [
        f"{name} was {theirs}, is {value}"
        for name, value in ours.items()
        if (theirs := written.get(name, defaults[name])) != value
    ]
