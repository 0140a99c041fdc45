"""Adapter folders: ``adapter.safetensors`` (trained tensors only), ``config.json`` and a model card.

``adapter.safetensors`` carries a copy of ``config.json`` in its header and is replaced last, in one step. So whenever
a save ends early, the folder holds the whole old adapter; and the copy is what counts where the two differ. The copy
has a digest of every tensor and one of itself; folders from before there were digests are read without.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from rlrr_kernels.adapt.config import RLRRConfig, check_schema_version
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.modules import plain_name
from rlrr_kernels.writing import check_present, write_together

TENSORS, CONFIG, CARD = "adapter.safetensors", "config.json", "README.md"
FILES = CONFIG, CARD, TENSORS
"""In the order in which they are written."""

ADAPTER_FORMAT = "rlrr_adapter"
_HEADER_KEY = "rlrr_config"
_TENSOR_DIGESTS, _DIGEST = "tensor_digests", "digest"

_T = TypeVar("_T")

SAMPLES = 4
"""Elements of a frozen weight that are kept, to recognise the checkpoint by."""

_SAMPLE_TOLERANCE = 0.02
"""Relative distance of sampled weights that rounding to 16 bits (0.004) does not reach, another checkpoint does."""


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What a folder says about its adapter, without a model.

    Attributes:
        folder: where it lies.
        config: how a backbone is adapted for it.
        base_model: ``class``, ``name`` (timm's with the weights' tag, or None) and ``num_classes`` (or None) of the
            model it was saved from.
        metadata: what :func:`save_adapter` was given.
        also_trained: names of trained tensors that are neither adapter nor head.
        shapes: name → shape of every tensor.
        backbone_sample: layer → a few elements of its frozen weight, to recognise the checkpoint.
    """

    folder: Path
    config: RLRRConfig
    base_model: dict[str, Any]
    metadata: dict[str, Any]
    also_trained: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    backbone_sample: dict[str, list[float]]


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter folders need the package safetensors, which is not installed: pip install 'rlrr-kernels[models]'"
        ) from error
    return safetensors


# ---------------------------------------------------------------- write


def adapter_document(
    config: RLRRConfig,
    base_model: Mapping[str, Any],
    also_trained: Sequence[str],
    metadata: Mapping[str, Any],
    backbone_sample: Mapping[str, list[float]],
) -> dict[str, Any]:
    """What ``config.json`` of an adapter holds, of the entries of :class:`AdapterInfo`."""
    adaptation = config.to_dict()
    return {
        "schema_version": adaptation.pop("schema_version"),
        "format": ADAPTER_FORMAT,
        "base_model": dict(base_model),
        "adaptation": adaptation,
        "also_trained": list(also_trained),
        "metadata": dict(metadata),
        "backbone_sample": dict(backbone_sample),
    }


def write_folder(
    folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor], card: Callable[[], str]
) -> Path:
    """Writes ``document`` as ``config.json``, the tensors with a copy of it, and the model card to ``folder``.

    Raises:
        TypeError, ValueError, OSError, ImportError: as for :func:`save_adapter`.
    """
    save = _safetensors().torch.save
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"model has tensors on the meta device, which hold no values to save: {on_meta[0]}")
    # Copied: safetensors refuses tensors that share memory, as tied weights do. One header entry: it shuffles several.
    copies = {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        written = json.loads(json.dumps(document))
        written[_TENSOR_DIGESTS] = {name: _tensor_digest(tensor) for name, tensor in copies.items()}
        text = json.dumps({**written, _DIGEST: _document_digest(written)}, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must hold JSON types only: {error}") from error
    data = save(copies, {_HEADER_KEY: text})
    contents = {
        CONFIG: text.encode(),
        CARD: card().encode(),
        TENSORS: data,
    }
    try:
        write_together(folder, contents)
    except OSError as error:
        message = f"the adapter could not be saved ({error.strerror}); one saved there before is untouched"
        raise OSError(error.errno, message, str(folder)) from error
    return folder


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all processes where FSDP2 shards it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape and values of a contiguous tensor on the CPU."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.nbytes:
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()[:16]


def _document_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in document.items() if k != _DIGEST})).hexdigest()[:16]


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


# ---------------------------------------------------------------- read


def adapter_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Reads and checks what ``folder`` says about its adapter; no model is needed.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated, damaged or not ours, or ``schema_version`` is not this version's.
    """
    return read_adapter(Path(folder), with_tensors=False)[0]


def read_adapter(folder: Path, with_tensors: bool = True) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What :func:`adapter_info` says about ``folder``, raising alike, and its tensors, none unless asked for."""
    document, tensors, shapes = read_folder(folder, (ADAPTER_FORMAT,), with_tensors)
    source = folder / CONFIG
    # Versions that took names from wrapped modules wrote torch's parts of them.
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    shapes = {plain_name(name): shape for name, shape in shapes.items()}
    try:
        config = RLRRConfig.from_dict({"schema_version": document["schema_version"], **document["adaptation"]})
        info = AdapterInfo(
            folder=folder,
            config=config,
            base_model=_entry(document, "base_model", dict),
            metadata=_entry(document, "metadata", dict),
            also_trained=_also_trained(_entry(document, "also_trained", list), shapes),
            shapes=shapes,
            backbone_sample=as_sample(_entry(document, "backbone_sample", dict)),
        )
    except KeyError as error:
        raise ValueError(f"{source} misses the entry {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from error
    return info, tensors


_JSON_NAMES: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}


def _entry(document: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    value = document[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {_JSON_NAMES[kind]}; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _also_trained(names: list[Any], shapes: Mapping[str, Any]) -> tuple[str, ...]:
    for name in names:
        if not isinstance(name, str) or plain_name(name) not in shapes:
            raise ValueError(f"also_trained must name tensors of {TENSORS}; got {_short(name)}")
    return tuple(dict.fromkeys(map(plain_name, names)))


def as_sample(sample: Mapping[str, Any]) -> dict[str, list[float]]:
    """``sample`` as :func:`rlrr_kernels.adapt.folder.save_load.sample_backbone` made it.

    Raises:
        ValueError: an entry is no list of so many finite numbers.
    """
    for name, values in sample.items():
        if not (isinstance(values, list) and len(values) == SAMPLES and all(map(_is_finite, values))):
            raise ValueError(f"backbone_sample must hold {SAMPLES} numbers of {name}; got {_short(values)}")
    return {name: [float(value) for value in values] for name, values in sample.items()}


def other_weights(sample: Mapping[str, list[float]], present: Mapping[str, list[float]]) -> list[str]:
    """Layers of ``sample`` whose frozen weight differs from that in ``present``, a sample of another backbone."""
    differing = []
    for name, values in sample.items():
        distance = math.dist(present.get(name, [math.nan] * SAMPLES), values)
        if not distance <= _SAMPLE_TOLERANCE * math.hypot(*values):
            differing.append(name)
    return differing


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def read_folder(
    folder: Path, formats: tuple[str, ...], with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """What :func:`write_folder` wrote: the document, the tensors (none unless asked for) and their shapes, by name.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated, damaged or not ours, ``format`` is not among ``formats``, or ``schema_version``
            is not one this package reads.
    """
    _check_files(folder)
    source = folder / CONFIG
    document = _parse(source, source.read_bytes(), formats)
    tensors, shapes, copy = _read_tensors(folder / TENSORS, with_tensors)
    if copy is not None:
        source = folder / TENSORS
        inner = _parse(source, copy.encode(), formats)
        if _canonical(inner) != _canonical(document):
            warnings.warn(
                f"{folder / CONFIG} differs from its copy inside {TENSORS}, which is used: a save was interrupted, or "
                "the file was edited",
                stacklevel=5,
            )
        document = inner
    _check_digests(source, document, folder / TENSORS, tensors)
    return document, tensors, shapes


def _check_digests(source: Path, document: Mapping[str, Any], file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` that names what differs from what was saved; without digests nothing is checked."""
    if _DIGEST in document and document[_DIGEST] != _document_digest(document):
        raise ValueError(f"{source} is damaged or was edited: its settings do not have the digest they were saved with")
    digests = document.get(_TENSOR_DIGESTS)
    if not tensors or digests is None:
        return
    if not isinstance(digests, dict):
        raise ValueError(f"{source}: {_TENSOR_DIGESTS} must be an object; got {_short(digests)}")
    damaged = [name for name, tensor in tensors.items() if digests.get(name) != _tensor_digest(tensor)]
    damaged += [f"{name} (missing)" for name in digests if name not in tensors]
    if damaged:
        raise ValueError(f"{file} is damaged: tensors without the digest they were saved with: {some(damaged)}")


def _check_files(folder: Path) -> None:
    check_present(folder, "the adapter folder", folder=True)
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        held = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} is no adapter written by save_adapter: it has no {' and no '.join(missing)}; it holds "
            + (", ".join(held[:8]) + (" ..." if len(held) > 8 else "") if held else "nothing")
        )


def _parse(path: Path, data: bytes, formats: tuple[str, ...]) -> dict[str, Any]:
    try:
        document = json.loads(data)
        _canonical(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON: {error}") from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ValueError(f"{path} was not written by save_adapter: it has no schema_version")
    try:
        check_schema_version(document["schema_version"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if document.get("format") not in formats:
        expected = " or ".join(map(repr, formats))
        raise ValueError(f"{path}: format must be {expected}; got {_short(document.get('format'))}")
    return document


def _read_tensors(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], str | None]:
    safetensors = _safetensors()
    try:
        if with_tensors:
            # At once: safe_open's get_tensor never gives back 64 bytes of a tensor, and takes three times as long.
            data = path.read_bytes()
            tensors = dict(sorted(safetensors.torch.load(data).items()))  # as safe_open names them
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            return tensors, shapes, header.get("__metadata__", {}).get(_HEADER_KEY)
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return {}, shapes, (file.metadata() or {}).get(_HEADER_KEY)
    except Exception as error:  # safetensors and torch have one each for what a header can say
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
