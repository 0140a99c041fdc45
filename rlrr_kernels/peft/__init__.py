"""RLRR as a method of Hugging Face PEFT: ``get_peft_model(model, RLRRPeftConfig(...))``. Importing it registers it.

And PEFT's own HiRA layers through ``rlrr_linear``: ``accelerate_hira(model)``.
"""

import importlib.util

if importlib.util.find_spec("peft") is None:
    raise ImportError("rlrr_kernels.peft needs the package peft: pip install 'rlrr-kernels[peft]'")

from rlrr_kernels.peft.config import RLRRPeftConfig
from rlrr_kernels.peft.convert import load_peft, to_peft
from rlrr_kernels.peft.hira import HiraReport, accelerate_hira, restore
from rlrr_kernels.peft.hotswap import hotswap_adapter
from rlrr_kernels.peft.layer import RLRRPeftLinear
from rlrr_kernels.peft.model import RLRRPeftModel
from rlrr_kernels.peft.registry import register

register(RLRRPeftConfig, RLRRPeftModel)

__all__ = [
    "HiraReport",
    "RLRRPeftConfig",
    "RLRRPeftLinear",
    "RLRRPeftModel",
    "accelerate_hira",
    "hotswap_adapter",
    "load_peft",
    "restore",
    "to_peft",
]
