"""``hotswap_adapter``: another adapter's values in the place of a loaded one, without a new object or compilation."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from rlrr_kernels.adapt.find import some
from rlrr_kernels.adapt.modules import plain_name
from rlrr_kernels.peft.layer import RLRRPeftLinear

_SAME = ("residual", "sides")


@torch.no_grad()
def hotswap_adapter(model: PeftModel, folder: str, adapter_name: str = "default", **options: Any) -> None:
    """Copies the adapter in ``folder`` over a loaded one of the same layers, groups and sides, in place.

    No tensor is replaced, so a compiled model is not compiled again. The loaded adapter's rank is the room there is: of
    a smaller rank what is left is zero. Modules to save are swapped too. PEFT's own function knows LoRA alone.

    Args:
        model: with the adapter to replace, compiled or not.
        folder: of an RLRR adapter, written by ``save_pretrained``.
        adapter_name: of the loaded adapter.
        options: of ``peft.PeftConfig.from_pretrained`` and ``peft.utils.load_peft_weights``.

    Raises:
        ValueError: there is no such adapter, it is merged, or the one in ``folder`` does not fit: all that differs is
            named, and nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} does not exist; there are {', '.join(model.peft_config)}")
    ours: Any = model.peft_config[adapter_name]
    theirs: Any = PeftConfig.from_pretrained(folder, **options)
    if theirs.peft_type != ours.peft_type:
        raise ValueError(f"{folder} must hold an adapter of {ours.peft_type.value}; got {theirs.peft_type}")
    problems = [
        f"{name} is {getattr(theirs, name)!r}, of the loaded adapter {getattr(ours, name)!r}"
        for name in _SAME
        if getattr(theirs, name) != getattr(ours, name)
    ]
    own = own_tensors(model, adapter_name)
    found = load_peft_weights(folder, device="cpu", **options)
    problems += [f"{name} is not in {folder}" for name in own if name not in found]
    problems += [f"{name} is not in the loaded adapter" for name in found if name not in own]
    problems += [
        f"{name} has the shape {list(found[name].shape)}, the loaded adapter room for {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in found and not _fits(name, found[name], tensor)
    ]
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, RLRRPeftLinear)):
        problems.append(f"the loaded adapter {adapter_name} is merged; unmerge_adapter() first")
    if problems:
        raise ValueError(f"the adapter in {folder} cannot replace {adapter_name}: {some(problems, 4)}")
    for name, tensor in own.items():
        if found[name].shape != tensor.shape:
            tensor.zero_()
        tensor[tuple(slice(size) for size in found[name].shape)] = found[name].to(tensor.device, tensor.dtype)


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter by the names that ``save_pretrained`` gives them, themselves and not copies."""
    tensors, marked = {}, f".{adapter_name}"
    state = model.state_dict(keep_vars=True)
    layers = [name for name, module in model.named_modules() if isinstance(module, RLRRPeftLinear)]
    parts = {
        f"{layer}.{part}{marked}": f"{layer}.{part}" for layer in layers for part in RLRRPeftLinear.adapter_layer_names
    }
    saved = f".modules_to_save{marked}"
    for key, tensor in state.items():
        if key in parts:
            tensors[plain_name(parts[key])] = tensor
        elif f"{saved}." in key:
            tensors[plain_name(key.replace(saved, ""))] = tensor
    return tensors


def _fits(name: str, found: Tensor, room: Tensor) -> bool:
    ranks = {"rlrr_scale_row": 1, "rlrr_scale_col": 1}
    axis = ranks.get(name.rpartition(".")[2])
    if axis is None or found.dim() != room.dim():
        return found.shape == room.shape
    return all(a == b or (i == axis and a <= b) for i, (a, b) in enumerate(zip(found.shape, room.shape, strict=True)))
