"""Images by name: files, addresses and base64 text, read as transformers reads them."""

from __future__ import annotations

import base64
import http.client
import io
import os
import urllib.request

from PIL import Image, ImageOps

TIMEOUT = 60
"""Seconds that a server may be silent."""

SHOWN = 100
"""Characters of a source that an error shows: base64 text has millions."""


def load_image(source: str | os.PathLike[str]) -> Image.Image:
    """Return an image in mode "RGB", turned as its EXIF data say.

    Args:
        source: The path of a file, an http:// or https:// address, or the image's bytes in base64, with
            or without "data:image/...," before them.

    Raises:
        OSError: the address cannot be fetched, or what is there is no image that Pillow decodes.
        ValueError: ``source`` is none of these.
    """
    name = os.fspath(source)
    shown = repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")
    if name.startswith(("http://", "https://")):
        return _decode(_fetch(name, shown), shown)
    if os.path.isfile(name):
        return _decode(name, shown)
    text = name.partition(",")[2] if name.startswith("data:image/") else name
    try:
        return _decode(io.BytesIO(base64.decodebytes(text.encode())), shown)
    except (OSError, ValueError) as error:
        raise ValueError(
            "image must be the path of a file, an http:// or https:// address or an image in base64, "
            f"got {shown}"
        ) from error


def _fetch(address: str, shown: str) -> io.BytesIO:
    request = urllib.request.Request(address, headers={"User-Agent": "bitfast"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return io.BytesIO(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"image {shown} cannot be fetched: {error}") from error


def _decode(file: str | io.BytesIO, shown: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise OSError(f"image {shown} cannot be decoded: {error}") from error
