"""PTX text as a :class:`Program`: instructions with parsed operands, labels resolved, registers declared.

Braces open a scope of their own, as inline assembly uses them; names declared within are renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import find_form


@dataclass(frozen=True)
class Register:
    """A register by its name, which a scope may have made unique, and its width in bits."""

    name: str
    width: int


@dataclass(frozen=True)
class Immediate:
    """A number; ``is_float``: the bits of one of ``width`` bits."""

    value: int
    width: int = 0
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A special register, a parameter, or the start of shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; for a block of a tensor ``[base, {column, row}]``, with ``offset`` 0."""

    base: Operand
    offset: int = 0
    corner: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Several:
    """``{a, b, ...}``, or ``a|b`` of an instruction with two results."""

    parts: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Address | Several


@dataclass
class Instruction:
    """One instruction: what executes it, what its modifiers say, its operands and the predicate that guards it."""

    text: str
    opcode: str
    operands: tuple[Operand, ...]
    execute: Callable
    modifiers: dict[str, str]
    guard: Register | None = None
    negated: bool = False
    target: int = -1  # of a branch

    @property
    def type(self) -> str:
        """The type in the slot ``type``."""
        return self.modifiers["type"]


@dataclass
class Program:
    """The entry of a kernel."""

    name: str
    threads: int
    parameters: list[str]
    code: list[Instruction] = field(default_factory=list)

    @property
    def opcodes(self) -> set[str]:
        """The opcodes that occur."""
        return {instruction.opcode for instruction in self.code}

    @property
    def has_bulk_copies(self) -> bool:
        """Whether the tensor memory accelerator copies for it."""
        return any(".bulk." in instruction.text for instruction in self.code)


def split_operands(text: str) -> list[str]:
    """Parts between commas that no bracket encloses."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<label>\$?\w+):(?!:)"
    r"|(?P<directive>\.[a-z][^;]*;)"
    r"|(?P<open>\{(?=\s*(?:\.reg|\n|$|[a-z@])))"
    r"|(?P<close>\}(?=\s|$))"
    r"|(?P<instruction>[^;]*?;)"
    r")",
    re.DOTALL,
)
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_LIST = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+);")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")
_PARAMETER = re.compile(r"\.param\s+[^,)]*?(\w+_param_\d+)(?:\[\d+\])?\s*[,\n)]")


class _Parser:
    """Reads the body of one entry; ``scopes`` are the prefixes of the names declared in the open braces."""

    def __init__(self, parameters: list[str]) -> None:
        self.parameters = set(parameters)
        self.scopes, self.opened = [""], 0
        self.registers: dict[str, int] = {}  # width by name, or by prefix for a numbered list
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[Instruction, tuple[str, ...], str]] = []
        self.code: list[Instruction] = []

    def read(self, text: str) -> list[Instruction]:
        """The instructions of a body."""
        position = 0
        while position < len(text) and text[position:].strip():
            token = _TOKEN.match(text, position)
            if token is None:
                raise Fault(f"cannot be parsed: {text[position : position + 80]!r}")
            position = token.end()
            self._take(token.lastgroup, token[token.lastgroup])
        for branch, scopes, name in self.branches:
            branch.target = self._resolve(name, scopes)
        return self.code

    def _take(self, kind: str, text: str) -> None:
        if kind == "label":
            self.labels[self.scopes[-1] + text] = len(self.code)
        elif kind == "open":
            self.opened += 1
            self.scopes.append(f"{self.opened}:")
        elif kind == "close":
            self.scopes.pop()
        elif kind == "directive":
            self._directive(text)
        elif text := " ".join(text[:-1].split()):
            self.code.append(self._instruction(text))

    def _resolve(self, label: str, scopes: tuple[str, ...]) -> int:
        for scope in reversed(scopes):
            if scope + label in self.labels:
                return self.labels[scope + label]
        raise Fault(f"there is no label {label!r}")

    def _directive(self, text: str) -> None:
        if declared := _LIST.match(text):
            bits = 1 if declared[1] == "pred" else int(declared[1][1:])
            for name in split_operands(declared[2]):
                self.registers[self.scopes[-1] + re.sub(r"<\d+>$", "<>", name)] = bits
        elif not re.match(r"\.(loc|file|pragma)\b", text):
            raise Fault(f"unknown directive {text!r}")

    def _instruction(self, text: str) -> Instruction:
        guard = _GUARD.match(text)
        name, _, rest = text[guard.end() if guard else 0 :].partition(" ")
        execute, modifiers = find_form(name)
        opcode, operands = name.split(".")[0], split_operands(rest)
        names = operands if opcode == "bra" else []
        parsed = tuple(self._operand(part) for part in operands[: len(operands) - len(names)])
        found = Instruction(text, opcode, parsed, execute, modifiers)
        if guard:
            found.guard, found.negated = self._register(guard[2]), bool(guard[1])
        if names:
            self.branches.append((found, tuple(self.scopes), names[0]))
        return found

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            for declared in (name, re.sub(r"\d+$", "<>", name)):
                if scope + declared in self.registers:
                    return Register(scope + name, self.registers[scope + declared])
        return None

    def _operand(self, text: str) -> Operand:
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if text[0] == "{":
            return Several(tuple(self._operand(part) for part in split_operands(text[1:-1])))
        if "|" in text:
            return Several(tuple(self._operand(part) for part in text.split("|")))
        if text == "_" or text == "global_smem" or text in self.parameters:
            return Symbol(text)
        if register := self._register(text):
            return register
        if text[0] == "%":
            return Symbol(text)  # a special register; the machine refuses those it does not have
        if text[:2] in ("0f", "0d"):
            return Immediate(int(text[2:], 16), 32 if text[1] == "f" else 64, True)
        if _INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0))
        raise Fault(f"unknown operand {text!r}")

    def _address(self, text: str) -> Address:
        base, *corner = split_operands(text)
        if corner:
            return Address(self._operand(base), 0, self._operand(corner[0]).parts)
        found = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?", base)
        if found is None:
            raise Fault(f"unknown address [{text}]")
        return Address(self._operand(found[1]), int(found[2] or 0))


def parse(ptx: str, name: str) -> Program:
    """The entry ``name`` of a module's text.

    Raises:
        UnknownInstructionError: it has an instruction that this machine does not know.
    """
    ptx = re.sub(r"//[^\n]*", "", ptx[ptx.index(f".entry {name}") :])
    head, _, body = ptx.partition("{")
    parameters = _PARAMETER.findall(head)
    depth, end = 1, 0
    for end, character in enumerate(body):  # noqa: B007
        depth += (character == "{") - (character == "}")
        if depth == 0:
            break
    body = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", body[:end], flags=re.MULTILINE)
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)[1])
    return Program(name, threads, parameters, _Parser(parameters).read(body))
