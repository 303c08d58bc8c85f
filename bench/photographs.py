"""Photographs as JPEG files, for what begins with decoding."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from itertools import cycle
from pathlib import Path

from PIL import Image

NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Of scikit-image's photographs."""
SIZE = 500, 400
MARGIN = 64
QUALITY = 90


def jpeg_files(count: int) -> Iterator[bytes]:
    """Yield JPEG files of 500x400: each photograph again and again, a few pixels further each time."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    for i, name in zip(range(count), cycle(NAMES), strict=False):
        image = Image.open(data / name).convert("RGB").resize((SIZE[0] + MARGIN, SIZE[1] + MARGIN))
        left, top = i % MARGIN, i * 7 % MARGIN
        file = BytesIO()
        image.crop((left, top, left + SIZE[0], top + SIZE[1])).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()
