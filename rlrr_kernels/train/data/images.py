"""Reading images: every mode that has one meaning becomes RGB of 8 bits, the others are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

_WITHOUT_RANGE = {"F": "32-bit floating-point", "I": "32-bit integer"}
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 259, 262, 284, 339
"""Tags of a TIFF file."""

_UNPACKED, _IN_PLANES = 1, 2

_WHITE_IS_ZERO = 0
_SIGNED = 2


class ImageError(ValueError):
    """An image that cannot be read. Raised in a process of a loader, it arrives without that process's traceback."""

    def __init__(self, message: str) -> None:
        # PyTorch makes the error anew from "Caught ImageError in ...\nOriginal Traceback ...\n...ImageError: message".
        super().__init__(message.rpartition(f"{ImageError.__name__}: ")[2].strip())


def read_image(path: str | Path | BinaryIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Opens an image as RGB, turned as its EXIF data say; grey of 16 or 12 bits keeps its upper 8 bits.

    Args:
        path: of a file, or an open one.
        formats: Pillow's names of those that may be read; None: all that it knows.

    Raises:
        ImageError: a ``ValueError``: the file cannot be read as an image, or has pixels (32-bit or signed numbers of a
            TIFF file) that do not say what is black and white. The message names the file and the reason.
    """
    try:
        with Image.open(path, formats=formats) as image:
            kind = image.format
            tags = image.tag_v2 if kind == "TIFF" else {}
            bits = 12 if tuple(tags.get(_BITS_PER_SAMPLE, ())) == (12,) else 16
            numbers = "signed" if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) else _WITHOUT_RANGE.get(image.mode)
            layout = tags.get(_COMPRESSION, _UNPACKED), tags.get(_PLANAR), max(tags.get(_BITS_PER_SAMPLE, (1,)))
            if layout == (_UNPACKED, _IN_PLANES, 16):  # Pillow takes each byte for a pixel; libtiff unpacks the others
                raise ValueError(
                    "its colours of 16 bits are stored one after the other (PlanarConfiguration 2); save it with "
                    "interleaved ones or compressed"
                )
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
                upper = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
                # Pillow turns white and black of 8 bits alone.
                image = Image.fromarray(~upper if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else upper)
            elif numbers:
                raise ValueError(
                    f"its pixels are {numbers} numbers (mode {image.mode}), which do not say what is black and what is "
                    "white; convert it to unsigned ones of 8 or 16 bits"
                )
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything: OSError, SyntaxError, struct.error, ...
        name = f" {path}" if isinstance(path, str | Path) else ""
        raise ImageError(f"cannot read the image{name}: {error}") from error


def is_large(path: str | Path) -> bool:
    """Whether the image has more pixels than Pillow takes without a warning; no pixel is decoded."""
    try:
        with Image.open(path) as image:
            return image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf"))
    except Exception:  # as above
        return False
