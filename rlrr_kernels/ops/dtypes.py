"""Which dtype sums, scales and factors are computed in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales, sums and 1 + s_r s_c: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
