"""Adapter folders: ``adapter.safetensors`` (trained tensors only), ``config.json`` and a model card.

``adapter.safetensors`` carries a copy of ``config.json`` in its header and is replaced last, in one step. So whenever
a save ends early, the folder holds the whole old adapter; and the copy is what counts where the two differ. The copy
has a digest of every tensor and one of itself; folders from before there were digests are read without.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.card import model_card
from rlrr_kernels.adapt.config import RLRRConfig, check_schema_version
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.model import (
    adapt_report,
    adaptation_of,
    adapter_parameters,
    apply_adaptation,
    check_not_distributed,
    head_tensors,
    is_adapted,
    plan_adaptation,
    planned_shapes,
)
from rlrr_kernels.adapt.modules import named_modules, named_tensors, plain_name, unwrap
from rlrr_kernels.adapt.report import AdaptReport
from rlrr_kernels.nn.rescaled import Rescaled

TENSORS, CONFIG, CARD = "adapter.safetensors", "config.json", "README.md"

ADAPTER_FORMAT = "rlrr_adapter"
_HEADER_KEY = "rlrr_config"
_TENSOR_DIGESTS, _DIGEST = "tensor_digests", "digest"

_T = TypeVar("_T")

_SAMPLES = 4
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


# ---------------------------------------------------------------- save


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    usage: str | None = None,
) -> Path:
    """Writes the trained tensors of an adapted model, its configuration and a model card to ``folder``.

    Other files in the folder are left alone. An adapter that lies there is replaced in one step at the very end: when
    the save fails (no space left, killed), it is still there and whole.

    Names in the files are those of the plain model, whatever wraps it or parts of it (``torch.compile``, activation
    checkpointing, DDP, FSDP). Of weights that FSDP shards every process must save, FSDP1's inside
    ``FullyShardedDataParallel.summon_full_params(model)``.

    Args:
        model: after :func:`rlrr_kernels.adapt_model`.
        folder: made with its parents when missing.
        metadata: JSON types (class names, metrics, ...) kept in ``config.json`` and shown on the card.
        usage: Python on the card that makes the model again and loads the adapter from "path/to/this/folder"; None:
            timm makes the model by its name, where it has one.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, or on the meta device, sharded by FSDP1, or a trained tensor is not finite
            (named).
        TypeError: ``metadata`` holds something that JSON does not know.
        OSError: the folder cannot be written; names it.
        ImportError: safetensors is not installed.
    """
    _check_not_sharded(model)
    adaptation, model, folder = adaptation_of(model), unwrap(model), Path(folder)
    tensors, also_trained = trained_tensors(model)
    broken = _not_finite(tensors, tensors)
    if broken:
        raise ValueError(f"trained tensors that are not finite cannot be saved: {', '.join(broken)}")
    sample = sample_backbone(model, adaptation.layers)
    document = adapter_document(adaptation.config, describe_base(model), also_trained, metadata or {}, sample)
    return write_folder(folder, document, tensors, lambda: model_card(document, adapt_report(model), usage))


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
    copies = {name: _whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
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


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes all files beside their targets first, then replaces these in order.

    An error while writing, such as a full disk, leaves all targets as they were. A process that dies between two
    replacements leaves the earlier targets new and the later ones old.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    staged = {name: folder / f".{name}{suffix}" for name in contents}
    try:
        for name, path in staged.items():
            with open(path, "xb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():  # nothing is written any more; the last file is the one that counts
            os.replace(path, folder / name)
        _sync_directory(folder)
    except BaseException:
        for path in staged.values():
            path.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if empty
        raise


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def trained_tensors(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors to save by state-dict name, and which of them are neither adapter nor head."""
    tensors: dict[str, Tensor] = {**adapter_parameters(model), **head_tensors(model, adaptation_of(model).heads)}
    known = set(map(id, tensors.values()))
    also_trained = {}
    for name, tensor in named_tensors(model):
        if tensor.requires_grad and id(tensor) not in known:
            known.add(id(tensor))
            also_trained[name] = tensor
    return {**tensors, **also_trained}, list(also_trained)


def _not_finite(tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[str]:
    """Names of ``tensors`` with a NaN or, unless ``present`` has a buffer of that name (a mask), an infinity."""
    broken = []
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        strange = tensor.isnan() if not isinstance(present.get(name), nn.Parameter | None) else ~tensor.isfinite()
        if strange.any():
            broken.append(name)
    return broken


def _whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all processes where FSDP2 shards it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_not_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel" and module.training_state.name != "SUMMON_FULL_PARAMS":
            raise ValueError(
                f"the weights of {name or 'the model'} are sharded by FullyShardedDataParallel; save inside "
                "`with FullyShardedDataParallel.summon_full_params(model):`, in every process"
            )


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


def describe_base(model: nn.Module) -> dict[str, Any]:
    """``class``, ``name`` (timm's with the tag of its weights, or None), ``num_classes`` (or None), as JSON types."""
    config: Any = getattr(model, "pretrained_cfg", None)  # timm's
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name and config.get("tag"):
        name = f"{name}.{config['tag']}"
    classes = getattr(model, "num_classes", None)
    return {"class": type(model).__name__, "name": name, "num_classes": classes if isinstance(classes, int) else None}


def sample_backbone(model: nn.Module, layers: tuple[str, ...]) -> dict[str, list[float]]:
    """Layer → a few elements of its weight [N, K], to recognise a checkpoint by."""
    modules: dict[str, Any] = dict(named_modules(model))
    sample = {}
    for name in layers:
        weight = _whole(modules[name].weight.detach())
        if weight.numel() and not weight.is_meta:
            index = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(weight.device)
            sample[name] = [float(f"{w:.6g}") for w in weight[torch.unravel_index(index, weight.shape)].tolist()]
    return sample


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
    """``sample`` as :func:`sample_backbone` made it.

    Raises:
        ValueError: an entry is no list of so many finite numbers.
    """
    for name, values in sample.items():
        if not (isinstance(values, list) and len(values) == _SAMPLES and all(map(_is_finite, values))):
            raise ValueError(f"backbone_sample must hold {_SAMPLES} numbers of {name}; got {_short(values)}")
    return {name: [float(value) for value in values] for name, values in sample.items()}


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
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"adapter folder {folder} {what}; expected a folder written by save_adapter")
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


# ---------------------------------------------------------------- load


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> AdaptReport:
    """Loads the adapter in ``folder`` into ``model``: a fresh backbone, which is adapted for it, or an adapted model.

    Everything is checked first: when something does not fit, all of it is named and the model is left as it was.

    Args:
        model: the backbone the adapter was trained on, with a head of the same shape, or the same model adapted alike.
        folder: written by :func:`save_adapter`.

    Returns:
        The report of the adapted model.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated, damaged or foreign; the adapter does not fit the model (every missing,
            unexpected and wrongly shaped tensor is named); a tensor is not finite; the model is on the meta device,
            sharded by FSDP, or not adapted yet inside DDP.
        ImportError: safetensors is not installed.

    Warns:
        UserWarning: the shapes fit but frozen weights differ from those the adapter was trained on.
    """
    adapted = is_adapted(model)
    if not adapted:
        check_not_distributed(model)
    model, folder = unwrap(model), Path(folder)
    info, tensors = read_adapter(folder)
    plan = None
    if adapted:
        _check_same_config(folder, info.config, adaptation_of(model).config)
        expected = {name: tuple(tensor.shape) for name, tensor in trained_tensors(model)[0].items()}
    else:
        try:
            plan = plan_adaptation(model, info.config)
        except ValueError as error:
            raise ValueError(misfit(folder, model, [str(error), *_missing_modules(model, info.shapes)])) from error
        expected = planned_shapes(model, plan)
    present = dict(named_tensors(model))
    expected |= {n: tuple(present[n].shape) for n in info.also_trained if isinstance(present.get(n), nn.Parameter)}
    problems = differences(info.shapes, expected)
    if problems:
        raise ValueError(misfit(folder, model, problems))
    if any(tensor.is_meta for tensor in present.values()):
        raise ValueError("model is on the meta device; give it values before loading an adapter")
    if any(hasattr(present.get(name), "full_tensor") for name in tensors):
        raise ValueError("model is sharded by FSDP; load the adapter first, then shard it")
    check_values(folder / TENSORS, tensors, present)
    warn_other_weights(folder, model, info.backbone_sample, stacklevel=3)
    if plan is not None:
        apply_adaptation(model, plan)
        present = dict(named_tensors(model))
    for name in info.also_trained:
        present[name].requires_grad_(True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)
    for _, module in named_modules(model):
        if isinstance(module, Rescaled) and module.merged:
            module.merge()
    return adapt_report(model)


def check_values(path: Path, tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a tensor of another kind than the model's, or a parameter that is not finite."""
    for name, tensor in tensors.items():
        kind = present[name].dtype if name in present else torch.float32  # an adapter's own are floating-point
        if tensor.is_floating_point() != kind.is_floating_point or tensor.is_complex() != kind.is_complex:
            raise ValueError(f"{path}: {name} must be of the kind of {kind}; got {tensor.dtype}")
    broken = _not_finite(tensors, present)
    if broken:
        raise ValueError(f"{path}: tensors that are not finite: {some(broken)}")


def _check_same_config(folder: Path, saved: RLRRConfig, present: RLRRConfig) -> None:
    theirs, ours = saved.to_dict(), present.to_dict()
    differing = [name for name in theirs if name != "init" and theirs[name] != ours[name]]
    if differing:
        cases = "; ".join(f"{name}: the adapter has {theirs[name]!r}, the model {ours[name]!r}" for name in differing)
        raise ValueError(f"the adapter in {folder} does not fit, the model is adapted with another RLRRConfig: {cases}")


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A sentence for every tensor that is missing, of another shape or too many; by name → shape."""
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"missing in the adapter: {name} {list(shape)}")
        elif found[name] != shape:
            problems.append(f"shape of {name}: the adapter has {list(found[name])}, the model needs {list(shape)}")
    return problems + [f"not in the model: {name} {list(found[name])}" for name in found if name not in expected]


def _missing_modules(model: nn.Module, names: Mapping[str, Any]) -> list[str]:
    present = {name for name, _ in named_modules(model)}
    needed = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [f"not in the model: {name}" for name in needed if name not in present]


def misfit(folder: Path, model: nn.Module, problems: list[str]) -> str:
    """The message of the error that names ``problems``."""
    return "\n  ".join([f"the adapter in {folder} does not fit this {type(model).__name__}:", *problems])


def warn_other_weights(folder: Path, model: nn.Module, sample: Mapping[str, list[float]], *, stacklevel: int) -> bool:
    """Warns where the weights of ``model`` differ from ``sample``, which :func:`sample_backbone` took; whether they do.

    Raises:
        ValueError: ``sample`` is none, or names a layer that the model does not have.
    """
    modules = dict(named_modules(model))
    try:
        sample = as_sample(sample)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    unknown = [name for name in sample if not isinstance(getattr(modules.get(name), "weight", None), Tensor)]
    if unknown:
        raise ValueError(f"{folder / CONFIG}: backbone_sample names layers that are not in the model: {some(unknown)}")
    present = sample_backbone(model, tuple(sample))
    differing = []
    for name, values in sample.items():
        saved = torch.tensor(values, dtype=torch.float64)
        distance = (torch.tensor(present.get(name, [math.nan]), dtype=torch.float64) - saved).norm()
        if not distance <= _SAMPLE_TOLERANCE * saved.norm():
            differing.append(name)
    if differing:
        warnings.warn(
            f"the frozen weights of {len(differing)} of {len(sample)} layers differ from those that the "
            f"adapter in {folder} was trained on (the first is {differing[0]}): is this the right checkpoint?",
            stacklevel=stacklevel + 1,
        )
    return bool(differing)
