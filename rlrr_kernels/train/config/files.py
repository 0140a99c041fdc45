"""Configurations: their values against their types, whoever makes them, and as JSON files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.writing import check_present

SCHEMA_VERSION = 1


def check_types(config: Any) -> None:
    """Checks every setting of a frozen dataclass, in its ``__post_init__``, against the type it is declared with.

    A whole number may stand for a float, a text for a path (which it becomes), a list for a tuple; nothing else may
    stand for anything: neither 2.5 for a whole number nor "false" or 0 for a truth value.

    Raises:
        ValueError: names the setting, what it must be, and what it is.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), alternatives(hint)
        if isinstance(value, str) and Path in kinds and str not in kinds:
            value = Path(value)
        elif isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
            value = tuple(value)
        if not any(_is_of(kind, value) for kind in kinds):
            expected = " or ".join(_NAMES.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
            raise ValueError(f"{name} must be {expected}; got {value!r}")
        object.__setattr__(config, name, value)


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    types.NoneType: "left out",
    tuple[str, ...]: "texts",
    tuple[float, ...]: "numbers",
}


def _is_of(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(typing.get_args(kind)[0], entry) for entry in value)
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float))
        return number and not isinstance(value, bool) and abs(value) < _LARGEST
    kind = typing.get_origin(kind) or kind
    return kind is Any or (isinstance(value, kind) and (not isinstance(value, str | Path) or _is_text(str(value))))


def _is_text(value: str) -> bool:
    """Whether a file could be called so: without NUL, and bytes of other encodings only as Python stands for them."""
    try:
        return b"\0" not in value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


_LARGEST = 2**63
"""Beyond it, a whole number is none that the machine computes with; infinity and NaN are no numbers either."""


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


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is truncated, no JSON, or nested deeper than can be read; names it.
    """
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no JSON: {error}") from error


def read_text(file: Path, what: str) -> str:
    """The text in ``file``.

    Raises:
        FileNotFoundError: it does not exist; calls it ``what``.
        ValueError: it is no text in UTF-8; names file and line.
    """
    check_present(file, what, folder=False)
    try:
        return file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not a text file in UTF-8") from error


def _restored(hint: Any, value: Any) -> Any:
    kinds = alternatives(hint)
    nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if nested is not None and isinstance(value, Mapping):
        return config_from_dict(nested, value)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return Path(value) if Path in kinds and str not in kinds and isinstance(value, str) else value


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
    check_present(file, "the configuration file", folder=False)
    values = read_json(file)
    try:
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
