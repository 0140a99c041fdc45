"""What is known of GPUs: which family's tiles serve one, how large and fast it is, and whether ``auto`` trusts Triton.

Plain data and pure functions, but for :func:`gpu_of`, which asks PyTorch for the properties of a device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

INTERPRETER = "interpreter"
"""The name of the CPU, where Triton's interpreter runs the kernels."""


class Peaks(NamedTuple):
    """A GPU's datasheet: bytes a second of its memory, dense operations a second by what is multiplied."""

    bandwidth: float
    half: float
    tf32: float
    float32: float
    float64: float


class Gpu(NamedTuple):
    """A GPU as the choice of tiles and paths sees it."""

    name: str  # "sm_86", "gfx942", or INTERPRETER
    family: str  # the architecture whose tiles serve it
    multiprocessors: int
    peaks: Peaks

    @property
    def tf32(self) -> bool:
        """Whether Triton multiplies in TF32 for it."""
        return not self.name.startswith("gfx") or self.name in _AMD_WITH_TF32


# By name, of the datasheet's device: its multiprocessors, its highest clock in kHz as the driver tells it, its peaks.
_DATASHEETS = {
    "sm_80": (108, 1_410_000, Peaks(2.0e12, 312e12, 156e12, 19.5e12, 19.5e12)),  # A100, 80 GB
    "sm_86": (84, 1_800_000, Peaks(0.77e12, 155e12, 77e12, 38.7e12, 0.6e12)),  # RTX A6000
    "sm_89": (142, 2_520_000, Peaks(0.86e12, 362e12, 183e12, 91.6e12, 1.4e12)),  # L40S
    "sm_90": (132, 1_980_000, Peaks(4.8e12, 989e12, 494e12, 67e12, 67e12)),  # H200
    "sm_100": (148, 1_965_000, Peaks(8.0e12, 2250e12, 1100e12, 75e12, 37e12)),  # B200
    "sm_103": (148, 2_032_000, Peaks(8.0e12, 2500e12, 1250e12, 77e12, 1.2e12)),  # B300
    "sm_120": (188, 2_617_000, Peaks(1.79e12, 504e12, 252e12, 126e12, 2.0e12)),  # RTX PRO 6000 Blackwell
    "gfx90a": (110, 1_700_000, Peaks(1.6e12, 191e12, 48e12, 48e12, 48e12)),  # half an MI250X, which is one device
    "gfx942": (304, 2_100_000, Peaks(5.3e12, 1307e12, 653e12, 163e12, 163e12)),  # MI300X
    "gfx950": (256, 2_400_000, Peaks(8.0e12, 2300e12, 157e12, 157e12, 79e12)),  # MI355X, which has no TF32
    INTERPRETER: (6, 1_410_000, Peaks(2.0e12, 312e12, 156e12, 19.5e12, 19.5e12)),  # few, so that small tests fill them
}

DEFAULT_FAMILY = "sm_80"
"""Safe anywhere: its tiles need at most 64 KiB of shared memory in the 16-bit entries."""

_FAMILIES = {
    "sm_9": "sm_90",
    "sm_10": "sm_100",  # 10.0, 10.1 and 10.3: datacentre Blackwell; 12.x has the older matrix instructions
    "gfx950": "gfx950",
    "gfx9": "gfx942",  # CDNA
    INTERPRETER: INTERPRETER,
}
"""By the beginning of a name; any other GPU takes ``DEFAULT_FAMILY``'s tiles."""

_AMD_WITH_TF32 = ("gfx942",)
"""For every other AMD GPU ``tl.dot(input_precision="tf32")`` is a CompilationError (tried with Triton 3.8)."""

SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10,
    INTERPRETER: 1 << 30,
}  # fmt: skip
"""Shared memory one block may use (CUDA C++ programming guide, compute capabilities; AMD CDNA ISA)."""

LEAST_SHARED_BYTES = 64 << 10
"""What any GPU that Triton serves has."""

LEAST_CAPABILITY = (8, 0)
"""Below, Triton has no tensor-core product: its tiles spill 2 to 4 KB a thread for a T4 (7.5) and a V100 (7.0)."""

COMPILED_AMD = ("gfx90a", "gfx942", "gfx950")
"""AMD GPUs for which every kernel is compiled without spills (``tests/ops/linear/test_compile_only.py``, in
``make test-all``)."""


def device_name(capability: tuple[int, int] | None, gcn_arch: str | None = None) -> str:
    """ "sm_90" for capability (9, 0), AMD names without their features, "interpreter" for neither."""
    if gcn_arch:
        return gcn_arch.split(":")[0]
    return f"sm_{capability[0]}{capability[1]}" if capability else INTERPRETER


def family_of(name: str) -> str:
    """The architecture whose tiles serve a GPU of this name."""
    return next((family for prefix, family in _FAMILIES.items() if name.startswith(prefix)), DEFAULT_FAMILY)


@functools.cache
def typical(name: str) -> Gpu:
    """The GPU that stands for a name where none is at hand: the datasheet's, else that of its family."""
    multiprocessors, _, peaks = _DATASHEETS.get(name, _DATASHEETS[family_of(name)])
    return Gpu(name, family_of(name), multiprocessors, peaks)


def from_properties(name: str, properties: Any) -> Gpu:
    """The GPU of ``torch.cuda.get_device_properties``.

    Its rates are its datasheet's in proportion to multiprocessors and clock, its bandwidth that of its memory's clock
    and width. What the driver does not tell is the datasheet's.
    """
    multiprocessors, khz, peaks = _DATASHEETS.get(name, _DATASHEETS[family_of(name)])
    own = getattr(properties, "multi_processor_count", 0) or multiprocessors
    clock = getattr(properties, "clock_rate", 0) or khz
    memory_khz, bits = (getattr(properties, field, 0) or 0 for field in ("memory_clock_rate", "memory_bus_width"))
    speed = own * clock / (multiprocessors * khz)
    # Memory of NVIDIA's GPUs moves data twice a clock; what AMD's driver calls a clock differs by kind of memory.
    bandwidth = 2e3 * memory_khz * bits / 8 if memory_khz and bits and not name.startswith("gfx") else peaks.bandwidth
    return Gpu(name, family_of(name), own, Peaks(bandwidth, *(speed * rate for rate in peaks[1:])))


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a tensor is on. It never changes for a device, so that results repeat there bit by bit."""
    if device.type != "cuda":
        return typical(INTERPRETER)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return from_properties(device_name(None, properties.gcnArchName), properties)
    return from_properties(device_name((properties.major, properties.minor)), properties)


def distrust_of_triton(name: str) -> str | None:
    """Why ``auto`` leaves GPUs of this name to the library's products; None where it takes Triton's kernels."""
    if name.startswith("gfx"):
        if name in COMPILED_AMD:
            return None
        return f"the kernels are compiled for {', '.join(COMPILED_AMD)} alone before they are released; this is {name}"
    digits = name.removeprefix("sm_")
    if digits.isdigit() and (int(digits[:-1]), int(digits[-1])) < LEAST_CAPABILITY:
        return (
            f"Triton has no matrix instructions for compute capability {digits[:-1]}.{digits[-1]}, and the library's "
            "products are faster"
        )
    return None
