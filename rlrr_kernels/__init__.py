"""Fused kernels and layers for fine-tuning frozen networks by residual low-rank rescaling (RLRR)."""

from rlrr_kernels.adapt import AdaptReport, RLRRConfig, adapt_model
from rlrr_kernels.backends import backend_report, use_backend
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.ops.linear import rlrr_linear
from rlrr_kernels.ops.norm_rescale import norm_rescale

__version__ = "0.1.0"

__all__ = [
    "AdaptReport",
    "NormRescale",
    "RLRRConfig",
    "RLRRLinear",
    "__version__",
    "adapt_model",
    "backend_report",
    "norm_rescale",
    "rlrr_linear",
    "use_backend",
]
