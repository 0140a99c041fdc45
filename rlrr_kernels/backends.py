"""Which implementation computes an operator: the names, the ways to choose one, and what ``auto`` resolves to."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlrr_kernels import devices

ENVIRONMENT_VARIABLE = "RLRR_BACKEND"

BACKENDS = ("auto", "triton", "triton.fused", "triton.merge", "cpp", "torch")
"""``triton`` chooses between its fused path and a merge by shape; the dotted names force one."""


_FORMER = {"triton.one_pass": "triton.fused"}


def check_name(name: str, source: str) -> str:
    """Returns ``name``, a former one as it is called now; raises ``ValueError`` naming ``source`` if it is none."""
    name = _FORMER.get(name, name) if isinstance(name, str) else name
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


# A plain module global, not a ContextVar: torch.compile guards on it, so a compiled model follows a change. Read at
# import, not at the first call: a guard on a value that this call then sets would compile everything twice.
_default = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def default_backend() -> str:
    """The backend used where a call says ``auto``: :func:`use_backend`, else ``RLRR_BACKEND``, else ``auto``.

    Raises:
        ValueError: ``RLRR_BACKEND`` is not a backend.
    """
    return _default if _default in BACKENDS else check_name(_default, f"environment {ENVIRONMENT_VARIABLE}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Uses backend ``name`` for every call in the block that does not name one itself (all threads).

    Args:
        name: one of :data:`BACKENDS`.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    global _default
    before = default_backend()
    _default = check_name(name, "backend")
    try:
        yield
    finally:
        _default = before


INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton's interpreter is on, which runs its kernels on CPU tensors; Triton reads the same variable."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton can be imported; it is looked for here and imported at the first launch."""


def _cpp_failure() -> str | None:
    """Loads the C++ operators; returns why they cannot be used, None when they can."""
    try:
        importlib.import_module("rlrr_kernels._cpp")
    except ImportError as error:
        if importlib.util.find_spec("rlrr_kernels._cpp") is None:
            return "the C++ extension is not built; installing with RLRR_BUILD_CPP=1 shows what stops it"
        return f"the C++ extension, which needs torch >= 2.10, does not load with torch {torch.__version__}: {error}"
    return None


CPP_FAILURE = _cpp_failure()
"""Why the C++ extension cannot be used; None when it can. Found out at import: torch.compile sees a constant."""

CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets of the C++ operators, poorest first; ``RLRR_CPU_LEVEL`` caps the one found at import."""


def distrust_of_triton(index: int | None = None) -> str | None:
    """Why ``auto`` leaves a GPU to the library's products; None where it takes Triton's kernels.

    Compilers take the answer as a constant (:mod:`rlrr_kernels.ops.host.private`).

    Args:
        index: of the CUDA device; default: the current one.
    """
    index = torch.cuda.current_device() if index is None else index
    return devices.distrust_of_triton(devices.gpu_of(torch.device("cuda", index)).name)


def resolve(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that serves a call: never ``auto``.

    Args:
        name: the ``backend`` argument of the call.
        device: that of x; the type alone stands for the current device.
        dtype: compute dtype of the call.

    Raises:
        ValueError: ``name`` is not a backend, or cannot serve this device.
    """
    if name == "auto":
        name = default_backend()
    device_type = device if isinstance(device, str) else device.type
    if name == "auto":
        # fp64 has no tensor-core path worth a kernel: cuBLAS on merged blocks is faster.
        if device_type == "cuda" and dtype != torch.float64 and HAS_TRITON:
            distrust = distrust_of_triton(None if isinstance(device, str) else device.index)
            return "triton" if distrust is None else "torch"
        return "cpp" if device_type == "cpu" and CPP_FAILURE is None else "torch"
    if name == "torch":
        return name
    name = check_name(name, "backend")
    reason = unavailable(name, device_type)
    if reason:
        raise ValueError(f"backend={name!r} cannot run here: {reason}")
    return name


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors of ``device_type``; None when it can."""
    if name == "cpp":
        if CPP_FAILURE is not None:
            return CPP_FAILURE
        if device_type != "cpu":
            return f"the C++ operators serve cpu tensors; got {device_type}"
    if name.startswith("triton"):
        if not HAS_TRITON:
            return "the package triton is not installed"
        if device_type == "cpu" and not INTERPRETING:
            return "x is on the CPU, where Triton needs its interpreter; set TRITON_INTERPRET=1 before starting Python"
        if device_type not in ("cuda", "cpu"):
            return f"Triton kernels serve cuda tensors; got {device_type}"
    return None


def cpu_level() -> str:
    """The instruction set that the C++ operators use, one of :data:`CPU_LEVELS`; they must be there."""
    return CPU_LEVELS[torch.ops.rlrr_kernels_cpp.cpu_level()]


def backend_report() -> dict[str, Any]:
    """What each backend could do on this machine and what ``auto`` chooses, as plain data.

    ``cpu_level`` is the instruction set of the C++ operators in use, None where they cannot be used. ``distrusted``
    says why ``auto`` does not take a backend that can be asked for.
    """
    cuda = torch.cuda.is_available()
    kinds = ["cpu"] + (["cuda"] if cuda else [])
    distrust = distrust_of_triton() if cuda and HAS_TRITON else None
    return {
        "torch": torch.__version__,
        "default": default_backend(),
        "cpu_level": cpu_level() if CPP_FAILURE is None else None,
        "devices": {
            device: {
                "auto": resolve("auto", device, torch.float32),
                "unavailable": {
                    name: reason for name in ("triton", "cpp") if (reason := unavailable(name, device)) is not None
                },
                "distrusted": {} if device == "cpu" or distrust is None else {"triton": distrust},
            }
            for device in kinds
        },
    }
