"""Adapter arithmetic: sums, interpolations and the negative of adapters, exact in the function they compute.

A sum of low-rank terms is the low-rank term of their vectors side by side: Σ w_i s_r,i s_c,i has the rank Σ r_i and no
error but rounding. Scales and shifts of SSF are summed as what they add to the backbone: 1 + Σ w (γ - 1) and Σ w β.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.folder.card import model_card
from rlrr_kernels.adapt.folder.files import (
    AdapterInfo,
    adapter_document,
    other_weights,
    read_adapter,
    write_folder,
)
from rlrr_kernels.nn.scales import concatenate_scales

LAYER_PARTS = ("scale_row", "scale_col", "shift")
"""Tensors of an adapted layer."""

_FREE = ("rank", "init", "scale_dtype")
"""What the configurations of summed adapters may differ in."""


def combine_layer(
    terms: Sequence[Mapping[str, Tensor]], weights: Sequence[float], *, residual: bool = True
) -> dict[str, Tensor]:
    """The tensors of a layer whose factor is 1 + Σ w (F - 1), F = 1 + s_r s_c (without the residual s_r s_c) of a term.

    Args:
        terms: ``scale_row`` [N, r], ``scale_col`` [G, r, K], ``shift`` [N] of each, as far as it has them.
        weights: w of each.
        residual: whether the 1 is there.

    Raises:
        ValueError: one term scales another side than the next, or there is no residual, both sides are scaled and the
            weights do not sum to 1.
    """
    sides = {tuple(part for part in LAYER_PARTS[:2] if part in term) for term in terms}
    if len(sides) > 1:
        raise ValueError("adapters that scale different sides of a layer cannot be summed")
    rest = 0.0 if residual else 1 - math.fsum(weights)
    (trained,) = sides
    combined: dict[str, Tensor] = {}
    if len(trained) == 1:
        combined[trained[0]] = _sum([term[trained[0]] for term in terms], weights) + rest
    else:
        if abs(rest) > 1e-9:
            raise ValueError(
                "weights of adapters with residual=False must sum to 1: without the 1 another sum has no factor W; got "
                f"{list(weights)}"
            )
        scales = [(weight * term["scale_row"], term["scale_col"]) for term, weight in zip(terms, weights, strict=True)]
        combined["scale_row"], combined["scale_col"] = concatenate_scales(scales)
    shifts = [(term["shift"], weight) for term, weight in zip(terms, weights, strict=True) if "shift" in term]
    if shifts:
        combined["shift"] = _sum(*map(list, zip(*shifts, strict=True)))
    return combined


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def combine_adapters(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    head_of: int | None = None,
) -> Path:
    """Writes the adapter that adds Σ w_i ΔW_i to its backbone, of adapters ΔW_i in ``folders``, to ``out``.

    Two weights 1 - t and t interpolate, ones add, a single -1 negates. The rank is the sum of the ranks; with one side
    alone, or a single adapter, it stays.

    Args:
        folders: of adapters of one backbone, written by :func:`rlrr_kernels.save_adapter` with equal configurations but
            for the rank.
        weights: of each.
        out: the folder to write.
        head_of: index of the adapter whose head (and what else was trained beside adapter and norms) is taken. None:
            they are summed too, which has a meaning where the weights sum to 1 and the classes are the same. The
            metadata of this adapter, or without one of the first, are those of the sum.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, ImportError, OSError: as for :func:`rlrr_kernels.load_adapter` and ``save_adapter``.
        ValueError: the numbers of folders and weights differ, the adapters do not fit each other or are of different
            weights of the backbone, the ranks sum to more than 64, a head cannot be summed, or a folder is damaged.
    """
    if not folders or len(folders) != len(weights):
        raise ValueError(
            f"there must be one weight for each folder; got {len(folders)} folders, {len(weights)} weights"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite; got {list(weights)}")
    if head_of is not None and not 0 <= head_of < len(folders):
        raise ValueError(f"head_of must be from 0 to {len(folders) - 1}; got {head_of}")
    read = [read_adapter(Path(folder)) for folder in folders]
    infos = [info for info, _ in read]
    config = _common_config(infos)
    if head_of is None:
        _check_same_classes(infos)
    tensors = _combine([tensors for _, tensors in read], weights, config, head_of)
    first = infos[head_of or 0]
    formula = " + ".join(f"{weight:g} * {info.folder.name}" for weight, info in zip(weights, infos, strict=True))
    document = adapter_document(
        config, first.base_model, first.also_trained, {**first.metadata, "sum": formula}, first.backbone_sample
    )
    return write_folder(Path(out), document, tensors, lambda: model_card(document, f"sum of adapters: {formula}"))


def _common_config(infos: Sequence[AdapterInfo]) -> RLRRConfig:
    first = infos[0].config
    for info in infos[1:]:
        ours, theirs = first.to_dict(), info.config.to_dict()
        differing = [name for name in ours if name not in _FREE and ours[name] != theirs[name]]
        if info.base_model != infos[0].base_model:
            differing.append("base_model")
        if differing:
            raise ValueError(f"{info.folder} and {infos[0].folder} differ in {', '.join(differing)}: they have no sum")
        ours, theirs = infos[0].backbone_sample, info.backbone_sample
        layers = other_weights({name: ours[name] for name in ours if name in theirs}, theirs)
        if layers:
            raise ValueError(
                f"{info.folder} and {infos[0].folder} were trained on different weights of the backbone (the first is "
                f"{layers[0]}): they have no sum"
            )
    rank = sum(info.config.rank for info in infos) if first.sides == "both" else 1
    dtypes: list[Any] = [info.config.scale_dtype for info in infos]  # which a name has become
    dtype = functools.reduce(torch.promote_types, dtypes)
    return dataclasses.replace(first, rank=rank, scale_dtype=dtype)


def _check_same_classes(infos: Sequence[AdapterInfo]) -> None:
    """Raises ``ValueError`` where rows of the heads, as ``rlrr finetune`` describes them, are of different classes."""
    tasks = [info.metadata.get("task") for info in infos]
    classes = [task.get("classes") if isinstance(task, Mapping) else None for task in tasks]
    for info, others in zip(infos, classes, strict=True):
        if others != classes[0]:
            raise ValueError(
                f"{info.folder} and {infos[0].folder} are of different classes, or of the same in another order, so "
                "their heads have no sum; head_of says whose is taken"
            )


def _combine(
    adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float], config: RLRRConfig, head_of: int | None
) -> dict[str, Tensor]:
    names = list(adapters[0])
    other = [name for adapter in adapters for name in adapter.keys() ^ names]
    if other:
        raise ValueError(f"tensors that not all adapters have: {some(dict.fromkeys(other))}")
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith((".scale_row", ".scale_col")))
    combined: dict[str, Tensor] = {}
    for layer in layers:
        keys = [(part, f"{layer}.{part}") for part in LAYER_PARTS if f"{layer}.{part}" in names]
        terms = [{part: adapter[key] for part, key in keys} for adapter in adapters]
        made = combine_layer(terms, weights, residual=config.residual)
        combined |= {f"{layer}.{part}": tensor for part, tensor in made.items()}
    norms = {n.rpartition(".")[0] for n in names if n.endswith(".scale") and f"{n[:-5]}shift" in names}
    rest = []
    for name in [name for name in names if name not in combined]:
        parent, _, part = name.rpartition(".")
        values = [adapter[name] for adapter in adapters]
        if parent in norms and config.recipe is not None:
            combined[name] = _sum(values, weights) + (1 - math.fsum(weights) if part == "scale" else 0)
        elif head_of is not None or (len(values) > 1 and all(torch.equal(values[0], value) for value in values[1:])):
            combined[name] = values[head_of or 0]
        elif values[0].is_floating_point() and abs(math.fsum(weights) - 1) < 1e-9:
            combined[name] = _sum(values, weights)
        else:
            rest.append(name)
    if rest:
        raise ValueError(
            f"what was trained as it is has a sum only where the weights sum to 1: {some(rest)}; head_of says whose is "
            f"taken. Got weights {list(weights)}"
        )
    return {name: combined[name] for name in names}
