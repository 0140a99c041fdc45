"""The public API as text: names, parameters and defaults, operator schemas, commands and their options.

``python -m tests.project.public_api`` writes it to ``public_api.txt``, which ``test_public_api.py`` compares with it.
Types are left out: mypy checks them, and a wider one breaks no caller.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_suffix(".txt")

MODULES = ("rlrr_kernels", "rlrr_kernels.bank", "rlrr_kernels.peft", "rlrr_kernels.numerics", "rlrr_kernels.reference")


def describe() -> str:
    """The text of ``public_api.txt``."""
    from typer.main import get_command

    from rlrr_kernels.cli import app

    lines = [line for name in MODULES for line in _module(name)] + list(_operators()) + list(_command(get_command(app)))
    return "".join(f"{_wrapped(line)}\n" for line in lines)


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _module(name: str) -> Iterator[str]:
    """``__all__`` of a module; without it, the public names that it does not import."""
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
    yield name
    for key in getattr(module, "__all__", sorted(key for key in own if not key.startswith("_"))):
        value = getattr(module, key)
        yield f"  {_entry(key, value)}"
        if inspect.isclass(value):
            yield from (f"    {line}" for line in _members(value))


def _members(owner: type) -> Iterator[str]:
    """Fields, properties and methods that this package defines, inherited ones included."""
    classes = [base for base in owner.__mro__ if base.__module__.startswith("rlrr_kernels.")]
    names = {name for base in classes for name in vars(base) if not name.startswith("_")}
    if dataclasses.is_dataclass(owner):
        names |= {name for base in classes for name in inspect.get_annotations(base) if not name.startswith("_")}
    for name in sorted(names):
        kind = inspect.getattr_static(owner, name, None)
        prefix = f"{type(kind).__name__} " if isinstance(kind, classmethod | staticmethod | property) else ""
        yield prefix + _entry(name, getattr(owner, name, None))


def _entry(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f"class {name}{_signature(value)}"
    return f"{name}{_signature(value)}" if callable(value) else name


class _Default:
    """A default value that shows a function by its name, not by its address."""

    def __init__(self, value: Any) -> None:
        self.text = value.__name__ if inspect.isroutine(value) else repr(value)

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any) -> str:
    """Parameters and defaults, without types and without what a class takes over from other packages."""
    empty = inspect.Parameter.empty
    if inspect.isclass(value) and getattr(value.__init__, "__module__", "").startswith("peft."):
        return ""
    other = {
        field
        for base in (value.__mro__ if inspect.isclass(value) else ())
        if dataclasses.is_dataclass(base) and not base.__module__.startswith("rlrr_kernels")
        for field in base.__dataclass_fields__
    }
    parameters = [
        parameter.replace(
            annotation=empty, default=empty if parameter.default is empty else _Default(parameter.default)
        )
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name not in other
    ]
    return str(inspect.Signature(parameters))


def _operators() -> Iterator[str]:
    """Schemas of the operators that ``import rlrr_kernels`` registers; the C++ extension adds private ones."""
    yield "torch.ops.rlrr_kernels"
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("rlrr_kernels::")]
    yield from sorted(f"  {schema}".replace("rlrr_kernels::", "") for schema in schemas)


def _command(command: Any, name: str = "rlrr") -> Iterator[str]:
    """A command, its arguments and options with their defaults, and the commands below it."""
    yield name
    for parameter in sorted(command.params, key=lambda parameter: parameter.opts):
        default = "required" if parameter.required else f"default {parameter.default}"
        yield f"  {' '.join((*parameter.opts, *parameter.secondary_opts))}: {default}"
    for child, below in sorted(getattr(command, "commands", {}).items()):
        yield from _command(below, f"{name} {child}")


if __name__ == "__main__":
    FILE.write_text(describe(), encoding="utf-8")
