"""Adapter folders: ``adapter.safetensors`` (trained tensors only), ``config.json`` and a model card.

``adapter.safetensors`` carries a copy of ``config.json`` in its header and is replaced last, in one step. So whenever
a save ends early, the folder holds the whole old adapter; and the copy is what counts where the two differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.card import model_card
from rlrr_kernels.adapt.config import RLRRConfig, check_schema_version
from rlrr_kernels.adapt.model import (
    adapt_report,
    adaptation_of,
    adapter_parameters,
    apply_adaptation,
    head_tensors,
    is_adapted,
    plan_adaptation,
    planned_shapes,
    unwrap,
)
from rlrr_kernels.adapt.report import AdaptReport

TENSORS, CONFIG, CARD = "adapter.safetensors", "config.json", "README.md"

ADAPTER_FORMAT = "rlrr_adapter"
_HEADER_KEY = "rlrr_config"

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

    Args:
        model: after :func:`rlrr_kernels.adapt_model` (or inside the wrappers of ``torch.compile`` or DDP).
        folder: made with its parents when missing.
        metadata: JSON types (class names, metrics, ...) kept in ``config.json`` and shown on the card.
        usage: Python on the card that makes the model again and loads the adapter from "path/to/this/folder"; None:
            timm makes the model by its name, where it has one.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, or on the meta device.
        TypeError: ``metadata`` holds something that JSON does not know.
        OSError: the folder cannot be written; names it.
        ImportError: safetensors is not installed.
    """
    adaptation, model, folder = adaptation_of(model), unwrap(model), Path(folder)
    tensors, also_trained = _trained_tensors(model)
    config = adaptation.config.to_dict()
    document = {
        "schema_version": config.pop("schema_version"),
        "format": ADAPTER_FORMAT,
        "base_model": describe_base(model),
        "adaptation": config,
        "also_trained": also_trained,
        "metadata": dict(metadata or {}),
        "backbone_sample": sample_backbone(model, adaptation.layers),
    }
    return write_folder(folder, document, tensors, lambda: model_card(document, adapt_report(model), usage))


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
    try:
        text = json.dumps(document, indent=2)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must hold JSON types only: {error}") from error
    # Copied: safetensors refuses tensors that share memory, as tied weights do. One header entry: it shuffles several.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
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


def _trained_tensors(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors to save by state-dict name, and which of them are neither adapter nor head."""
    tensors: dict[str, Tensor] = {**adapter_parameters(model), **head_tensors(model, adaptation_of(model).heads)}
    also_trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in tensors}
    return {**tensors, **also_trained}, list(also_trained)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """``class``, ``name`` (timm's with the tag of its weights, or None), ``num_classes`` (or None), as JSON types."""
    config = getattr(model, "pretrained_cfg", None)  # timm's
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name and config.get("tag"):
        name = f"{name}.{config['tag']}"
    classes = getattr(model, "num_classes", None)
    return {"class": type(model).__name__, "name": name, "num_classes": classes if isinstance(classes, int) else None}


def sample_backbone(model: nn.Module, layers: tuple[str, ...]) -> dict[str, list[float]]:
    """Layer → a few elements of its weight [N, K], to recognise a checkpoint by."""
    sample = {}
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        if weight.numel() and not weight.is_meta:
            index = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(weight.device)
            sample[name] = [float(f"{w:.6g}") for w in weight[torch.unravel_index(index, weight.shape)].tolist()]
    return sample


# ---------------------------------------------------------------- read


def adapter_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Reads and checks what ``folder`` says about its adapter; no model is needed.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated or not ours, or ``schema_version`` is not this version's.
    """
    return read_adapter(Path(folder), with_tensors=False)[0]


def read_adapter(folder: Path, with_tensors: bool = True) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What :func:`adapter_info` says about ``folder``, raising alike, and its tensors, none unless asked for."""
    document, tensors, shapes = read_folder(folder, (ADAPTER_FORMAT,), with_tensors)
    source = folder / CONFIG
    try:
        config = RLRRConfig.from_dict({"schema_version": document["schema_version"], **document["adaptation"]})
        info = AdapterInfo(
            folder=folder,
            config=config,
            base_model=dict(document["base_model"]),
            metadata=dict(document["metadata"]),
            also_trained=tuple(document["also_trained"]),
            shapes=shapes,
            backbone_sample=dict(document["backbone_sample"]),
        )
    except KeyError as error:
        raise ValueError(f"{source} misses the entry {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return info, tensors


def read_folder(
    folder: Path, formats: tuple[str, ...], with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """What :func:`write_folder` wrote: the document, the tensors (none unless asked for) and their shapes, by name.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated or not ours, ``format`` is not among ``formats``, or ``schema_version`` is not
            one this package reads.
    """
    _check_files(folder)
    document = _parse(folder / CONFIG, (folder / CONFIG).read_bytes(), formats)
    tensors, shapes, copy = _read_tensors(folder / TENSORS, with_tensors)
    if copy is not None:
        inner = _parse(folder / TENSORS, copy.encode(), formats)
        if inner != document:
            warnings.warn(
                f"{folder / CONFIG} differs from its copy inside {TENSORS}, which is used: a save was interrupted, or "
                "the file was edited",
                stacklevel=5,
            )
        document = inner
    return document, tensors, shapes


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
    except ValueError as error:
        raise ValueError(f"{path} is truncated or no JSON: {error}") from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ValueError(f"{path} was not written by save_adapter: it has no schema_version")
    try:
        check_schema_version(document["schema_version"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if document.get("format") not in formats:
        expected = " or ".join(map(repr, formats))
        raise ValueError(f"{path}: format must be {expected}; got {document.get('format')!r}")
    return document


def _read_tensors(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], str | None]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in shapes} if with_tensors else {}
            return tensors, shapes, (file.metadata() or {}).get(_HEADER_KEY)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
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
        ValueError: a file is truncated or foreign; the adapter does not fit the model (every missing, unexpected and
            wrongly shaped tensor is named); the model is on the meta device.
        ImportError: safetensors is not installed.

    Warns:
        UserWarning: the shapes fit but frozen weights differ from those the adapter was trained on.
    """
    model, folder = unwrap(model), Path(folder)
    info, tensors = read_adapter(folder)
    plan = None
    if is_adapted(model):
        _check_same_config(folder, info.config, adaptation_of(model).config)
        expected = {name: tuple(tensor.shape) for name, tensor in _trained_tensors(model)[0].items()}
    else:
        try:
            plan = plan_adaptation(model, info.config)
        except ValueError as error:
            raise ValueError(misfit(folder, model, [str(error), *_missing_modules(model, info.shapes)])) from error
        expected = planned_shapes(model, plan)
    parameters = dict(model.named_parameters())
    expected |= {name: tuple(parameters[name].shape) for name in info.also_trained if name in parameters}
    problems = differences(info.shapes, expected)
    if problems:
        raise ValueError(misfit(folder, model, problems))
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("model is on the meta device; give it values before loading an adapter")
    warn_other_weights(folder, model, info.backbone_sample, stacklevel=3)
    if plan is not None:
        apply_adaptation(model, plan)
    for name in info.also_trained:
        model.get_parameter(name).requires_grad_(True)
    model.load_state_dict(tensors, strict=False)
    return adapt_report(model)


def _check_same_config(folder: Path, saved: RLRRConfig, present: RLRRConfig) -> None:
    saved, present = saved.to_dict(), present.to_dict()
    differing = [name for name in saved if name != "init" and saved[name] != present[name]]
    if differing:
        cases = "; ".join(f"{name}: the adapter has {saved[name]!r}, the model {present[name]!r}" for name in differing)
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
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    needed = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [f"not in the model: {name}" for name in needed if name not in present]


def misfit(folder: Path, model: nn.Module, problems: list[str]) -> str:
    """The message of the error that names ``problems``."""
    return "\n  ".join([f"the adapter in {folder} does not fit this {type(model).__name__}:", *problems])


def warn_other_weights(folder: Path, model: nn.Module, sample: Mapping[str, list[float]], *, stacklevel: int) -> None:
    """Warns where the weights of ``model`` differ from ``sample``, which :func:`sample_backbone` took."""
    present = sample_backbone(model, tuple(sample))
    differing = []
    for name, values in sample.items():
        saved = torch.tensor(values, dtype=torch.float64)
        distance = (torch.tensor(present[name], dtype=torch.float64) - saved).norm()
        if not distance <= _SAMPLE_TOLERANCE * saved.norm():
            differing.append(name)
    if differing:
        warnings.warn(
            f"the frozen weights of {len(differing)} of {len(sample)} layers differ from those that the "
            f"adapter in {folder} was trained on (the first is {differing[0]}): is this the right checkpoint?",
            stacklevel=stacklevel + 1,
        )
