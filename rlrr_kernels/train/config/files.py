"""Configurations as JSON files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON types; paths are made absolute, so that the document means the same from anywhere."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(entry) for entry in value]
        return str(value.resolve()) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def config_from_dict(kind: type, values: Mapping[str, Any]) -> Any:
    """What :func:`config_to_dict` made of a ``kind``.

    Raises:
        ValueError: a setting that ``kind`` does not have (the nearest is suggested) or lacks, or a value not allowed.
    """
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{kind.__name__} has no setting {', '.join(map(repr, unknown))}{hint}")
    missing = [field.name for field in dataclasses.fields(kind) if is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"{kind.__name__} needs the setting {', '.join(map(repr, missing))}")
    return kind(**{name: _restored(hints[name], value) for name, value in values.items()})


def _restored(hint: Any, value: Any) -> Any:
    kinds = alternatives(hint)
    nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if nested is not None and isinstance(value, Mapping):
        return config_from_dict(nested, value)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return Path(value) if Path in kinds and str not in kinds and value is not None else value


def write_config(config: Any) -> bytes:
    """The JSON document of a configuration."""
    return json.dumps({"schema_version": SCHEMA_VERSION} | config_to_dict(config), indent=2).encode()


def read_config(kind: type, file: str | Path) -> Any:
    """The configuration of type ``kind`` in ``file``, as :func:`write_config` made it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is truncated, of another version, or not of a ``kind``; names the file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"the configuration file {file} does not exist")
    try:
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict) or values.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"it has no schema_version {SCHEMA_VERSION}")
        return config_from_dict(kind, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no configuration of a run: {error}") from error


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that ``hint`` is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def is_required(field: dataclasses.Field) -> bool:
    """Whether a dataclass cannot be made without a value for ``field``."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
