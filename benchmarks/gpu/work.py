"""The unit of work: what can be started only whole, and yields rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Unit(NamedTuple):
    """Some rows of one section. ``tier``: lower is more valuable; ``seconds``: an estimate, to stop in time."""

    tier: int
    section: str
    label: str
    seconds: float
    run: Callable[[], list[Row]]
