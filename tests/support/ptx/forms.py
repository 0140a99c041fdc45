"""Which instructions this machine knows: an opcode, its modifiers in order, and the function that executes it.

A form is written as slots, ``"add ?rn ?ftz type=f32|f64"``: one of the alternatives of each slot has to follow, those
with a question mark may be missing, and nothing else may be there. A name before ``=`` tells the function what was
found. So a modifier that nobody thought of is an error that names it, never an instruction read as another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.support.ptx.faults import UnknownInstructionError

TYPES = {
    "INT": "s16|s32|s64|u16|u32|u64",
    "BITS": "b8|b16|b32|b64",
    "FLOAT": "f32|f64|f16|bf16|f16x2|bf16x2",
}
"""Names of groups of alternatives."""


class Slot(NamedTuple):
    """One place among an instruction's modifiers."""

    name: str
    optional: bool
    alternatives: tuple[str, ...]


class Form(NamedTuple):
    """An opcode with its slots, and what executes it: ``execute(machine, instruction, lanes)``."""

    slots: tuple[Slot, ...]
    execute: Callable

    def match(self, modifiers: list[str]) -> tuple[int, dict[str, str] | None]:
        """How many modifiers fit and, if all do, what the named slots hold."""
        found, position = {}, 0
        for slot in self.slots:
            if position < len(modifiers) and modifiers[position] in slot.alternatives:
                found[slot.name] = modifiers[position]
                position += 1
            elif not slot.optional:
                return position, None
        return position, found if position == len(modifiers) else None


FORMS: dict[str, list[Form]] = {}
"""The forms of every opcode; modules that execute instructions add theirs when they are imported."""


def _slot(text: str) -> Slot:
    optional, text = text.startswith("?"), text.lstrip("?")
    name, _, alternatives = text.rpartition("=")
    for group, members in TYPES.items():
        alternatives = "|".join(members if part == group else part for part in alternatives.split("|"))
    return Slot(name or alternatives, optional, tuple(alternatives.split("|")))


def instruction(*forms: str) -> Callable[[Callable], Callable]:
    """Registers a function for instructions of these forms; the first word may be several opcodes, ``"min|max"``."""

    def register(execute: Callable) -> Callable:
        for form in forms:
            opcodes, *slots = form.split()
            for opcode in opcodes.split("|"):
                FORMS.setdefault(opcode, []).append(Form(tuple(map(_slot, slots)), execute))
        return execute

    return register


def find_form(name: str) -> tuple[Callable, dict[str, str]]:
    """What executes an instruction, by its full name, and what its named slots hold.

    Raises:
        UnknownInstructionError: there is no such form.
    """
    opcode, *modifiers = name.split(".")
    if opcode not in FORMS:
        raise UnknownInstructionError(f"unknown opcode {opcode!r} of {name!r}")
    furthest = 0
    for form in FORMS[opcode]:
        position, found = form.match(modifiers)
        if found is not None:
            return form.execute, found
        furthest = max(furthest, position)
    unknown = f"unknown modifier {modifiers[furthest]!r}" if furthest < len(modifiers) else "missing modifier"
    raise UnknownInstructionError(f"{unknown} of {name!r}")
