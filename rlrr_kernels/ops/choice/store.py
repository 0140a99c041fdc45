"""The user's own tiles, measured by ``rlrr tune`` on their GPU, and the choice of tiles at a call.

They lie in ``tiles.json`` in the folder ``RLRR_CACHE_DIR``, by default the platform's folder for caches; nothing is
written unless the tuner is called. ``RLRR_TUNING=off`` ignores the file, and one that is damaged is named in a warning
and ignored. Entries whose schedule no GPU has proven serve under ``RLRR_EXPERIMENTAL=on`` alone. All are read at the
first launch.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import path as path_model
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Product, Tiles
from rlrr_kernels.ops.host.cache import cache_folder, gpu_name, switched_on, write_json
from rlrr_kernels.ops.host.replay import choose_anew

SWITCH_VARIABLE = "RLRR_TUNING"
EXPERIMENTAL_VARIABLE = "RLRR_EXPERIMENTAL"
"""Says whether tiles in the file whose schedule no GPU has proven are used: "off" unless it is set."""

FORMAT = 2
"""Of the file; entries of format 1 have no schedule and are tiled."""


def cache_file() -> Path:
    """Where the tuned tiles of this user lie, whether or not the file exists."""
    return cache_folder() / "tiles.json"


def enabled() -> bool:
    """Whether tuned tiles are used; raises as :func:`switched_on` does."""
    return switched_on(SWITCH_VARIABLE)


def experimental_allowed() -> bool:
    """Whether tuned tiles serve whose schedule no GPU has proven; raises as :func:`switched_on` does."""
    return switched_on(EXPERIMENTAL_VARIABLE, "off")


def precision_name(dtype: torch.dtype, other: torch.dtype, precision: str) -> str:
    """The dtypes of a product's operands, in one word where they agree; "tf32" where fp32 may be rounded to it.

    ``precision`` is what :func:`rlrr_kernels.ops.dtypes.matmul_precision` says, here and in all functions of this file.
    """
    if dtype == torch.float32 and precision == "tf32":
        return "tf32"
    return "/".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys((dtype, other)))


def entry_name(gpu: str, kernel: str, precision: str, limit: int) -> str:
    """The key of an entry: what a measurement holds for. ``limit`` is the class's largest M, 0 for any."""
    return " | ".join([gpu, f"triton {triton.__version__}", kernel, precision, f"M <= {limit}" if limit else "any M"])


def path_entry_name(gpu: str, precision: str) -> str:
    """The key of the entry that says from which gain a merge is made."""
    return entry_name(gpu, "path", precision, 0)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file, {} where there is none: fields of :class:`Tiles`, or least_gain, and what was measured.

    Entries whose schedule this version does not have are left out.

    Raises:
        ValueError: the file is not what the tuner writes.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["entries"] if content["format"] in (1, FORMAT) else None
        for name, entry in list((entries or {}).items()):
            if entry.get("schedule", "tiled") not in configs.SCHEDULES:
                del entries[name]
            else:
                _value(entry)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if entries is None:
        raise ValueError(f"{path} has format {content['format']!r}; this version reads {FORMAT}")
    return entries


def _value(entry: dict[str, Any]) -> Tiles | float:
    """Tiles, or the least gain of a merge."""
    if "least_gain" not in entry:
        return _tiles(entry)
    if not 0 < float(entry["least_gain"]) < float("inf"):
        raise ValueError(f"no least_gain: {entry}")
    return float(entry["least_gain"])


def _tiles(entry: dict[str, Any]) -> Tiles:
    numbers = [entry[name] for name in Tiles._fields if name != "schedule"]
    tiles = Tiles(*numbers, schedule=entry.get("schedule", Tiles._field_defaults["schedule"]))
    powers = [tiles.block_m, tiles.block_n, tiles.block_k, tiles.warps]
    if not all(type(value) is int and value > 0 for value in numbers) or any(value & (value - 1) for value in powers):
        raise ValueError(f"no tiles: {entry}")
    if min(powers[:3]) < 16 or tiles.warps > 16:
        raise ValueError(f"no tiles: {entry}")
    return tiles


def unproven(entries: dict[str, dict[str, Any]], gpu: Gpu) -> list[str]:
    """The names of the entries that serve a GPU only under ``RLRR_EXPERIMENTAL=on``."""
    found = []
    for name, entry in entries.items():
        schedule = entry.get("schedule", "tiled")
        kernel = next((kernel for kernel in configs.KERNELS if f" | {kernel} | " in name), "")
        if not configs.proven(kernel, schedule, gpu):
            found.append(name)
    return found


def write(path: Path, changes: dict[str, dict[str, Any] | None]) -> None:
    """Replaces the entries named in ``changes``, or removes those that are None; the rest of the file stays.

    A damaged file is replaced. Readers see the old file or the new one.
    """
    try:
        entries = read(path)
    except ValueError as error:
        warnings.warn(f"{error}; it is replaced", stacklevel=2)
        entries = {}
    entries = {name: entry for name, entry in (entries | changes).items() if entry is not None}
    write_json(path, {"format": FORMAT, "entries": dict(sorted(entries.items()))})
    forget()


@functools.cache
def _entries() -> dict[str, Tiles | float]:
    """The tiles and least gains of this user, read once."""
    if not enabled():
        return {}
    path = cache_file()
    try:
        return {name: _value(entry) for name, entry in read(path).items()}
    except (ValueError, OSError) as error:
        warnings.warn(f"tuned tiles are ignored: {error}", stacklevel=2)
        return {}


# ---------------------------------------------------------------- the choice at a call

_forced: dict[str, Tiles] = {}


@contextmanager
def only_tiles(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Makes a kernel take ``tiles`` for everything within a block, in all threads."""
    before = dict(_forced)
    _forced[kernel] = tiles
    choose_anew()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        choose_anew()


def choose_tiles(
    kernel: str, gpu: Gpu, precision: str, first: Tensor, second: Tensor, weight_dtype: torch.dtype, rank: int,
    sampled: bool = False,
) -> Tiles:  # fmt: skip
    """The tiles of ``kernel``: the user's own where there are any, else those of the table.

    The user's own were measured with rank 1 and operands that are :attr:`Product.regular`, and serve these alone, where
    their schedule can.

    Args:
        kernel: of :data:`rlrr_kernels.ops.choice.tiles.KERNELS`.
        gpu: the one that the tensors are on.
        precision: of products of float32, see :func:`precision_name`.
        first: [M, ...], x or g; with ``second``, W or x, the operands of its product.
        second: see ``first``.
        weight_dtype: of W.
        rank: r of the scales.
        sampled: whether the scale gradients are estimated from rows of x.
    """
    product = Product.of(kernel, gpu, first, second, weight_dtype, rank, sampled)
    return _choose(product, first.device, precision, _forced.get(kernel))


@functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes
def _choose(product: Product, device: torch.device, precision: str, forced: Tiles | None) -> Tiles:
    own = _own(product, device, precision, entries) if (entries := _entries()) else None
    for tiles in (forced, own):
        if tiles is not None and tiles.schedule in configs.schedules_for(product):
            return tiles
    return configs.tiles_of(product)


def _own(product: Product, device: torch.device, precision: str, entries: dict[str, Tiles | float]) -> Tiles | None:
    """The user's own tiles for a product, where they may serve."""
    kernel, M = product.kernel, product.first.shape[0]
    if not product.regular or not (product.rank == 1 or kernel == "grad_scales"):
        return None
    limit = configs.shape_class(kernel, product.gpu, product.dtype, M)
    name = precision_name(product.dtype, product.weight_dtype, precision)
    tiles = entries.get(entry_name(gpu_name(device), kernel, name, limit))
    if tiles is None or tiles.schedule == "tiled":
        return tiles
    asked_for = configs.proven(kernel, tiles.schedule, product.gpu) or experimental_allowed()
    return tiles if asked_for and M >= configs.TMA_MIN_ROWS else None


class PathChoice(NamedTuple):
    """``path`` is "merge" where a merge saves ``gain`` times its cost and that is more than ``least_gain``, which is 1
    unless it was measured here; else "fused"."""

    path: str
    gain: float
    least_gain: float


@functools.lru_cache(maxsize=4096)  # asked for at every launch, of the same few shapes
def path_choice(
    gpu: Gpu, precision: str, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, rows: int,
    weight_shape: torch.Size, rank: int,
) -> PathChoice:  # fmt: skip
    """Which path a product of x [M, K] or g [M, N] and a rescaled weight [N, K] takes, and why.

    Args:
        gpu: the one that is ``device``.
        precision: of products of float32, see :func:`precision_name`.
        device: by whose name the user's own measurement is kept.
        dtype: of x and g.
        weight_dtype: of W.
        rows: M.
        weight_shape: [N, K].
        rank: r of the scales.
    """
    gain = path_model.merge_gain(rows, *weight_shape, rank, gpu, dtype, weight_dtype, precision == "tf32")
    least_gain = 1.0
    if entries := _entries():
        name = path_entry_name(gpu_name(device), precision_name(dtype, weight_dtype, precision))
        least_gain = entries.get(name, least_gain)
    return PathChoice("merge" if gain > least_gain else "fused", gain, least_gain)


def forget() -> None:
    """Makes the next launch read the environment and the file again."""
    _entries.cache_clear()
    _choose.cache_clear()
    path_choice.cache_clear()
    choose_anew()
