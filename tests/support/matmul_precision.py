"""Every switch of PyTorch's that lets products of float32 be rounded, each as a block after which all are as before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def switched(*settings: tuple[str, str, str] | str) -> Iterator[None]:
    """Sets the old switch to a name, or ``fp32_precision`` of (backend, operator) to the last of three, in turn."""
    before = [(*which, torch._C._get_fp32_precision_getter(*which)) for which in _WHICH]
    try:
        for which in _WHICH:  # as in a new process: what set an operator's own value keeps the general one from it
            torch._C._set_fp32_precision_setter(*which, "none")
        for setting in settings:
            if isinstance(setting, str):
                torch.set_float32_matmul_precision(setting)
            else:
                torch._C._set_fp32_precision_setter(*setting)
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for setting in before:
            torch._C._set_fp32_precision_setter(*setting)


_WHICH = (
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)

CUBLAS, ONEDNN = ("cuda", "matmul"), ("mkldnn", "matmul")

TF32_SWITCHES: dict[str, Callable[[], AbstractContextManager]] = {
    "old, high": functools.partial(switched, "high"),
    "old, medium": functools.partial(switched, "medium"),
    "new, of all": functools.partial(switched, ("generic", "all", "tf32")),
    "new, of cuBLAS": functools.partial(switched, (*CUBLAS, "tf32")),
    "new, then old": functools.partial(switched, ("generic", "all", "tf32"), "high"),
}
"""What lets a GPU's products of float32 be TF32."""
