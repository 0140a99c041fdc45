"""Fused kernels and layers for fine-tuning frozen networks by residual low-rank rescaling (RLRR)."""

from rlrr_kernels.backends import backend_report, use_backend
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.ops.linear import rlrr_linear

__version__ = "0.1.0"

__all__ = ["RLRRLinear", "__version__", "backend_report", "rlrr_linear", "use_backend"]
