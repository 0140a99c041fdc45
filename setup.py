"""Build script: the C++ extension; all metadata is in pyproject.toml.

RLRR_BUILD_CPP=0 leaves the extension out, RLRR_BUILD_CPP=1 makes a failure to build it fatal. Otherwise a failure is
printed and the package is installed without it: the operator then runs on plain torch.
"""

import glob
import os
import sys

from setuptools import setup

WANTED = os.environ.get("RLRR_BUILD_CPP", "")
if WANTED not in ("", "0", "1"):
    raise SystemExit(f"RLRR_BUILD_CPP must be 0, 1 or unset; got {WANTED!r}")

OLDEST_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000"  # its stable ABI: one binary for every later torch


def give_up(error):
    """Without the extension the package works, more slowly: say why, unless the extension was demanded."""
    if WANTED == "1":
        raise error
    print(
        f"rlrr-kernels: installing without the C++ extension: {type(error).__name__}: {error}\n"
        "rlrr-kernels: the operator will run on plain torch; RLRR_BUILD_CPP=1 makes this an error.",
        file=sys.stderr,
    )


def extension_options():
    """The keyword arguments of ``setup`` that build csrc/ (an empty dict when that cannot work)."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        give_up(error)
        return {}
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        give_up(RuntimeError(f"it needs torch >= {needed}, and {torch.__version__} is installed"))
        return {}

    class BuildOrGiveUp(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                give_up(error)

    # The longest to compile first, so that processors are busy to the end.
    names = (
        *("levels/level_avx512", "levels/pairs_avx512", "levels/level_avx2", "levels/level_portable"),
        *("multi", "ops", "runtime", "levels/levels", "module"),
    )
    headers = [name for kind in ("h", "inl") for name in glob.glob(f"csrc/**/*.{kind}", recursive=True)]
    flags = os.environ.get("RLRR_CPP_FLAGS", "").split()
    extension = CppExtension(
        "rlrr_kernels._cpp",
        [f"csrc/{name}.cpp" for name in names],
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        # GCC 12 warns about its own intrinsics and std::optional, never about these sources.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            *flags,
        ],
        extra_link_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrGiveUp},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if WANTED == "0" else extension_options()))
