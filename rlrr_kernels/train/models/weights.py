"""Weights files (safetensors, PyTorch): which of their tensors are a backbone's, and whether they can be used."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.train.data.folders import shorten

_AVERAGE = re.compile(r"ema(?![a-z])|(?<![a-z])(ema|avg|swa|polyak|shadow)|averag", re.IGNORECASE)
"""In the name of an entry of a checkpoint: it is a moving average of the weights."""

_WEIGHTS = ("state_dict", "model")
_OPTIMIZER = re.compile(r"opt(?![a-z])|optim", re.IGNORECASE)

_DEPTH = 5
"""How far within a checkpoint weights are looked for."""

SHOWN = 5
"""How many tensors a message names before it counts the rest."""


def read_weights(file: Path, expected: Mapping[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of ``file`` that a backbone is to be filled with, by name, on the CPU. Nothing in it is executed.

    A file of several sets of weights (a training checkpoint), at any place in it, gives its moving average where there
    is one. A prefix that all names share (``model.``, ``module.``, ``backbone.``, ...) is taken off. Both are warned
    of. The classifier's tensors are left out.

    Args:
        file: safetensors where it ends so, else what ``torch.save`` wrote.
        expected: the backbone's tensors by name, on any device; files in another layout, which timm converts, have
            other names.
        heads: names of the classifier's modules.

    Raises:
        ValueError: the file is empty, damaged (a zip's checksums are compared), holds objects that are no tensors in
            place of weights, none of the backbone's, or tensors that cannot be weights (not finite, integers, sparse);
            or several sets of weights of which none or several are averages, or an average that is not by name.
    """
    state = _only_state(_read(file), file)
    prefix = _shared_prefix(state, [*expected, *heads])
    if prefix:
        warnings.warn(f"{file}: the prefix {prefix!r}, which all its names share, is taken off", stacklevel=4)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    used = {name: tensor for name, tensor in state.items() if not is_of_head(name, heads)}
    if not used:
        raise ValueError(
            f"it holds none of the backbone's tensors; its {len(state)} tensors are all of a classifier: "
            f"{shorten([*state], SHOWN)}"
        )
    for name, tensor in used.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            held = "has no values (meta)" if tensor.is_meta else f"is {str(tensor.layout).removeprefix('torch.')}"
            raise ValueError(f"{name} must be a dense tensor; it {held}")
        known = expected.get(name)
        floating = known.is_floating_point() if known is not None else name.endswith((".weight", ".bias"))
        if floating and not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be of floating-point numbers; it is {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    return used


def is_of_head(key: str, heads: tuple[str, ...]) -> bool:
    """Whether ``key`` of a state dict is the classifier's: under timm's name (``head.fc``) or, as others have it, its
    parent's (``head.weight``)."""
    parents = [head.rpartition(".")[0] for head in heads]
    return key.startswith(tuple(f"{head}." for head in heads)) or key in [
        f"{parent}.{part}" for parent in parents if parent for part in ("weight", "bias")
    ]


def read_tensors(file: Path) -> Any:
    """What ``torch.save`` wrote to ``file``: tensors and plain data, on the CPU.

    Raises:
        ValueError: the file is empty, truncated or damaged, or holds other objects, which a pickle makes by running
            code; says which of these.
    """
    if not file.stat().st_size:
        raise ValueError("it is empty")
    try:
        if zipfile.is_zipfile(file):  # torch.load compares no checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"it is damaged: the checksum of {damaged} does not hold")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in timm's training checkpoints
            return torch.load(file, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except pickle.UnpicklingError as error:
        found = _foreign_objects(file)
        if not found:
            raise ValueError("it is truncated, damaged or was not written by torch.save") from error
        raise ValueError(
            f"it holds objects other than tensors ({shorten(found, SHOWN)}), and reading those can run any code; save "
            "the weights alone, by torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch.load raises whatever pickle and zip do
        raise ValueError("it is truncated, damaged or was not written by torch.save") from error


def _foreign_objects(file: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # as for torch.load
        return []


def _read(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return read_tensors(file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"it is truncated or no safetensors file: {error}") from error


def _only_state(content: Any, file: Path) -> dict[str, Tensor]:
    """The one set of tensors in ``content`` that is meant: a checkpoint may hold several, and much else."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold tensors by name; it holds a {type(content).__name__}")
    sets = _sets_in(content)
    if not sets:
        what = f"tensors by name are not in its entries {shorten([*map(repr, content)], SHOWN)}"
        raise ValueError(f"it holds none of the backbone's tensors; {what if content else 'it is empty'}")
    depth = min(map(len, sets))
    found = [path for path in sets if any(map(_AVERAGE.search, path))] or [path for path in sets if len(path) == depth]
    named = ([path for path in found if path[-1:] == (name,)] for name in _WEIGHTS)
    chosen, *more = next(filter(None, named), found)
    if more:
        names = ", ".join(map(".".join, found))
        raise ValueError(f"it holds several sets of weights, {names}; save one of them to a file of its own")
    if len(sets) > 1:
        others = shorten([".".join(path) for path in sets if path != chosen], SHOWN)
        warnings.warn(f"{file}: the weights {'.'.join(chosen)} are taken, {others} left", stacklevel=5)
    state = sets[chosen]
    return {name: state[name] for name in state if name != "n_averaged"}  # torch's AveragedModel counts in it


def _sets_in(content: Mapping, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """The sets of tensors by name, by where they are; tensors beside a set are no set, and scalars alone neither."""
    found: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(key, str) and not _OPTIMIZER.match(key) and len(path) < _DEPTH:
            inner = _sets_in(value, (*path, key)) if isinstance(value, Mapping) else {}
            if not inner and not isinstance(value, Tensor) and _AVERAGE.search(key) and _holds_tensors(value):
                raise ValueError(
                    f"its entry {'.'.join((*path, key))} is called like an average of the weights, but does not hold "
                    "tensors by name; save the weights that are meant to a file of their own"
                )
            found |= inner
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return found or ({path: tensors} if _holds_tensors(tensors) else {})


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0
    if isinstance(value, Mapping):
        value = value.values()
    return not isinstance(value, str) and isinstance(value, Iterable) and any(map(_holds_tensors, value))


def _shared_prefix(names: Iterable[str], expected: Iterable[str]) -> str:
    """What all ``names`` start with, in whole parts up to a dot that none of ``expected`` starts with."""
    prefix, names = "", list(names)
    known = {name.partition(".")[0] for name in expected}
    while names:
        parts = {name.removeprefix(prefix).partition(".")[:2] for name in names}
        part, dot = parts.pop()
        if parts or not dot or part in known:
            break
        prefix += f"{part}."
    return prefix
