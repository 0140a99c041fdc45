"""Google's ``.npz`` files of ViTs: does every array go into the model, and does the model get all it needs?

timm reads such files array by array and leaves what it does not look for unread.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from rlrr_kernels.train.data.folders import shorten
from rlrr_kernels.train.models.weights import SHOWN

_HEAD = r"head/(kernel|bias)|pre_logits/(kernel|bias)"
_HYBRID = r"conv_root/kernel|gn_root/(scale|bias)|block\d+/unit\d+/.+"


def check_npz(file: str | Path, model: nn.Module) -> None:
    """Compares the arrays of ``file`` with those that timm's loader takes for ``model``, a ``VisionTransformer``.

    Known are the layouts of "An Image is Worth 16x16 Words" (keys such as
    ``Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel``, with or without ``opt/target/`` before
    them) and of big_vision (``params/``). The head's arrays are not used: a new task has a new head.

    Raises:
        ValueError: arrays are missing, left over or of integers (five of each kind are named), or the file is no
            ``.npz``.
    """
    import numpy as np

    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            names = set(archive.files)
            # Reads all of it, and so compares the checksums. bfloat16 has no kind of its own in a file.
            other = [name for name in sorted(names) if archive[name].dtype.kind not in "fV"]
    except Exception as error:  # as a damaged zip or header has it: BadZipFile, zlib.error, EOFError, SyntaxError, ...
        raise ValueError(f"it is truncated or no .npz file: {error}") from error
    prefix = next((p for p in ("opt/target/", "params/img/", "params/") if f"{p}embedding/kernel" in names), "")
    names = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}  # beside it: optimizer states
    expected = _expected(model, names, big_vision=prefix.startswith("params/") or "pos_embedding" in names)
    if hasattr(model.patch_embed, "backbone"):
        expected |= {name for name in names if re.fullmatch(_HYBRID, name)}
    if getattr(model, "attn_pool", None) is not None:
        expected |= {name for name in names if name.startswith("MAPHead_0/")}
    unknown = [name for name in sorted(names - expected) if not re.fullmatch(_HEAD, name)]
    integer = [name for name in other if name.removeprefix(prefix) in expected]
    found = {
        "missing in the file": sorted(expected - names),
        "not in the model": unknown,
        "not of floating-point numbers": integer,
    }
    problems = [f"{what}: {shorten(which, SHOWN)}" for what, which in found.items() if which]
    if problems:
        raise ValueError("\n  ".join(["the arrays do not match:", *problems]))


def _expected(model: nn.Module, names: set[str], big_vision: bool) -> set[str]:
    expected = {"embedding/kernel", "embedding/bias", "Transformer/encoder_norm/scale", "Transformer/encoder_norm/bias"}
    expected.add("pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding")
    if model.cls_token is not None:
        expected.add("cls")
    attention, norm, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in names  # all blocks in one array
    for block in ["encoderblock"] if stacked else [f"encoderblock_{i}" for i in range(len(model.blocks))]:
        parts = [f"MultiHeadDotProductAttention_{attention}/{part}" for part in ("query", "key", "value", "out")]
        parts += [f"MlpBlock_{mlp}/Dense_{i}" for i in range(2)]
        expected |= {f"Transformer/{block}/{part}/{key}" for part in parts for key in ("kernel", "bias")}
        norms = ("LayerNorm_0", f"LayerNorm_{norm}")
        expected |= {f"Transformer/{block}/{part}/{key}" for part in norms for key in ("scale", "bias")}
    return expected
