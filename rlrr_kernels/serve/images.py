"""Images as they arrive: decoded only when what their file says of itself bounds the memory and the time."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from rlrr_kernels.train.data.images import ImageError, read_image

MOST_SCANS = 100
"""Of a JPEG file, each of which is a pass over all of the image; encoders make a dozen."""

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF

_SCAN = b"\xff\xda"

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class TooManyPixelsError(ValueError):
    """An image has more pixels than are decoded, or they are to be computed too often."""


class UnknownFormatError(ValueError):
    """What arrived is no image of a format that is read."""


def decode(data: bytes, max_pixels: float, shorter_side: float = 0.0) -> Image.Image:
    """The image in ``data`` as RGB, as :func:`rlrr_kernels.train.data.images.read_image` has it.

    Args:
        data: a file.
        max_pixels: of the image, of a tile of it, and of what it is resized to.
        shorter_side: pixels that its shorter side is going to be resized to; 0 where the longer one does not follow.

    Raises:
        UnknownFormatError: it is none, or of another format than :data:`FORMATS`.
        TooManyPixelsError: its header says that it has more than ``max_pixels``, or it has over :data:`MOST_SCANS`.
        ImageError: its pixels cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            tags = getattr(image, "tag_v2", {})
            tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
            scans = data.count(_SCAN) if image.format == "JPEG" else 0
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"the image has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise UnknownFormatError(f"the body is no image that is read here: {', '.join(FORMATS)}") from error
    except Exception as error:  # a header that is cut off or damaged
        raise ImageError(f"cannot read the image: {error}") from error
    size, most = f"{width} x {height}", f"at most {max_pixels / 1e6:g} are decoded"
    if width * height > max_pixels:
        raise TooManyPixelsError(f"the image has {size} = {width * height / 1e6:.1f} megapixels; {most}")
    if tile > max_pixels:
        raise TooManyPixelsError(f"the image has tiles of {tile / 1e6:.1f} megapixels; {most}")
    if scans > MOST_SCANS:
        raise TooManyPixelsError(f"the image has {scans} scans; at most {MOST_SCANS} are decoded")
    resized = width * height * (shorter_side / max(1, min(width, height))) ** 2
    if resized > max_pixels:
        raise TooManyPixelsError(
            f"the image of {size} pixels is too long: resized for the model it has {resized / 1e6:.1f} megapixels; "
            f"{most}"
        )
    return read_image(io.BytesIO(data), FORMATS)
