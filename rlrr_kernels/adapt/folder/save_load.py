"""Saves the adapter of a model to a folder and loads it again, with checks that name all that does not fit.

What lies in the folder is the matter of :mod:`rlrr_kernels.adapt.folder.files`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.folder.card import model_card
from rlrr_kernels.adapt.folder.files import (
    CONFIG,
    SAMPLES,
    TENSORS,
    adapter_document,
    as_sample,
    other_weights,
    read_adapter,
    whole,
    write_folder,
)
from rlrr_kernels.adapt.model import (
    adapt_report,
    adaptation_of,
    apply_adaptation,
    check_not_distributed,
    head_tensors,
    is_adapted,
    own_parameters,
    plan_adaptation,
    planned_shapes,
)
from rlrr_kernels.adapt.modules import check_not_sharded, class_name, named_modules, named_tensors, unwrap
from rlrr_kernels.adapt.report import AdaptReport
from rlrr_kernels.nn.rescaled import Rescaled

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
    check_not_sharded(model)
    adaptation, model, folder = adaptation_of(model), unwrap(model), Path(folder)
    tensors, also_trained = trained_tensors(model)
    broken = _not_finite(tensors, tensors)
    if broken:
        raise ValueError(f"trained tensors that are not finite cannot be saved: {', '.join(broken)}")
    sample = sample_backbone(model, adaptation.layers)
    document = adapter_document(adaptation.config, describe_base(model), also_trained, metadata or {}, sample)
    return write_folder(folder, document, tensors, lambda: model_card(document, adapt_report(model), usage))


def trained_tensors(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors to save by state-dict name, and which of them are neither adapter nor head."""
    tensors: dict[str, Tensor] = {**own_parameters(model), **head_tensors(model, adaptation_of(model).heads)}
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


def describe_base(model: nn.Module) -> dict[str, Any]:
    """``class``, ``name`` (timm's with the tag of its weights, or None), ``num_classes`` (or None), as JSON types."""
    config: Any = getattr(model, "pretrained_cfg", None)  # timm's
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name and config.get("tag"):
        name = f"{name}.{config['tag']}"
    classes = getattr(model, "num_classes", None)
    return {"class": class_name(model), "name": name, "num_classes": classes if isinstance(classes, int) else None}


def sample_backbone(model: nn.Module, layers: tuple[str, ...]) -> dict[str, list[float]]:
    """Layer → a few elements of its weight [N, K], to recognise a checkpoint by."""
    modules: dict[str, Any] = dict(named_modules(model))
    sample = {}
    for name in layers:
        weight = whole(modules[name].weight.detach())
        if weight.numel() and not weight.is_meta:
            index = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long().to(weight.device)
            sample[name] = [float(f"{w:.6g}") for w in weight[torch.unravel_index(index, weight.shape)].tolist()]
    return sample


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
    (check_not_sharded if adapted else check_not_distributed)(model)
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
    return "\n  ".join([f"the adapter in {folder} does not fit this {class_name(model)}:", *problems])


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
    differing = other_weights(sample, sample_backbone(model, tuple(sample)))
    if differing:
        warnings.warn(
            f"the frozen weights of {len(differing)} of {len(sample)} layers differ from those that the "
            f"adapter in {folder} was trained on (the first is {differing[0]}): is this the right checkpoint?",
            stacklevel=stacklevel + 1,
        )
    return bool(differing)
