"""Image files for the command line: finding them by name, folder or pattern, and reading them."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError

NEVER_DECODED = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that Pillow recognises but has no decoder for."""


class ImageTooLargeError(ValueError):
    """An image has more pixels than are allowed."""


@dataclass(frozen=True)
class Candidate:
    """A file that may be an image, or an argument that leads to none and why."""

    path: str
    problem: str | None = None


# ---- finding files ------------------------------------------------------------------------------


def find_images(arguments: Sequence[str]) -> list[Candidate]:
    """Return the files that the arguments stand for, in their order, each file once.

    Args:
        arguments: Files; folders, which stand for the image files in and below them, sorted, hidden
            ones left out; or patterns, which stand for their matches, sorted, as if the shell had
            written them out. An argument that leads to no file becomes a candidate with a problem.
    """
    candidates: dict[str, Candidate] = {}
    for argument in arguments:
        for candidate in _expand(argument):
            candidates.setdefault(os.path.abspath(candidate.path), candidate)
    return list(candidates.values())


def _expand(argument: str) -> list[Candidate]:
    # lexists, to distinguish a broken link from a name that does not exist.
    if os.path.lexists(argument):
        return _expand_path(argument) or [Candidate(argument, "the folder holds no image files")]
    matches = sorted(glob.glob(argument, recursive=True))
    candidates = [candidate for match in matches for candidate in _expand_path(match)]
    if candidates:
        return candidates
    if matches:
        return [Candidate(argument, "the folders that match hold no image files")]
    is_pattern = glob.escape(argument) != argument
    return [Candidate(argument, "nothing matches" if is_pattern else "no such file or folder")]


def _expand_path(path: str) -> list[Candidate]:
    if not os.path.isdir(path):
        return [Candidate(path)]
    extensions = image_extensions()
    candidates: list[Candidate] = []

    def unreadable(error: OSError) -> None:
        candidates.append(Candidate(os.fspath(error.filename), describe(error)))

    for folder, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        candidates += [
            Candidate(os.path.join(folder, name))
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions
        ]
    return sorted(candidates, key=lambda candidate: candidate.path)


def image_extensions() -> set[str]:
    """Return the file name extensions (".png", ...) of the formats that Pillow decodes here."""
    return {
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NEVER_DECODED
    }


# ---- reading files ------------------------------------------------------------------------------


def read_image(path: str) -> Image.Image:
    """Return the decoded image (of several frames, the first) in a file.

    Raises:
        OSError: it is no regular file, or cannot be opened, or is no image that Pillow knows.
        Exception: what Pillow's decoders raise where the content is broken.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        # Opening a named pipe would wait for a writer.
        raise OSError("not a regular file")
    if status.st_size == 0:
        raise OSError("the file is empty")
    return decode_image(path)


def decode_image(
    file: str | IO[bytes],
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
) -> Image.Image:
    """Return the decoded image (of several frames, the first) in a file, given by name or opened.

    Args:
        file: Its name, or the open file.
        formats: Names, as Pillow's, of the formats that are read; None: all that Pillow knows.
        most_pixels: Refuse a larger image before it is decoded.

    Raises:
        ImageTooLargeError: the image has more pixels.
        OSError: it is no image that Pillow knows.
        Exception: what Pillow's decoders raise where the content is broken.
    """
    with Image.open(file, formats=formats) as image:
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise ImageTooLargeError(
                f"the image has {image.width} x {image.height} pixels, more than {most_pixels}"
            )
        image.load()
        return image


def describe(error: BaseException) -> str:
    """Return in one line why a file could not be read, without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (OSError, ValueError, RuntimeError, Image.DecompressionBombError)):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)}"  # a decoder's internal error


def describe_unusable(error: BaseException) -> str:
    """Return in one line why an image could not be read, or made pixel_values by an image processor."""
    # "images[0]" is the processor's name for what the user knows by another one.
    return describe(error).removeprefix("images[0]: ")


# ---- text ---------------------------------------------------------------------------------------


def one_line(message: object) -> str:
    """Return a message as one line."""
    return " ".join(str(message).split())


def printable(text: str) -> str:
    """Return text for a terminal: control characters, as file names may hold, are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
