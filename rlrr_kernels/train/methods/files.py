"""Folders of trained models, whatever the method: RLRR's are adapter folders, a baseline's have the same layout.

A baseline's ``adapter.safetensors`` holds the trained tensors (all of the model's for full fine-tuning, so that no
backbone is needed again), its ``config.json`` the method in place of RLRR's configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlrr_kernels.adapt import is_adapted, load_adapter, save_adapter
from rlrr_kernels.adapt.folder.files import ADAPTER_FORMAT, TENSORS, read_folder, write_folder
from rlrr_kernels.adapt.folder.save_load import (
    check_values,
    describe_base,
    differences,
    misfit,
    sample_backbone,
    warn_other_weights,
)
from rlrr_kernels.train.loop.trained import trained_tensors
from rlrr_kernels.train.methods.baselines import (
    TITLES,
    Baseline,
    apply_method,
    baseline_of,
    baseline_report,
    is_baseline,
)

BASELINE_FORMAT = "rlrr_baseline"
BASELINE_SCHEMA_VERSION = 1

_CARD = """\
# {title} of {base}

Trained by `rlrr finetune --method {method}` as a baseline for residual low-rank rescaling (RLRR). {trained:,} of
{total:,} parameters were trained, {head:,} of them the head's. Score it with `rlrr evaluate`, fold it into its backbone
with `rlrr merge`.

```json
{metadata}
```
"""


@dataclasses.dataclass(frozen=True)
class FolderInfo:
    """What a folder says about itself, without a model: the method, and the metadata it was saved with."""

    method: str
    metadata: dict[str, Any]


def save_trained(
    model: nn.Module, folder: str | Path, *, metadata: Mapping[str, Any], usage: str | None = None
) -> Path:
    """Writes what training changed in ``model``, adapted by RLRR or a baseline, to ``folder``; replaced in one step.

    ``metadata`` and ``usage`` are as for :func:`rlrr_kernels.save_adapter`.

    Raises:
        ValueError, TypeError, OSError: as for :func:`rlrr_kernels.save_adapter`.
    """
    if is_adapted(model):
        return save_adapter(model, folder, metadata=metadata, usage=usage)
    applied = baseline_of(model)
    plain = tuple(name for name in applied.linears if not model.get_submodule(name).weight.requires_grad)
    document = {
        "schema_version": BASELINE_SCHEMA_VERSION,
        "format": BASELINE_FORMAT,
        "base_model": describe_base(model),
        "baseline": applied.baseline.to_dict(),
        "metadata": dict(metadata),
        "backbone_sample": sample_backbone(model, plain),
    }
    return write_folder(Path(folder), document, _tensors(model), lambda: _card(model, document))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict()) if baseline_of(model).baseline.method == "full" else trained_tensors(model)


def _card(model: nn.Module, document: Mapping[str, Any]) -> str:
    base, report = document["base_model"], baseline_report(model)
    return _CARD.format(
        title=TITLES[report.method],
        method=report.method,
        base=base["name"] or base["class"],
        trained=report.trained,
        total=report.total,
        head=report.head,
        metadata=json.dumps(document["metadata"], indent=2),
    )


def folder_info(folder: str | Path) -> FolderInfo:
    """Reads what ``folder`` says about itself.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated or not ours.
    """
    document = _read(folder, with_tensors=False)[0]
    method = "rlrr" if document["format"] == ADAPTER_FORMAT else _baseline(folder, document).method
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"{folder}: metadata must be a mapping; got {metadata!r}")
    return FolderInfo(method, metadata)


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Loads ``folder`` into ``model``, a fresh backbone with a head of the same shape, in place.

    Raises:
        FileNotFoundError, ValueError: as for :func:`rlrr_kernels.load_adapter`; where tensors do not fit a baseline,
            the model is left prepared for its method.
        ImportError: a package the method needs is missing.

    Warns:
        UserWarning: the shapes fit but frozen weights differ from those it was trained on.
    """
    document, tensors, shapes = _read(folder)
    if document["format"] == ADAPTER_FORMAT:
        load_adapter(model, folder)
        return
    if is_baseline(model) or is_adapted(model):
        raise ValueError(f"model ({type(model).__name__}) is adapted already; load {folder} into a fresh one")
    try:
        apply_method(model, _baseline(folder, document))
    except ValueError as error:
        raise ValueError(misfit(Path(folder), model, [str(error)])) from error
    expected = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    problems = differences(shapes, expected)
    if problems:
        raise ValueError(misfit(Path(folder), model, problems))
    check_values(Path(folder) / TENSORS, tensors, model.state_dict(keep_vars=True))
    warn_other_weights(Path(folder), model, document.get("backbone_sample", {}), stacklevel=2)
    model.load_state_dict(tensors, strict=False)


def _read(
    folder: str | Path, with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, tuple[int, ...]]]:
    return read_folder(Path(folder), (ADAPTER_FORMAT, BASELINE_FORMAT), with_tensors)


def _baseline(folder: str | Path, document: Mapping[str, Any]) -> Baseline:
    try:
        return Baseline.from_dict(document["baseline"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
