"""What was done to a model, as data: :func:`rlrr_kernels.adapt_model`'s report prints as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlrr_kernels.adapt.config import pattern_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """How many parameters of a model are trained.

    Attributes:
        adapter: trained parameters without the head.
        head: parameters of the head.
        total: all parameters, the adapter's included.
    """

    adapter: int
    head: int
    total: int

    @property
    def trained(self) -> int:
        """Trained parameters: adapter and head."""
        return self.adapter + self.head

    @property
    def share(self) -> float:
        """Trained parameters over all parameters, 0 to 1."""
        return self.trained / self.total


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One adapted layer: its name, W [out_features, in_features] (a kernel seen as a matrix), and what is trained."""

    name: str
    out_features: int
    in_features: int
    rank: int
    groups: int
    shift: bool
    trained: int


@dataclasses.dataclass(frozen=True)
class AdaptReport(ParameterCounts):
    """The adapted model in names and counts; ``print`` it.

    Attributes:
        model: class name of the model.
        formula: of the rescaled weight W'.
        layers: the adapted linear layers and convolutions.
        norms: names of the norms with SSF's scale and shift.
        tokens: name of the module with the SSF of the patch tokens, or None.
        heads: names of the modules trained as they are.
        patched: names of layers whose parent had to be told to call them (timm's ``qkv_bias_separate``).
        adapter, head, total: see :class:`ParameterCounts`.
    """

    model: str
    formula: str
    layers: tuple[LayerReport, ...]
    norms: tuple[str, ...]
    tokens: str | None
    heads: tuple[str, ...]
    patched: tuple[str, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "count", "W", "rank", "groups", "shift", "trained")]
        kinds: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kind = (pattern_of(layer.name), *dataclasses.astuple(layer)[1:])
            kinds.setdefault(kind, []).append(layer)
        for (name, out_features, in_features, rank, groups, shift, trained), layers in kinds.items():
            name = layers[0].name if len(layers) == 1 else name
            shape, shift = f"{out_features} x {in_features}", "yes" if shift else "no"
            row = (name, len(layers), shape, rank, groups, shift, f"{trained * len(layers):,}")
            rows.append(tuple(str(cell) for cell in row))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in rows]
        title = f"{self.model}, adapted by RLRR: W' = {self.formula}"
        lines = [title, "", table[0], "-" * len(table[0]), *table[1:], ""]
        if self.norms:
            lines.append(f"scale and shift after norms   {_collapse(self.norms)}")
        if self.tokens:
            lines.append(f"scale and shift on tokens     {self.tokens}")
        lines.append(f"trained as they are (head)    {_collapse(self.heads) or 'none'}")
        if self.patched:
            lines.append(f"qkv_bias_separate switched on {_collapse(self.patched)}")
        lines.append(
            f"trained parameters            {self.trained:,} of {self.total:,} ({self.share:.2%}): "
            f"adapter {self.adapter:,}, head {self.head:,}"
        )
        return "\n".join(lines)


def describe_keys(gained: Sequence[str]) -> str:
    """A line on the keys of a merged model's state dict; ``gained`` are those that the backbone does not have."""
    if not gained:
        return "its state dict has the keys of the plain model"
    return (
        "gained (the backbone has no such key, so its class does not load this state dict strictly): "
        f"{', '.join(gained)}"
    )


def _collapse(names: Sequence[str]) -> str:
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(pattern_of(name), []).append(name)
    return ", ".join(group[0] if len(group) == 1 else f"{pattern} ({len(group)})" for pattern, group in counts.items())
