"""Adapting a model with RLRR, and what follows: optimizer groups, checks, adapter folders, merging."""

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.model import adapt_model, adapt_report, is_adapted
from rlrr_kernels.adapt.report import AdaptReport, LayerReport

__all__ = ["AdaptReport", "LayerReport", "RLRRConfig", "adapt_model", "adapt_report", "is_adapted"]
