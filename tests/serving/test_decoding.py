"""Image files that strangers make to cost a server its memory or time."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from bitfast.images.files import ImageTooLargeError
from bitfast.serving.decoding import FORMATS, MOST_SCANS, decode, jpeg_scans
from tests.serving.in_process import encoded, image_file

MOST_PIXELS = 100_000
MANY = (1000, 101)
"""One row more than allowed."""


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_formats_of_browsers_and_cameras_are_decoded(kind: str) -> None:
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    assert decode(encoded(image, kind), MOST_PIXELS).size == (40, 30)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_pixels_are_counted_before_they_are_decoded(kind: str) -> None:
    file = encoded(Image.new("RGB", MANY), kind)
    half = file[: len(file) // 2]  # decoding it would fail in another way
    with pytest.raises(ImageTooLargeError, match="1000 x 101 pixels, more than 100000"):
        decode(half if kind != "WEBP" else file, MOST_PIXELS)


# ---- sizes that lie -----------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG file of so many pixels, of which it holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def gif_with_large_frame() -> bytes:
    """A GIF file of 1x1 pixels, whose frame has 9000x9000."""
    screen = struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + screen + frame


def webp_with_large_canvas() -> bytes:
    """An animation of 9000x9000 pixels, whose only frame is tiny."""
    frame = encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    side = (8999).to_bytes(3, "little")
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side + side
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    place = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4)
    content = canvas + animation + b"ANMF" + struct.pack("<I", 16 + len(frame)) + place + frame
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


@pytest.mark.parametrize(
    "file",
    [png(2000, 2000), gif_with_large_frame(), webp_with_large_canvas()],
    ids=["png", "gif", "webp"],
)
def test_a_size_that_only_the_header_has(file: bytes) -> None:
    with pytest.raises(ImageTooLargeError):
        decode(file, MOST_PIXELS)


def test_a_size_beyond_what_pillow_allows() -> None:
    with pytest.raises(ImageTooLargeError, match="exceeds limit"):
        decode(png(2**31 - 1, 2**31 - 1), MOST_PIXELS)


def icon_with_large_image() -> bytes:
    """An icon of 16x16 pixels, whose image has more than are allowed."""
    image = encoded(Image.new("L", MANY))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + image


@pytest.mark.parametrize(
    "file",
    [
        icon_with_large_image(),
        image_file("TIFF"),  # its tiles may be larger than the image
        image_file("PPM"),
        image_file("TGA"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"#!/bin/sh\n",
        b"\xff\xd8",
        b"",
    ],
    ids=["ico", "tiff", "ppm", "tga", "eps", "svg", "script", "start of jpeg", "nothing"],
)
def test_other_formats_are_named_and_refused(file: bytes) -> None:
    with pytest.raises(ValueError, match="not an image in a format that is accepted: BMP, GIF, JP"):
        decode(file, MOST_PIXELS)


# ---- passes without end -------------------------------------------------------------------------


def with_scans(count: int) -> bytes:
    """A progressive JPEG file to which scans have been added that say "no change", up to so many."""
    file = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    blocks = 64
    table = (
        b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1, *bytes(15), 0])
    )  # "0": a block ends
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 1, 63, 0]) + bytes(blocks // 8)
    return file[:-2] + table + scan * (count - file.count(b"\xff\xda")) + file[-2:]


def test_a_jpeg_of_many_scans_is_refused() -> None:
    assert decode(with_scans(MOST_SCANS), MOST_PIXELS).size == (64, 64)
    with pytest.raises(ValueError, match="more than 100 scans"):
        decode(with_scans(MOST_SCANS + 1), MOST_PIXELS)


def test_only_the_scans_of_the_first_image_count() -> None:
    file = encoded(Image.new("RGB", (64, 64)), "JPEG")
    assert jpeg_scans(file, 1000) == 1
    assert jpeg_scans(encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True), 1000) == 10
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 20) + b"\xff\xda" * 10
    assert jpeg_scans(file[:2] + thumbnail + file[2:], 1000) == 1
    film = b"\xff\xda" * 500  # behind the picture, as telephones write it
    assert jpeg_scans(file + film, 1000) == 1
    assert decode(file + film, MOST_PIXELS).size == (64, 64)


def test_scans_cannot_be_hidden_behind_a_marker_without_length() -> None:
    file = with_scans(MOST_SCANS + 1)
    for marker in (b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\xff\xff"):
        hidden = file[:2] + marker + b"\xff\xff" + file[2:]
        assert jpeg_scans(hidden, 1000) > MOST_SCANS
