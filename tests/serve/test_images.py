"""Images that are small as files and take much memory or time to read are refused before they do."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from rlrr_kernels.serve.images import MOST_SCANS, TooManyPixelsError, check_resized, decode
from rlrr_kernels.train.data.images import ImageError
from rlrr_kernels.train.data.preprocessing import Preprocessing


@pytest.mark.parametrize("resize", ["center", "squash"])
@pytest.mark.parametrize("size", [(3, 4), (1000, 3), (3, 1000), (1000, 700), (1, 3000), (3000, 1)])
def test_a_resize_holds_no_more_pixels_than_are_allowed(monkeypatch, size, resize):
    """The limit is that of the largest image that Pillow makes: between its two passes, or after them."""
    preprocessing = Preprocessing(32, 0.9, "bilinear", (0.5,) * 3, (0.5,) * 3, resize)
    made = []
    original = Image.Image.resize

    def resized(image, new, *args, **options):
        made.append(new[0] * max(image.height, new[1]))
        return original(image, new, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", resized)
    image = Image.new("RGB", size)
    preprocessing.transform()(image)
    check_resized(image, preprocessing, made[0])
    with pytest.raises(TooManyPixelsError, match=f"a resize to .* makes {made[0] / 1e6:.1f} megapixels; at most"):
        check_resized(image, preprocessing, made[0] - 1)


def jpeg(scans: int, *, between: bytes = b"", after: bytes = b"") -> bytes:
    """A grey progressive JPEG of that many scans, a block of which is its last one again."""
    file = io.BytesIO()
    Image.new("L", (16, 16), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()[:-2]
    last = data[data.rindex(b"\xff\xda") :]
    return data + (between + last) * (scans - data.count(b"\xff\xda")) + b"\xff\xd9" + after


def test_a_jpeg_of_too_many_scans_is_refused():
    assert decode(jpeg(MOST_SCANS), 1e5).getpixel((3, 3)) == (90, 90, 90)
    with pytest.raises(ImageError, match="cannot read the image: it has more than 100 scans"):
        decode(jpeg(MOST_SCANS + 1), 1e5)
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(jpeg(MOST_SCANS + 1, between=b"\x00\xff\xff\xfe\x00\x03."), 1e5)  # junk, a fill byte, a comment
    with pytest.raises(ImageError, match="more than 1000 markers"):
        decode(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10**6, 1e5)


def test_what_looks_like_a_scan_within_a_segment_or_after_the_image_is_none():
    comment = b"\xff\xfe" + (2 + 400).to_bytes(2, "big") + b"\xff\xda" * 200
    assert decode(jpeg(10, between=comment, after=b"\xff\xda" * 200), 1e5).size == (16, 16)


def tiff(*tiles: int, order: str = "<", big: bool = False) -> bytes:
    """An image of 16 x 16 grey pixels in one compressed tile, whose size is there once for each of ``tiles``."""
    data = zlib.compress(bytes(tiles[0] ** 2))
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(tag, tile) for tag in (322, 323) for tile in tiles]
    entries += [(324, None), (325, len(data))]
    (place, number, header) = ("Q", "Q", 16) if big else ("H", "I", 8)
    entry = struct.Struct(f"{order}HH{number}{number}")
    where = (
        header + struct.calcsize(f"{order}{place}") + len(entries) * entry.size + struct.calcsize(f"{order}{number}")
    )
    start = (b"II" if order == "<" else b"MM") + struct.pack(
        *((f"{order}HHHQ", 43, 8, 0, 16) if big else (f"{order}HI", 42, 8))
    )
    kind = 16 if big else 4  # a whole number of the directory's width
    rows = b"".join(entry.pack(tag, kind, 1, where if value is None else value) for tag, value in entries)
    return start + struct.pack(f"{order}{place}", len(entries)) + rows + struct.pack(f"{order}{number}", 0) + data


@pytest.mark.parametrize(("order", "big"), [("<", False), ("<", True), (">", False)])
def test_tiles_of_a_tiff_are_limited_as_its_pixels_are(order, big):
    assert decode(tiff(32, order=order, big=big), 32 * 32).size == (16, 16)
    with pytest.raises(TooManyPixelsError, match="48 x 48"):
        decode(tiff(48, order=order, big=big), 32 * 32)
    with pytest.raises(ImageError, match="a tag is there twice"):
        decode(tiff(48, 16, order=order, big=big), 32 * 32)
