"""Decoding what strangers send: few formats, and of those only files whose cost their first bytes tell."""

from __future__ import annotations

import re
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from bitfast.images.files import ImageTooLargeError, decode_image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What clients may send, by Pillow's names: what browsers and cameras make ("JPEG" includes MPO).

Not EPS, for which Pillow starts Ghostscript; nor AVIF, ICO and TIFF, where an image of few pixels may hold a
frame or tile of gigabytes, which no limit of pixels sees; nor PPM, whose comments Pillow reads byte by byte.
"""

MOST_SCANS = 100
"""Of a JPEG file; encoders make up to about 20. Each costs a pass over all pixels, but takes few bytes."""

_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
"""A marker of JPEG with a segment, or the end of the image; neither a stuffed byte nor a restart."""
_END_OF_IMAGE, _START_OF_SCAN = b"\xd9", b"\xda"


def decode(content: bytes, most_pixels: int) -> Image.Image:
    """Return the decoded image (of several frames, the first) in a file.

    Raises:
        ImageTooLargeError: the image has too many pixels; it has not been decoded.
        ValueError: it is no image of :data:`FORMATS`, or a JPEG file of too many scans.
        Exception: what Pillow's decoders raise where the content is broken.
    """
    if content.startswith(b"\xff\xd8") and jpeg_scans(content, MOST_SCANS + 1) > MOST_SCANS:
        raise ValueError(f"the JPEG file has more than {MOST_SCANS} scans")
    Image.init()
    known = tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow may lack some
    try:
        return decode_image(BytesIO(content), known, most_pixels)
    except UnidentifiedImageError:
        message = f"not an image in a format that is accepted: {', '.join(known)}"
        raise ValueError(message) from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, which comes first
        raise ImageTooLargeError(str(error)) from error


def jpeg_scans(content: bytes, most: int) -> int:
    """Return how many scans the first image of a JPEG file has; counting ends at ``most``."""
    scans, position = 0, 2
    while scans < most and (marker := _MARKER.search(content, position)):
        if marker[1] == _END_OF_IMAGE:
            break
        scans += marker[1] == _START_OF_SCAN
        # Past the segment, whose first two bytes are its length: a thumbnail in it does not count.
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans
