"""Many adapters over one backbone, side by side in one batch."""

from rlrr_kernels.bank.bank import AdapterBank, BankedAdapter, HeldAdapter, UnknownAdapterError
from rlrr_kernels.bank.source import AdapterState

__all__ = ["AdapterBank", "AdapterState", "BankedAdapter", "HeldAdapter", "UnknownAdapterError"]
