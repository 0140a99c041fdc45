"""The stand-ins for Triton's driver where there is no GPU.

:class:`Driver` answers what is asked while kernels are traced or compiled. Under :func:`fake_cuda`, which needs a C
compiler, Triton's own launcher runs too, real but for the driver's call: kernels are compiled for sm_90, CPU tensors
stand for those of a GPU, and nothing is computed.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

SOURCE = Path(__file__).with_name("fake_libcuda.c")
_SIZES = {"*": 8, "i32": 4, "i64": 8, "fp32": 4, "tensordesc": 128}


class Driver:
    """Answers what Triton asks a GPU's driver when it compiles."""

    def __init__(self, capability: int = 90) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Recorded(ctypes.Structure):
    """The last launch, as ``fake_libcuda.c`` records it."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("count", "function", "stream", "shared", "block")),
        ("grid", ctypes.c_uint64 * 3),
        ("parameters", ctypes.c_uint64 * 128),
    ]


class FakeCuda:
    """The library's record of launches."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._launch = Recorded.in_dll(library, "fake_launch")
        self._sizes = (ctypes.c_int * 128).in_dll(library, "fake_sizes")
        self.record([])  # what an earlier user asked for and did not launch

    @property
    def count(self) -> int:
        """Launches so far."""
        return self._launch.count

    def record(self, types: Sequence[str]) -> None:
        """The next launch, and no other, is recorded with parameters of these Triton types ("*fp32", "i32", ...).

        A "tensordesc" takes 16 values, the address, sizes, stride and block of the matrix first.
        """
        sizes = [_SIZES["*" if kind.startswith("*") else kind] for kind in types]
        self._recorded = sum(-(-size // 8) for size in sizes)
        self._sizes[:] = sizes + [0] * (128 - len(sizes))

    def last(self) -> dict[str, int | list[int]]:
        """The last launch: function, stream, shared memory, threads, grid; the parameters of the one recorded last."""
        fields = {name: getattr(self._launch, name) for name in ("function", "stream", "shared", "block")}
        return fields | {"grid": list(self._launch.grid), "parameters": self._launch.parameters[: self._recorded]}


@functools.cache
def _library() -> tuple[ctypes.CDLL, str]:
    """The library, loaded in such a way that ``dlopen("libcuda.so.1")`` finds it, and its folder."""
    folder = tempfile.mkdtemp(prefix="fake_cuda_")
    path = f"{folder}/libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(SOURCE), "-o", path]
    subprocess.run(command, check=True, capture_output=True, text=True)
    Path(folder, "libcuda.so").symlink_to(path)  # by which Triton before 3.6 links
    return ctypes.CDLL(path, ctypes.RTLD_GLOBAL), folder


class _LaunchingDriver(Driver, nvidia.CudaDriver):
    """Triton's driver for NVIDIA GPUs, with the answers torch would give beside one H200."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.set_current_device = lambda device: None


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Makes the driver that does nothing Triton's active one.

    Raises:
        OSError: there is no C compiler.
        subprocess.CalledProcessError: the library does not compile.
    """
    library, folder = _library()
    active = triton.runtime.driver._active
    with mock.patch.object(nvidia, "library_dirs", return_value=[nvidia.libdevice_dir, folder]):
        triton.runtime.driver.set_active(_LaunchingDriver())
        try:
            yield FakeCuda(library)
        finally:
            triton.runtime.driver._active = active
