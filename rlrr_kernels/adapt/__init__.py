"""Adapting a model with RLRR, and what follows: optimizer groups, checks, adapter folders, merging."""

from rlrr_kernels.adapt.arithmetic import combine_adapters
from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.folder.files import AdapterInfo, adapter_info
from rlrr_kernels.adapt.folder.save_load import load_adapter, save_adapter
from rlrr_kernels.adapt.gradients import check_gradients
from rlrr_kernels.adapt.merge import MergeReport, merge_adapter
from rlrr_kernels.adapt.model import adapt_model, adapt_report, is_adapted
from rlrr_kernels.adapt.optim import parameter_groups
from rlrr_kernels.adapt.recompute import recompute_activations
from rlrr_kernels.adapt.report import AdaptReport, LayerReport

__all__ = [
    "AdaptReport",
    "AdapterInfo",
    "LayerReport",
    "MergeReport",
    "RLRRConfig",
    "adapt_model",
    "adapt_report",
    "adapter_info",
    "check_gradients",
    "combine_adapters",
    "is_adapted",
    "load_adapter",
    "merge_adapter",
    "parameter_groups",
    "recompute_activations",
    "save_adapter",
]
