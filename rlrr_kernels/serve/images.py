"""Images as they arrive: decoded and resized only when they are small enough, and stay so."""

from __future__ import annotations

import io
import math
import re
import struct

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from rlrr_kernels.train.data.images import ImageError, read_image
from rlrr_kernels.train.data.preprocessing import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

MOST_SCANS, MOST_MARKERS = 100, 1000
"""Of a JPEG file. Encoders write some ten scans; each is a pass over all pixels that takes some ten bytes of the file.
Markers are counted since Pillow reads those before the first scan one by one."""

_JPEG, _MARKER = b"\xff\xd8\xff", re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_SCAN, _END = b"\xda", b"\xd9"


class TooManyPixelsError(ValueError):
    """An image has more pixels than are decoded."""


class UnknownFormatError(ValueError):
    """What arrived is no image of a format that is read."""


def decode(data: bytes, max_pixels: float) -> Image.Image:
    """The image in ``data`` as RGB, as :func:`rlrr_kernels.train.data.images.read_image` has it.

    Raises:
        UnknownFormatError: it is none, or of another format than :data:`FORMATS`.
        TooManyPixelsError: its header says that it has more than ``max_pixels``.
        ImageError: its pixels cannot be read, or it is a JPEG file of too many scans.
    """
    if data.startswith(_JPEG):
        _check_scans(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                width, height = _tiff_size(data, image)
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"the image has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise UnknownFormatError(f"the body is no image that is read here: {', '.join(FORMATS)}") from error
    except Exception as error:  # a header that is cut off or damaged
        raise ImageError(f"cannot read the image: {error}") from error
    if width * height > max_pixels:
        size = f"{width} x {height} = {width * height / 1e6:.1f}"
        raise TooManyPixelsError(f"the image has {size} megapixels; at most {max_pixels / 1e6:g} are decoded")
    return read_image(io.BytesIO(data), FORMATS)


def _tiff_size(data: bytes, image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Width and height of the image or of its tiles, which are decoded whole, whichever is larger.

    Raises:
        ValueError: a tag is there twice, of which Pillow takes the last and libtiff, which decodes, the first.
    """
    order, big = "<" if data[:2] == b"II" else ">", data[2] == 43
    at = struct.unpack_from(f"{order}8xQ" if big else f"{order}4xI", data)[0]
    count_form, entry = ("Q", 20) if big else ("H", 12)
    (count,) = struct.unpack_from(f"{order}{count_form}", data, at)
    begin = at + struct.calcsize(f"{order}{count_form}")
    tags = [data[place : place + 2] for place in range(begin, begin + entry * min(count, 2**16), entry)]
    if len(set(tags)) < len(tags):
        raise ValueError("a tag is there twice")
    tile = [int(image.tag_v2.get(tag, 0)) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
    return max(image.width, tile[0]), max(image.height, tile[1])


def _check_scans(data: bytes) -> None:
    """Raises ``ImageError`` where a JPEG file has more scans or markers than are read."""
    at = scans = 0
    for _ in range(MOST_MARKERS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == _END:
            return
        scans += found[1] == _SCAN
        if scans > MOST_SCANS:
            raise ImageError(f"cannot read the image: it has more than {MOST_SCANS} scans")
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        at = found.end() + max(2, length)
    raise ImageError(f"cannot read the image: it has more than {MOST_MARKERS} markers")


def check_resized(image: Image.Image, preprocessing: Preprocessing, max_pixels: float) -> None:
    """Raises ``TooManyPixelsError`` where the resize to a model's input would hold more than ``max_pixels``.

    The shorter side grows to that of the input, and a longer one with it, so that one row of a million pixels becomes
    billions.
    """
    width, height = image.size
    side = math.floor(preprocessing.image_size / preprocessing.crop)
    shorter = min(width, height)
    squash = preprocessing.resize == "squash"
    new_width, new_height = (side, side) if squash else (side * width // shorter, side * height // shorter)
    pixels = new_width * max(height, new_height)  # Pillow resizes the rows first, of all of the image
    if pixels > max_pixels:
        raise TooManyPixelsError(
            f"the image has {width} x {height} pixels, of which a resize to {new_width} x {new_height} makes "
            f"{pixels / 1e6:.1f} megapixels; at most {max_pixels / 1e6:g} are held"
        )
