"""The authors' fine-tuned ``.pth`` adapters: imported into an adapted timm ViT, and exported back.

Their file is a ``torch.save``d dict of the trained tensors of a ViT whose q, k and v are three layers:

====================================================================  =========  ==========================
their name, L = ``transformer.encoder.layer.<i>``                      shape      ours, B = ``blocks.<i>``
====================================================================  =========  ==========================
``L.attn.query.scale_line``, ``.key.``, ``.value.``                    [D, 1]     ``B.attn.qkv.scale_row``
``L.attn.query.scale_col``, ``.key.``, ``.value.``                     [1, D]     ``B.attn.qkv.scale_col``
``L.attn.query.shift_bias``, ``.key.``, ``.value.``                    [1, D]     ``B.attn.qkv.shift``
``L.attn.out.*``                                                       the same   ``B.attn.proj.*``
``L.ffn.fc1.*``, ``L.ffn.fc2.*``                                       the same   ``B.mlp.fc1.*``, ``B.mlp.fc2.*``
``L.ssf_scale_attn_norm``, ``L.ssf_shift_attn_norm``                   [D]        ``B.norm1.scale``, ``.shift``
``L.ssf_scale_ffn_norm``, ``L.ssf_shift_ffn_norm``                     [D]        ``B.norm2.scale``, ``.shift``
``transformer.encoder.ssf_scale_encoder_norm``, ``ssf_shift_...``      [D]        ``norm.scale``, ``.shift``
``transformer.embeddings.ssf_scale_patch_embeddings``, ...             [D]        ``patch_embed.norm.scale``, ``.shift``
``head.weight``, ``head.bias``                                         [C, D]     the same
====================================================================  =========  ==========================

Known from their files are the three kinds of ``attn.query``, ``ssf_scale_attn_norm``, ``ssf_shift_ffn_norm`` and
``head.weight``; the other names are inferred from these. A file with other names comes with a mapping
``{name in the file: name above}``, in which a ``*`` stands for a number: no tensor is guessed at or left out.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, adapt_report, save_adapter
from rlrr_kernels.adapt.files import differences, read_adapter, write_together
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.model import apply_adaptation, plan_adaptation, planned_shapes
from rlrr_kernels.paper.data import preprocessing
from rlrr_kernels.paper.hyperparameters import dataset_settings
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, create_model
from rlrr_kernels.train.models.task import Task

CONFIG = RLRRConfig(recipe="paper")
"""How a ViT is adapted that such a file fits."""

METADATA = "authors_file"
"""Entry of an imported adapter's metadata that says where its file differs in names or shapes from the table above."""

_FREE = ("init", "scale_dtype", "heads")
"""What an adapter's configuration may differ in."""

_LAYERS = {
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "attn.proj": ("attn.out",),
    "mlp.fc1": ("ffn.fc1",),
    "mlp.fc2": ("ffn.fc2",),
}
_PARTS = {"scale_row": "scale_line", "scale_col": "scale_col", "shift": "shift_bias"}
_BLOCK_NORMS = {"norm1": "attn_norm", "norm2": "ffn_norm"}
_NORMS = {"norm": "encoder.ssf_{}_encoder_norm", "patch_embed.norm": "embeddings.ssf_{}_patch_embeddings"}


def authors_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the authors' file of the tensors that make up ours, ``name`` of ``shape``, in row order.

    Raises:
        ValueError: their files have no such tensor.
    """
    module, _, part = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block and block[2] in _LAYERS and part in _PARTS:
        layers = _LAYERS[block[2]]
        rows = shape[0] // len(layers)
        theirs = {"scale_row": (rows, 1), "scale_col": (1, shape[-1]), "shift": (1, rows)}[part]
        if len(layers) * math.prod(theirs) == math.prod(shape):  # else another rank, or q, k and v share their s_c
            return {f"transformer.encoder.layer.{block[1]}.{layer}.{_PARTS[part]}": theirs for layer in layers}
    elif block and block[2] in _BLOCK_NORMS and part in ("scale", "shift"):
        return {f"transformer.encoder.layer.{block[1]}.ssf_{part}_{_BLOCK_NORMS[block[2]]}": shape}
    elif module in _NORMS and part in ("scale", "shift"):
        return {f"transformer.{_NORMS[module].format(part)}": shape}
    elif module == "head":
        return {name: shape}
    raise ValueError(f"the authors' files have no tensor for {name} {list(shape)}")


def load_authors_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Adapts ``model``, a plain timm ViT with a head of the right size, by the paper's recipe and fills in ``tensors``.

    Args:
        model: changed only when everything fits.
        tensors: of the authors' file, float32, by name.
        names: ``{name in the file: name in their scheme}`` for those that differ; ``*`` stands for a number.

    Returns:
        Where the file differs from the scheme, for :func:`authors_tensors`.

    Raises:
        ValueError: a tensor of the file was not accounted for, or is missing, or has another shape or dtype (all of
            them are named); a name in ``names`` matches nothing; or the model is no ViT of timm's.
    """
    plan = plan_adaptation(model, CONFIG)
    found, renamed = _rename(tensors, names or {})
    shapes = planned_shapes(model, plan)
    sources = {name: authors_shapes(name, shape) for name, shape in shapes.items()}
    expected = {name: shape for source in sources.values() for name, shape in source.items()}
    actual = {name: _as_expected(tuple(tensor.shape), expected.get(name)) for name, tensor in found.items()}
    problems = differences(actual, expected)
    problems += [f"dtype of {n}: {t.dtype}, not torch.float32" for n, t in found.items() if t.dtype != torch.float32]
    if problems:
        raise ValueError(
            "\n  ".join([f"the authors' adapter does not fit this {type(model).__name__}:", *problems])
            + "\nWhere only names differ, say which is which with a mapping {name in the file: name in the scheme}"
        )
    apply_adaptation(model, plan)
    state = {
        name: torch.cat([found[part].reshape(-1) for part in source]).reshape(shapes[name])
        for name, source in sources.items()
    }
    model.load_state_dict(state, strict=False)
    reshaped = {name: list(found[name].shape) for name in expected if tuple(found[name].shape) != expected[name]}
    return {"names": renamed, "shapes": reshaped}


def _as_expected(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> tuple[int, ...]:
    """``expected`` where ``shape`` differs from it in ones alone: a vector may come as [D] or [1, D] or [1, 1, D]."""
    same = expected is not None and [n for n in shape if n != 1] == [n for n in expected if n != 1]
    return expected if same else shape


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by their name in the scheme, and name in the scheme → name in the file where ``names`` says so."""
    renamed: dict[str, str] = {}
    for pattern, target in names.items():
        matches = {name: re.fullmatch(r"(\d+)".join(map(re.escape, pattern.split("*"))), name) for name in tensors}
        hits = {name: match for name, match in matches.items() if match}
        if not hits or pattern.count("*") != target.count("*"):
            reason = "matches no tensor of the file" if not hits else f"and {target!r} differ in their number of *"
            raise ValueError(f"names: {pattern!r} {reason}")
        for name, match in hits.items():
            numbers = iter(match.groups())
            renamed[re.sub(r"\*", lambda _, numbers=numbers: next(numbers), target)] = name
    sources = set(renamed.values())
    kept = {name: tensor for name, tensor in tensors.items() if name not in sources}
    if twice := sorted(kept.keys() & renamed.keys()):
        raise ValueError(f"names: the file has these already: {', '.join(twice)}")
    return {**kept, **{name: tensors[source] for name, source in renamed.items()}}, renamed


def authors_tensors(tensors: Mapping[str, Tensor], file: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Our adapter's tensors as the authors' file has them; ``file`` is what :func:`load_authors_tensors` returned.

    Raises:
        ValueError: their files have no such tensor; all of these are named.
    """
    file = file or {"names": {}, "shapes": {}}
    exported, strange = {}, []
    for name, tensor in tensors.items():
        try:
            parts = authors_shapes(name, tuple(tensor.shape))
        except ValueError as error:
            strange.append(str(error))
            continue
        for (part, shape), values in zip(parts.items(), tensor.detach().cpu().chunk(len(parts)), strict=True):
            values = values.reshape(file["shapes"].get(part, shape))
            exported[file["names"].get(part, part)] = values.clone()
    if strange:
        raise ValueError("\n  ".join(["the adapter cannot be exported:", *strange]))
    return exported


# ---------------------------------------------------------------- files


def read_authors_file(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of the authors' ``.pth`` by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or holds anything but tensors by name.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"the adapter file {file} does not exist")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is truncated or was not written by torch.save: {str(error).splitlines()[0]}"
        ) from error
    kind = type(tensors).__name__
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{file} must hold a dict of tensors; got {kind}")
    other = [f"{name!r} ({type(value).__name__})" for name, value in tensors.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{file} must hold tensors by name; it has {', '.join(other[:6])}")
    return dict(tensors)


def read_names(file: str | os.PathLike[str]) -> dict[str, str]:
    """A mapping {name in the authors' file: name in the scheme} out of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        names = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} must hold an object {{name in the file: name in the scheme}}")
    return names


def import_adapter(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str,
    weights: str | Path = HUB,
    image_size: int | None = None,
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
) -> AdaptReport:
    """Makes an adapter folder of the authors' ``.pth``, as :func:`rlrr_kernels.load_adapter` and ``rlrr`` read it.

    Args:
        file: theirs.
        out: the adapter folder.
        model, weights, image_size: the backbone, see :func:`create_model`; its weights are
            not kept, but a sample of them, by which others are told apart.
        dataset: one of the paper's, whose transform is written down; None: timm's for these weights.
        classes: names in label order; None: their numbers.
        names: see :func:`load_authors_tensors`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, OSError: the file or the backbone cannot be read, they do not
            fit, ``classes`` are not as many as the head's outputs, or the folder cannot be written.
    """
    tensors = read_authors_file(file)
    head, _ = _rename(tensors, names or {})
    if "head.weight" not in head:
        raise ValueError(f"{file} has no head.weight, so the number of classes is unknown; it has {some(tensors)}")
    count = len(head["head.weight"])
    classes = tuple(map(str, range(count))) if classes is None else tuple(classes)
    if len(classes) != count:
        raise ValueError(f"classes must be {count} names, as many as the head's outputs; got {len(classes)}")
    settings = None if dataset is None else dataset_settings(dataset)
    backbone, transform = create_model(model, count, image_size=image_size, weights=weights)
    if settings is not None:
        transform = preprocessing(settings, transform.image_size)
    differs = load_authors_tensors(backbone, tensors, names)
    origin = str(weights) if str(weights) in (HUB, NO_WEIGHTS) else Path(weights).name
    task = Task(model, origin, classes, transform)
    save_adapter(backbone, out, metadata={"task": task.to_dict(), METADATA: differs}, usage=task.usage())
    return adapt_report(backbone)


def export_adapter(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> list[str]:
    """Writes the adapter in ``folder`` as the authors' ``.pth``; one that came from such a file gets its names again.

    Returns:
        The names of the tensors written.

    Raises:
        FileNotFoundError, ValueError: as for :func:`rlrr_kernels.adapter_info`; or the adapter is none that the
            authors' code has.
        OSError: the file cannot be written; one that was there is untouched.
    """
    info, tensors = read_adapter(Path(folder))
    ours, paper = info.config.to_dict(), CONFIG.to_dict()
    other = [f"{name} is {ours[name]!r}" for name in ours if name not in _FREE and ours[name] != paper[name]]
    if other:
        raise ValueError(f"the authors' files hold adapters of RLRRConfig(recipe='paper') alone; {', '.join(other)}")
    exported = authors_tensors(tensors, info.metadata.get(METADATA))
    stream = io.BytesIO()
    torch.save(exported, stream)
    write_together(Path(file).parent, {Path(file).name: stream.getvalue()})
    return list(exported)
