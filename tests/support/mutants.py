"""Damaged files: bytes and JSON documents changed at random, the same from the same generator."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
"""A document that is nested too deep to be read."""

VALUES = (
    None, True, False, 0, -1, 1, 2, 1.5, 1e300, 10**400, -(10**400), float("inf"), float("nan"), "", "x", "*", "[",
    "\0", "ü", "\ud800", "0.weight", [], [None], [[]], [1, 2, 3], [1, 2, 3, None], [float("nan")] * 4, [10**400] * 4,
    ["x"], {}, {"x": None}, {"0": []}, {"nowhere": [0.0] * 4}, {"*": 0}, {"": 1}, "both", "left", "float16", "paper",
)  # fmt: skip
"""What an entry of a document may turn into."""


def mutate_bytes(data: bytes, numbers: random.Random) -> bytes:
    """``data`` with bits turned, or pieces lost, doubled, zeroed or put in."""
    if not data or numbers.random() < 0.02:
        return b""
    start = numbers.randrange(len(data))
    end = min(len(data), start + numbers.choice((1, 4, 64, 4096)))
    kind = numbers.randrange(6)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:]
    if kind == 3:
        return data[:start] + bytes(end - start) + data[end:]
    if kind == 4:
        return data[:start] + numbers.randbytes(end - start) + data[start:]
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 2, 8))):
        # Headers are at either end; in the midst is nothing but numbers.
        place = numbers.choice((numbers.randrange(len(data)), -1 - numbers.randrange(min(len(data), 400))))
        place = numbers.choice((place, numbers.randrange(min(len(data), 400))))
        changed[place] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """All places in a JSON value but the root."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def mutate_entry(value: Any, numbers: random.Random) -> None:
    """Replaces, removes or renames one entry of a JSON value, in place."""
    *path, last = numbers.choice(list(_places(value)))
    for key in path:
        value = value[key]
    what = numbers.random()
    if what < 0.7:
        value[last] = copy.deepcopy(numbers.choice(VALUES))
    elif what < 0.85:
        del value[last]
    elif isinstance(value, dict):
        value[numbers.choice(("", "x", f"{last}_", "0"))] = value.pop(last)
