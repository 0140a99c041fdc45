"""timm backbones by name: made, and filled with weights from a hub or a file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.find import find_heads, under
from rlrr_kernels.adapt.folder.save_load import sample_backbone
from rlrr_kernels.train.data.folders import shorten
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.models.npz import check_npz
from rlrr_kernels.train.models.weights import SHOWN, read_weights
from rlrr_kernels.writing import check_present

HUB = "hub"
NO_WEIGHTS = "none"

_LARGEST_IMAGE = 2**14
"""Pixels; one image of more takes gigabytes."""


def check_model_name(name: str) -> None:
    """Raises ``ValueError`` with the nearest names unless timm has a model ``name``, or weights for its tag."""
    import timm

    base, dot, tag = name.partition(".")
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists the names"
        raise ValueError(f"timm has no model {base!r}{hint}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if dot and tag not in known:
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.3) or known
        raise ValueError(f"timm has no weights {tag!r} of {base}; there are {', '.join(near) or 'none'}")


def check_image_size(name: str, size: int) -> None:
    """Raises ``ValueError`` unless timm's model ``name`` takes images of ``size`` pixels; asked before its weights."""
    import timm

    _check_largest(size)
    with torch.device("meta"):
        _check_patches(timm.create_model(name, num_classes=0), name, size)


def is_made_for_one_size(name: str) -> bool:
    """Whether timm's model ``name`` is made for one image size, which its ``img_size`` says."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config is not None and config.fixed_input_size


def create_model(
    name: str,
    classes: int,
    *,
    image_size: int | None = None,
    weights: str | Path = HUB,
) -> tuple[nn.Module, Preprocessing]:
    """A timm model with a new head, and the preprocessing its weights expect.

    Args:
        name: timm's name, with or without a tag: ``vit_base_patch16_224.augreg_in21k``.
        classes: outputs of the head.
        image_size: pixels; None: what the weights were made for. A position embedding is resized by timm.
        weights: ``hub`` fetches them as timm does, ``none`` is a random start, the same every time, anything else is a
            file (safetensors, PyTorch, or ``.npz`` as Google published them).

    Raises:
        ValueError: unknown name (the nearest are suggested), an image size that is too large or the patches do not
            tile, or a weights file that does not fit the model.
        FileNotFoundError: the weights file does not exist.
        ConnectionError: the hub could not be reached.
    """
    import timm
    from timm.data import resolve_model_data_config

    check_model_name(name)
    _check_largest(image_size or 0)
    options: dict[str, Any] = {"num_classes": classes}
    if image_size is not None and is_made_for_one_size(name):
        options["img_size"] = image_size
    if str(weights) == HUB:
        model = _from_hub(name, options)
    elif str(weights) == NO_WEIGHTS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(name, **options)
    else:
        model = _from_file(name, classes, options, Path(weights))
    data = resolve_model_data_config(model)
    size = image_size or data["input_size"][-1]
    _check_patches(model, name, size)
    return model, Preprocessing(size, data["crop_pct"], data["interpolation"], data["mean"], data["std"])


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    import timm
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or _hub_is_out_of_reach(constants.ENDPOINT)  # else it retries for a minute
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # whatever a hub's HTTP library raises; timm's own complaint is a RuntimeError
        reasons = ("Connection", "Connect", "Timeout", "HTTP", "Hub", "LocalEntry", "Offline", "URLError")
        missing = "No pretrained weights exist" in str(error)
        if missing or isinstance(error, OSError) or any(part in type(error).__name__ for part in reasons):
            reason = "timm knows of none" if missing else f"{type(error).__name__}, is there a network?"
            raise ConnectionError(
                f"the weights of {name} could not be fetched ({reason}); give a local file with --weights FILE, or a "
                "random start with --weights none"
            ) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_is_out_of_reach(endpoint: str) -> bool:
    host = urllib.parse.urlsplit(endpoint).hostname
    if urllib.request.getproxies() or host is None:
        return False
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def _from_file(name: str, classes: int, options: dict[str, Any], file: Path) -> nn.Module:
    """timm's loading, with its conversions of names and sizes, but strict about everything except the head."""
    import timm
    from timm.models import VisionTransformer

    check_present(file, "the weights file", folder=False)
    # Without a head, and timm told that the file has none either: only then does it load strictly.
    options = options | {"pretrained": True, "num_classes": 0}
    try:
        with torch.device("meta"):
            meta = timm.create_model(name, **options | {"pretrained": False})
        overlay = {"source": "", "num_classes": 0}  # else names such as hf-hub:... have timm fetch other weights
        if file.suffix == ".npz":
            if isinstance(meta, VisionTransformer):
                check_npz(file, meta)
            overlay |= {"file": str(file), "custom_load": True}
        else:
            heads = meta.pretrained_cfg.get("classifier") or ()
            heads = (heads,) if isinstance(heads, str) else heads
            overlay |= {"state_dict": read_weights(file, meta.state_dict(), heads)}
        with _all_filled(type(meta)):
            model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
        broken = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"NaN or infinite numbers in {shorten(broken, SHOWN)}")
    except Exception as error:  # timm, torch, safetensors and pickle each have their own
        reason = _condensed(str(error).strip()) or type(error).__name__
        raise ValueError(f"the weights file {file} does not fit {name}: {reason}") from error
    model.pretrained_cfg.pop("state_dict", None)
    model.reset_classifier(classes)
    return model


@contextlib.contextmanager
def _all_filled(kind: type[nn.Module]) -> Iterator[None]:
    """Within, a state dict that leaves tensors of a ``kind`` unfilled is refused: timm lets it pass for some models."""
    original = kind.load_state_dict

    def load_state_dict(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        if result.missing_keys:
            raise ValueError(f"missing in the file: {shorten(result.missing_keys, SHOWN)}")
        return result

    own = "load_state_dict" in vars(kind)
    kind.load_state_dict = load_state_dict
    try:
        yield
    finally:
        if own:
            kind.load_state_dict = original
        else:
            del kind.load_state_dict


def _condensed(message: str) -> str:
    """PyTorch's message about a state dict, five names of each kind and how many more there are."""
    lines, mismatches = [], []
    for line in message.splitlines():
        names = re.findall(r'"([^"]+)"', line)
        if "key(s) in state_dict" in line:
            line = f"{line.partition(':')[0]}: {shorten(names, SHOWN)}"
        (mismatches if line.strip().startswith("size mismatch for") else lines).append(line)
    more = [f"\tand {len(mismatches) - SHOWN} more of another size"] if len(mismatches) > SHOWN else []
    return "\n".join([*lines, *mismatches[:SHOWN], *more])


def backbone_digest(model: nn.Module) -> str:
    """A digest of a few elements of every linear layer and convolution but the head's, to tell other weights by."""
    heads = find_heads(model, RLRRConfig())
    kinds = (nn.Linear, nn.Conv2d)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds) and not under(name, heads)]
    return hashlib.sha256(json.dumps(sample_backbone(model, tuple(layers))).encode()).hexdigest()


def _check_largest(size: int) -> None:
    if size > _LARGEST_IMAGE:
        raise ValueError(f"image_size must be at most {_LARGEST_IMAGE}; got {size}")


def _check_patches(model: nn.Module, name: str, size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return
    patch = patch[0] if isinstance(patch, tuple) else patch
    if size < patch or size % patch:
        below = max(size // patch, 1) * patch
        raise ValueError(
            f"the image size must be a multiple of {patch}, the patch size of {name}; got {size}, "
            f"the nearest are {below} and {below + patch}"
        )
