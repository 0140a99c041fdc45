"""The build backend: setuptools, asking for torch only when the C++ extension is to be built.

An isolated build (``pip install .``, a wheel) has only what its backend asks for. Without torch it would quietly lack
the extension; with torch in ``build-system.requires`` even a source archive, or a build with RLRR_BUILD_CPP=0, would
first download it.
"""

import os

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

if int(setuptools.__version__.partition(".")[0]) < 77:  # an isolated build has the one that pyproject.toml asks for
    raise RuntimeError(
        f"building rlrr-kernels needs setuptools >= 77, and {setuptools.__version__} is installed: update it, or leave "
        "out --no-build-isolation"
    )


def _torch() -> list[str]:
    """What compiles the extension; the package itself runs on an older one too."""
    return [] if os.environ.get("RLRR_BUILD_CPP") == "0" else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    """What setuptools wants, and torch."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    """What setuptools wants, and torch."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
