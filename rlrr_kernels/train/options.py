"""Dataclasses as options of the command line: one field, one option, its docstring the help.

A dataclass may hold others (``FinetuneConfig.train``): their fields are options beside its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from rlrr_kernels.train.config_file import alternatives, config_to_dict, is_required, read_config

_OPTION_TYPES = (str, Path, bool, int, float)


def takes_options_of(
    kind: type, *, required: Sequence[str] = ()
) -> Callable[[Callable[[Any, bool], None]], Callable[..., None]]:
    """Makes ``command(config, resume)`` a typer command with one option for each setting of the dataclass ``kind``.

    An option is required where the setting has no default, and where ``required`` names it.
    ``--config FILE`` takes the settings from a file; options given beside it replace them.
    """

    def set_defaults(context: typer.Context, file: Path | None) -> None:
        if file is not None:
            context.default_map = options_of_config(read_config(kind, file))

    resume_option = typer.Option("--resume", help="Go on where the run in --out was stopped, if it was")
    file_option = typer.Option(
        callback=set_defaults,
        is_eager=True,
        help="config.json of a run to repeat; options given beside it replace its settings",
    )

    def decorate(command: Callable[[Any, bool], None]) -> Callable[..., None]:
        def run(resume: bool, config: Path | None, **options: Any) -> None:
            command(config_of_options(kind, options), resume)

        kinds = {"resume": (bool, False, resume_option), "config": (Path | None, None, file_option)}
        extra = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=typing.Annotated[hint, option]
            )
            for name, (hint, default, option) in kinds.items()
        ]
        run.__signature__ = inspect.Signature([*options_of(kind, required), *extra])
        run.__annotations__ = {}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def options_of(kind: type, required: Sequence[str] = ()) -> list[inspect.Parameter]:
    """The fields of a dataclass, and of the dataclasses in it, as typer options.

    Fields whose type no option can have (a dataclass or None, a mapping, ...) are left out.
    """
    hints, texts, found = typing.get_type_hints(kind), describe_arguments(kind), []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found += options_of(hints[field.name])
            continue
        kinds = alternatives(hints[field.name])
        simple = next((option for option in _OPTION_TYPES if option in kinds), None)
        if simple is None:
            continue
        must = is_required(field) or field.name in required
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if must else field.default,
                annotation=typing.Annotated[
                    simple | None if types.NoneType in kinds and not must else simple,
                    typer.Option(help=texts.get(field.name)),
                ],
            )
        )
    return sorted(found, key=lambda parameter: parameter.default is not inspect.Parameter.empty)


def config_of_options(kind: type, options: Mapping[str, Any]) -> Any:
    """The configuration that ``options``, by the names of :func:`options_of`, stand for."""
    values = {}
    for field, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True):
        if dataclasses.is_dataclass(hint):
            values[field.name] = config_of_options(hint, options)
        elif field.name in options:
            values[field.name] = options[field.name]
    return kind(**values)


def options_of_config(config: Any) -> dict[str, Any]:
    """The values of a configuration by the names of :func:`options_of`."""
    values: dict[str, Any] = {}
    for name, value in config_to_dict(config).items():
        field = getattr(config, name)
        values |= options_of_config(field) if dataclasses.is_dataclass(field) else {name: value}
    return values


def describe_arguments(kind: type) -> dict[str, str]:
    """What the section ``Args`` of a docstring says of each argument, without its markup."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2]
    section = re.split(r"\n(?=\S)", section)[0]
    texts = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section)[1:]:
        names, _, text = " ".join(entry.split()).partition(": ")
        if not text.startswith("`"):
            text = text[:1].upper() + text[1:]
        text = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")
        texts |= dict.fromkeys(names.split(", "), text.removesuffix("."))
    return texts
