"""Which dtype sums, scales and factors are computed in, and what products of float32 may be rounded to."""

from __future__ import annotations

import torch

from rlrr_kernels.ops.host import private


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales, sums and 1 + s_r s_c: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_precision(device_type: str = "cuda") -> str:
    """What the user lets products of float32 be rounded to: "ieee" (nothing), "tf32" or, on a CPU, "bf16".

    PyTorch has two switches: :func:`torch.set_float32_matmul_precision`, and ``fp32_precision`` of
    ``torch.backends``, ``torch.backends.cuda.matmul`` and ``torch.backends.mkldnn.matmul``. Once the second was
    touched, asking the first raises. This asks as the library's products do, by device, whichever was used.

    Args:
        device_type: "cpu" for oneDNN's products; any other for those of a GPU, Triton's interpreter included.
    """
    precision = private.fp32_precision("mkldnn" if device_type == "cpu" else "cuda", "matmul")
    return "ieee" if precision == "none" else precision
