"""The images to embed, in their order: files, and members of tar shards, which are read in place.

No image is read here, and nothing is ever unpacked: of a shard only the headers are read, which say where in
the file each member's bytes lie.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import math
import os
import re
import stat
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from bitfast.images.files import (
    Candidate,
    decode_image,
    describe,
    find_images,
    image_extensions,
    one_line,
    read_image,
)

MOST_OF_A_RANGE = 1_000_000
"""How many names a brace range may stand for."""

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

BRACE_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Item(NamedTuple):
    """An image to embed, or what leads to none.

    Attributes:
        path: Of the file, or of the shard.
        member: Name in the shard; None for a file.
        offset, size: Where the member's bytes lie in the shard.
        problem: Why there is no image.
    """

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    problem: str | None = None

    @property
    def name(self) -> str:
        """What the image is called in results. Bytes of a file name that are no UTF-8 stand as ``\\xff``."""
        name = self.path if self.member is None else f"{self.path}/{self.member}"
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- finding ------------------------------------------------------------------------------------


def find_items(arguments: Iterable[str]) -> list[Item]:
    """Return the images that the arguments stand for, in their order.

    Args:
        arguments: As :func:`bitfast.images.files.find_images` takes them, tar shards, and ranges of
            either (:func:`expand_ranges`).

    Raises:
        ValueError: a range is too large.
    """
    expanded = [name for argument in arguments for name in expand_ranges(argument)]
    items: list[Item] = []
    for candidate in find_images(expanded):
        items += _items_of(candidate)
    return items


def expand_ranges(argument: str) -> list[str]:
    """Return the names that ``shard-{000..010}.tar`` stands for; zeros in front are kept, as in a shell.

    A file that is called so is meant itself.

    Raises:
        ValueError: these are more than ``MOST_OF_A_RANGE``.
    """
    between = BRACE_RANGE.split(argument)
    if len(between) == 1 or os.path.lexists(argument):
        return [argument]
    # split gives: text, first, last, text, first, last, text
    ends = list(zip(between[1::3], between[2::3], strict=True))
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ends)
    if count > MOST_OF_A_RANGE:
        raise ValueError(
            f"{argument!r} stands for {count} names; at most {MOST_OF_A_RANGE} are allowed"
        )
    spelled = [_numbers(first, last) for first, last in ends]
    texts = between[::3]
    return [
        texts[0] + "".join(part for pair in zip(choice, texts[1:], strict=True) for part in pair)
        for choice in itertools.product(*spelled)
    ]


def _numbers(first: str, last: str) -> list[str]:
    """Return the numbers from ``first`` to ``last`` as they are written, in as many digits if with zeros."""
    begin, end = int(first), int(last)
    step = 1 if begin <= end else -1
    padded = any(text.startswith("0") and len(text) > 1 for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}}" for number in range(begin, end + step, step)]


def read_list(path: str) -> list[str]:
    """Return the lines of a file ("-": of standard input) that are not empty: one argument each.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text that could be file names, such as UTF-16.
    """
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    if b"\0" in content:
        raise ValueError("it is no text in UTF-8: it holds bytes of zero")
    lines = (
        line.removesuffix(b"\r") for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    )
    return [os.fsdecode(line) for line in lines if line]


def _items_of(candidate: Candidate) -> Sequence[Item]:
    name = candidate.path.lower()
    if candidate.problem is None and name.endswith(COMPRESSED_TARS):
        problem = "a compressed archive; only .tar itself is read"
        return [Item(candidate.path, problem=problem)]
    if candidate.problem is None and name.endswith(".tar"):
        return list(_members(candidate.path))
    return [Item(candidate.path, problem=candidate.problem)]


def _members(path: str) -> Iterator[Item]:
    """Yield a shard's images, in their order; what is wrong with the shard is an item at its end."""
    found = 0
    extensions = image_extensions()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        for member in _headers(path):
            item = _member(path, member, extensions)
            if item is not None:
                found += 1
                yield item
    except Exception as error:  # broken headers make tarfile raise nearly anything
        reason = one_line(error) if isinstance(error, tarfile.TarError) else describe(error)
        yield Item(path, problem=f"the archive is broken: {reason}")
        return
    if not found:
        yield Item(path, problem="the archive holds no image files")


def _headers(path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive.

    Raises:
        tarfile.TarError, OSError: it is none, or is cut off or damaged.
    """
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        end = 0
        for member in archive:
            # A negative size would send some versions of tarfile round in circles.
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError("a header with a negative size")
            end = archive.offset
            archive.members = []  # type: ignore[attr-defined]  # all of them would stay in memory
            yield member
    # tarfile takes a damaged header, and a file that ends here, for the end of the archive.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off, or a header in it is damaged")


def _member(path: str, member: tarfile.TarInfo, extensions: Collection[str]) -> Item | None:
    """Return the item of a member; None for what is no image, by its name, or is hidden."""
    parts = member.name.split("/")
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        return None
    if os.path.splitext(parts[-1])[1].lower() not in extensions or member.isdir():
        return None
    problem = None
    if member.islnk() or member.issym():
        problem = "a link, which is not followed in an archive"
    elif not member.isreg() or member.issparse():
        problem = "not a regular file"
    return Item(path, member.name, member.offset_data, member.size, problem)


# ---- reading ------------------------------------------------------------------------------------


def read_item(item: Item) -> Image.Image:
    """Return the decoded image.

    Raises:
        OSError: the item has a problem, the file cannot be read, or is no image that Pillow knows.
        Exception: what Pillow's decoders raise where the content is broken.
    """
    if item.problem is not None:
        raise OSError(item.problem)
    if item.member is None:
        return read_image(item.path)
    if item.size == 0:
        raise OSError("the file is empty")
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        content = file.read(item.size)
    if len(content) < item.size:
        raise OSError("the archive has been cut off")
    return decode_image(io.BytesIO(content))


def fingerprint(items: Iterable[Item]) -> str:
    """Return a hash of the items' names and places, in their order."""
    digest = hashlib.sha256()
    for item in items:
        line = f"{item.path}\0{item.member or ''}\0{item.offset}\0{item.size}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
