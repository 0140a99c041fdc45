"""Images as they arrive: decoded only when their header says that they are small enough."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from rlrr_kernels.train.data.images import ImageError, read_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class TooManyPixelsError(ValueError):
    """An image has more pixels than are decoded."""


class UnknownFormatError(ValueError):
    """What arrived is no image of a format that is read."""


def decode(data: bytes, max_pixels: float) -> Image.Image:
    """The image in ``data`` as RGB, as :func:`rlrr_kernels.train.data.images.read_image` has it.

    Raises:
        UnknownFormatError: it is none, or of another format than :data:`FORMATS`.
        TooManyPixelsError: its header says that it has more than ``max_pixels``.
        ImageError: its pixels cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
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
