"""The authors' fine-tuned ``.pth`` adapters: imported into an adapted timm ViT or Swin, and exported back.

Their file is a ``torch.save``d dict of the trained tensors. Of their ViT, whose q, k and v are three layers:

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
``transformer.encoder.ssf_scale_enc_norm``, ``ssf_shift_...``          [D]        ``norm.scale``, ``.shift``
``transformer.embeddings.ssf_scale_patch``, ``ssf_shift_...``          [D]        ``patch_embed.norm.scale``, ...
``head.weight``, ``head.bias``                                         [C, D]     the same
====================================================================  =========  ==========================

Of their Swin, whose qkv is one layer and whose patch merging ends a stage, where timm's begins the next:

====================================================================  =========  ==========================
their name, L = ``layers.<i>.blocks.<j>``                              shape      ours
====================================================================  =========  ==========================
``L.attn.qkv.*``, ``L.attn.proj.*``, ``L.mlp.fc1.*``, ``L.mlp.fc2.*``  as above   the same names
``layers.<i>.downsample.reduction.*``                                  as above   ``layers.<i+1>.downsample...``
``L.ssf_scale_norm1``, ``L.ssf_shift_norm1``, ``...norm2``             [D]        ``L.norm1.scale``, ``.shift``
``ssf_scale_encode_norm``, ``ssf_shift_encode_norm``                   [D]        ``norm.scale``, ``.shift``
``head.weight``, ``head.bias``                                         [C, D]     ``head.fc.weight``, ``.bias``
====================================================================  =========  ==========================

A file with other names comes with a mapping ``{name in the file: name above}``, in which a ``*`` stands for a number:
no tensor is guessed at or left out.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, adapt_report, save_adapter
from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.folder.files import read_adapter
from rlrr_kernels.adapt.folder.save_load import differences
from rlrr_kernels.adapt.model import apply_adaptation, plan_adaptation, planned_shapes
from rlrr_kernels.paper.data import preprocessing
from rlrr_kernels.paper.hyperparameters import dataset_settings
from rlrr_kernels.train.config.files import read_json
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, create_model
from rlrr_kernels.train.task import Task
from rlrr_kernels.writing import check_present, write_together

CONFIG = RLRRConfig(recipe="paper")
"""How a ViT or Swin is adapted that such a file fits."""

METADATA = "authors_file"
"""Entry of an imported adapter's metadata that says where its file differs in names or shapes from the tables above."""

_FREE = ("init", "scale_dtype", "heads")
"""What an adapter's configuration may differ in."""

MODELS = ("VisionTransformer", "SwinTransformer")
"""timm's classes that compute what the authors' two models do; others have tensors of the same names and shapes."""

_SSF = ("scale", "shift")
_PARTS = {"scale_row": "scale_line", "scale_col": "scale_col", "shift": "shift_bias"}
_VIT_LAYERS = {
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "attn.proj": ("attn.out",),
    "mlp.fc1": ("ffn.fc1",),
    "mlp.fc2": ("ffn.fc2",),
}
_VIT_BLOCK_NORMS = {"norm1": "attn_norm", "norm2": "ffn_norm"}
_VIT_NORMS = {"norm": "encoder.ssf_{}_enc_norm", "patch_embed.norm": "embeddings.ssf_{}_patch"}
_SWIN_BLOCK = re.compile(r"layers\.\d+\.blocks\.\d+")
_SWIN_LAYER = re.compile(_SWIN_BLOCK.pattern + r"\.(attn\.(qkv|proj)|mlp\.fc[12])|layers\.\d+\.downsample\.reduction")


def authors_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes in the authors' file of the tensors that make up each of ours, in row order.

    Args:
        shapes: of all tensors of an adapter by our name: of a Swin where one lies in ``layers``, else of a ViT.

    Raises:
        ValueError: their files have no such tensors; all of these are named.
    """
    find = _swin_shapes if any(name.startswith("layers.") for name in shapes) else _vit_shapes
    found = {name: find(*name.rpartition(".")[::2], shape) for name, shape in shapes.items()}
    strange = [
        f"the authors' files have no tensor for {n} {list(shapes[n])}" for n, theirs in found.items() if not theirs
    ]
    if strange:
        raise ValueError("\n  ".join(strange))
    return found


def _vit_shapes(module: str, part: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What makes up the tensor ``part`` of ``module``; empty where the authors' ViT has no such tensor."""
    index, name = match.groups() if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) else ("", module)
    layer = f"transformer.encoder.layer.{index}"
    if index and name in _VIT_LAYERS:
        return _layer_shapes([f"{layer}.{child}" for child in _VIT_LAYERS[name]], part, shape)
    if index and name in _VIT_BLOCK_NORMS and part in _SSF:
        return {f"{layer}.ssf_{part}_{_VIT_BLOCK_NORMS[name]}": shape}
    if module in _VIT_NORMS and part in _SSF:
        return {f"transformer.{_VIT_NORMS[module].format(part)}": shape}
    return {f"head.{part}": shape} if module == "head" else {}


def _swin_shapes(module: str, part: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """As :func:`_vit_shapes`, of their Swin."""
    if _SWIN_LAYER.fullmatch(module):
        earlier = re.sub(r"(\d+)(?=\.downsample)", lambda stage: str(int(stage[1]) - 1), module)
        return _layer_shapes([earlier], part, shape)
    block, _, norm = module.rpartition(".")
    if _SWIN_BLOCK.fullmatch(block) and norm in ("norm1", "norm2") and part in _SSF:
        return {f"{block}.ssf_{part}_{norm}": shape}
    if module == "norm" and part in _SSF:
        return {f"ssf_{part}_encode_norm": shape}
    return {f"head.{part}": shape} if module == "head.fc" else {}


def _layer_shapes(layers: Sequence[str], part: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the tensor ``part`` of a layer of ours that is several of theirs, one below the other."""
    rows = shape[0] // len(layers) if shape else 0
    theirs = {"scale_row": (rows, 1), "scale_col": (1, shape[-1]), "shift": (1, rows)}.get(part) if rows else None
    # Another size: of another rank, or q, k and v share their s_c.
    if theirs is None or len(layers) * math.prod(theirs) != math.prod(shape):
        return {}
    return {f"{layer}.{_PARTS[part]}": theirs for layer in layers}


def load_authors_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Adapts ``model``, a plain timm ViT or Swin with a head of the right size, by the paper's recipe and fills it in.

    Args:
        model: changed only when everything fits.
        tensors: of the authors' file, dense, finite and float32, by name.
        names: ``{name in the file: name in their scheme}`` for those that differ; ``*`` stands for a number.

    Returns:
        Where the file differs from the scheme, for :func:`authors_tensors`.

    Raises:
        ValueError: a tensor of the file was not accounted for, or is missing, or has another shape or dtype, or holds
            no plain finite values (all of them are named); a name in ``names`` matches nothing; or the model is on the
            meta device, or no ViT or Swin of timm's.
    """
    _check_class(type(model).__name__)
    plan = plan_adaptation(model, CONFIG)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device; give it values before loading an adapter")
    found, renamed = _rename(tensors, names or {})
    shapes = planned_shapes(model, plan)
    sources = authors_shapes(shapes)
    expected = {name: shape for source in sources.values() for name, shape in source.items()}
    unusable = {name: reason for name, tensor in found.items() if (reason := _unusable(tensor))}
    actual = {
        name: expected.get(name, ()) if name in unusable else _as_expected(tuple(tensor.shape), expected.get(name))
        for name, tensor in found.items()
    }
    problems = differences(actual, expected) + [f"{name}: {reason}" for name, reason in unusable.items()]
    if problems:
        raise ValueError(
            "\n  ".join([f"the authors' adapter does not fit this {type(model).__name__}:", *problems])
            + "\nWhere only names differ, say which is which with a mapping {name in the file: name in the scheme}"
        )
    state = {
        name: torch.cat([found[part].detach().reshape(-1).cpu() for part in source]).reshape(shapes[name])
        for name, source in sources.items()
    }
    apply_adaptation(model, plan)
    model.load_state_dict(state, strict=False)
    reshaped = {name: list(found[name].shape) for name in expected if tuple(found[name].shape) != expected[name]}
    return {"names": renamed, "shapes": reshaped}


def _check_class(name: Any) -> None:
    if name not in MODELS:
        raise ValueError(f"the authors' files are of a ViT or a Swin, timm's {' or '.join(MODELS)}; got {name}")


def _unusable(tensor: Any) -> str | None:
    """Why the values of an entry of the file cannot be used; None where they can."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}, not a tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return (
            f"a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} tensor, not a dense one"
        )
    if tensor.dtype != torch.float32:
        return f"dtype {tensor.dtype}, not torch.float32"
    if tensor.is_meta:
        return "on the meta device, which holds no values"
    return None if tensor.isfinite().all() else "not all of its values are finite"


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
    """Our adapter's tensors as the authors' file has them, float32.

    Args:
        tensors: all of an adapter's, by our name.
        file: what :func:`load_authors_tensors` returned, if they came from such a file.

    Raises:
        ValueError: their files have no such tensors, all of which are named; or ``file`` does not fit them.
    """
    names, shapes = _differing(file)
    try:
        sources = authors_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"the adapter cannot be exported:\n  {error}") from error
    exported: dict[str, Tensor] = {}
    for name, parts in sources.items():
        values = tensors[name].detach().to("cpu", torch.float32).chunk(len(parts))
        for (part, shape), value in zip(parts.items(), values, strict=True):
            theirs, wanted = names.get(part, part), shapes.get(part, shape)
            if theirs in exported or math.prod(wanted) != value.numel():
                why = "that is there already" if theirs in exported else f"{list(wanted)} is another size"
                raise ValueError(f"{METADATA}: {part} {list(shape)} cannot be written as {theirs!r}: {why}")
            exported[theirs] = value.reshape(wanted).clone()
    return exported


def _differing(file: Any) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The two entries of what :func:`load_authors_tensors` returned, as an adapter's metadata hold it."""
    if file is None:
        return {}, {}
    try:
        names, shapes = dict(file["names"]), {name: [*shape] for name, shape in dict(file["shapes"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{METADATA} must hold names and shapes; got {str(file)[:80]}") from error
    good = all(isinstance(name, str) for name in names.values())
    if not good or not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise ValueError(f"{METADATA} must hold names that are words and shapes that are sizes; got {str(file)[:80]}")
    return names, shapes


# ---------------------------------------------------------------- files


def read_authors_file(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of the authors' ``.pth`` by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or holds anything but tensors by name.
    """
    check_present(Path(file), "the adapter file", folder=False)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything: EOFError, KeyError, TypeError, struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "eights only" in reason:  # torch's advice there is to run the code that the file holds
            raise ValueError(f"{file} is damaged, or holds more than tensors by name: it is not loaded") from error
        raise ValueError(f"{file} is truncated or was not written by torch.save: {reason}") from error
    kind = type(tensors).__name__
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{file} must hold a dict of tensors; got {kind}")
    other = [
        f"{name!r} ({type(value).__name__})"
        for name, value in tensors.items()
        if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if other:
        raise ValueError(f"{file} must hold tensors by name; it has {', '.join(other[:6])}")
    return dict(tensors)


def read_names(file: str | os.PathLike[str]) -> dict[str, str]:
    """A mapping {name in the authors' file: name in the scheme} out of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    check_present(Path(file), "the file of names", folder=False)
    names = read_json(Path(file))
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
        classes: names in label order; None: their numbers. Of FGVC the authors sort the class ids of the JSON files, as
            strings where they are strings ("10" before "2").
        names: see :func:`load_authors_tensors`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, OSError: the file or the backbone cannot be read, they do not
            fit, ``dataset`` or ``classes`` have not as many classes as the head has outputs, or the folder cannot be
            written.
    """
    settings = None if dataset is None else dataset_settings(dataset)
    tensors = read_authors_file(file)
    head = _rename(tensors, names or {})[0].get("head.weight")
    if head is None or head.ndim != 2:
        raise ValueError(
            f"{file} has no head.weight [C, D], so the number of classes is unknown; it has {some(tensors)}"
        )
    count = len(head)
    if settings is not None and count != settings.classes:
        raise ValueError(
            f"dataset must be the one of {file}, whose head has {count} outputs; {dataset} has {settings.classes}"
        )
    classes = tuple(map(str, range(count))) if classes is None else tuple(classes)
    if len(classes) != count:
        raise ValueError(f"classes must be {count} names, as many as the head's outputs; got {len(classes)}")
    backbone, transform = create_model(model, count, image_size=image_size, weights=weights)
    if settings is not None:
        transform = preprocessing(settings, transform.image_size)
    try:
        differs = load_authors_tensors(backbone, tensors, names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    origin = str(weights) if str(weights) in (HUB, NO_WEIGHTS) else Path(weights).name
    task = Task(model, origin, classes, transform)
    save_adapter(backbone, out, metadata={"task": task.to_dict(), METADATA: differs}, usage=task.usage())
    return adapt_report(backbone)


def export_adapter(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> list[str]:
    """Writes the adapter in ``folder`` as the ``.pth`` that the authors' model loads.

    One that came from such a file gets that file's names and shapes again, and is equal to it tensor by tensor.

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
    try:
        _check_class(info.base_model.get("class"))
        exported = authors_tensors(tensors, info.metadata.get(METADATA))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    stream = io.BytesIO()
    torch.save(exported, stream)
    write_together(Path(file).parent, {Path(file).name: stream.getvalue()})
    return list(exported)
