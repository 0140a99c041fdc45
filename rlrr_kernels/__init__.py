"""Fused kernels and layers for fine-tuning frozen networks by residual low-rank rescaling (RLRR)."""

from rlrr_kernels.adapt import (
    AdapterInfo,
    AdaptReport,
    MergeReport,
    RLRRConfig,
    adapt_model,
    adapt_report,
    adapter_info,
    check_gradients,
    is_adapted,
    load_adapter,
    merge_adapter,
    parameter_groups,
    recompute_activations,
    save_adapter,
)
from rlrr_kernels.backends import backend_report, use_backend
from rlrr_kernels.bank import AdapterBank
from rlrr_kernels.explain import Explanation, explain
from rlrr_kernels.nn.additive import AdditiveLinear
from rlrr_kernels.nn.conv import RLRRConv2d
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.norm_rescale import NormRescale
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.mlp import rlrr_mlp
from rlrr_kernels.ops.multi.public import rlrr_linear_multi
from rlrr_kernels.ops.multi.task_index import TaskIndex
from rlrr_kernels.ops.norm_rescale.public import norm_rescale
from rlrr_kernels.ops.sampling.row_sample import RowSample
from rlrr_kernels.version import __version__

__all__ = [
    "AdaptReport",
    "AdapterBank",
    "AdapterInfo",
    "AdditiveLinear",
    "Explanation",
    "MergeReport",
    "NormRescale",
    "RLRRConfig",
    "RLRRConv2d",
    "RLRRLinear",
    "RowSample",
    "TaskIndex",
    "__version__",
    "adapt_model",
    "adapt_report",
    "adapter_info",
    "backend_report",
    "check_gradients",
    "explain",
    "is_adapted",
    "load_adapter",
    "merge_adapter",
    "norm_rescale",
    "parameter_groups",
    "recompute_activations",
    "rlrr_linear",
    "rlrr_linear_multi",
    "rlrr_mlp",
    "save_adapter",
    "use_backend",
]
