"""Names that PyTorch does not promise to keep: each with what it is for, and what happens without it.

The other files of the package take them from here. Triton's are in the second half.
"""

from __future__ import annotations

import torch

# ---------------------------------------------------------------- PyTorch


def _public_fp32_precision(backend: str, op: str) -> str:
    return getattr(getattr(torch.backends, backend), op).fp32_precision


fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", _public_fp32_precision)
"""What products of float32 may be rounded to, asked at every launch. Without it: the public attribute, five times as
slow."""
