"""Dataclasses as options of the command line: one field, one option, its docstring the help.

A dataclass may hold others (``FinetuneConfig.train``): their fields are options beside its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlrr_kernels.train.config.files import alternatives, config_to_dict, is_required, read_config

_OPTION_TYPES = (str, Path, bool, int, float)


Weights = Annotated[str, typer.Option(help="Of the backbone: hub, none, or a file (.safetensors, .pth, Google's .npz)")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels; default: what the weights were made for")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone")]


def split_names(given: Sequence[str] | None) -> tuple[str, ...]:
    """Names given one by one or with commas between them."""
    return tuple(name.strip() for text in given or () for name in text.split(",") if name.strip())


def takes_options_of(
    kind: type,
    *,
    required: Sequence[str] = (),
    arguments: Sequence[str] = (),
    without: Sequence[str] = (),
    config_file: bool = False,
    plain: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes ``command(config, ...)`` a typer command with one option for each setting of the dataclass ``kind``.

    The command's other parameters are options as typer has them, after these.

    Args:
        kind: what ``config`` is.
        required: settings that have to be given although they have a default.
        arguments: settings that are given by their place, not as options.
        without: settings that cannot be given.
        config_file: whether ``--config FILE`` takes the settings from a file; options given beside it replace them.
        plain: ``config`` is not a ``kind`` but the options by name, to make several of.
    """

    def set_defaults(context: typer.Context, file: Path | None) -> None:
        if file is not None:
            context.default_map = options_of_config(read_config(kind, file))

    text = "config.json of a run to repeat; options given beside it replace its settings"
    file_option = Annotated[Path | None, typer.Option(callback=set_defaults, is_eager=True, help=text)]
    from_file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file_option)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        ]

        def run(config: Path | None = None, **options: Any) -> None:
            others = {parameter.name: options.pop(parameter.name) for parameter in own}
            command(options if plain else config_of_options(kind, options), **others)

        settings = [option for option in options_of(kind, required, arguments) if option.name not in without]
        options = [*settings, *own, *([from_file] if config_file else [])]
        run.__signature__ = inspect.Signature(options)
        run.__annotations__ = {}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def options_of(kind: type, required: Sequence[str] = (), arguments: Sequence[str] = ()) -> list[inspect.Parameter]:
    """The fields of a dataclass, and of the dataclasses in it, as typer options; those in ``arguments`` as arguments.

    Fields whose type no option can have (a dataclass or None, a mapping, ...) are left out.
    """
    hints, texts, found = typing.get_type_hints(kind), describe_arguments(kind), []
    for field in dataclasses.fields(kind):
        hint, default, text = hints[field.name], field.default, texts.get(field.name, "")
        if dataclasses.is_dataclass(hint):
            found += options_of(hint)
            continue
        kinds = alternatives(hint)
        must = is_required(field) or field.name in required
        if hint == tuple[str, ...]:
            simple, default, text = list[str], None, f"{text}; with commas or repeated"
        else:
            simple = next((option for option in _OPTION_TYPES if option in kinds), None)
        if simple is None:
            continue
        if must:
            default, text = inspect.Parameter.empty, text.partition("; None: ")[0]
        elif default is None:
            simple = simple | None
        made = typer.Argument if field.name in arguments else typer.Option
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[simple, made(help=text.replace("None: ", "default: "))],
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
            value = options[field.name]
            values[field.name] = split_names(value) if hint == tuple[str, ...] else value
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
