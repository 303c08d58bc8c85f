"""Where images come from: files, rows of Arrow files, rows of Parquet files. Nothing is decoded here.

Each source is small when pickled, and opens its files again where it is unpickled.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

BYTES_PER_BATCH = 64
"""Rows of Parquet that are in memory at a time while they are copied."""

NO_BYTES = -1
"""The length of an image that is given by its path."""


class Source(ABC):
    """Images by their number."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def names(self, rows: np.ndarray) -> list[str]:
        """Return the names of images."""

    @abstractmethod
    def open(self, row: int) -> tuple[str | io.BytesIO, int]:
        """Return the file of an image, by its path or opened, and how many bytes it has.

        Raises:
            OSError: there is no such file, or nothing in it.
        """


class ImageFiles(Source):
    """Files, by paths that are absolute or relative to a folder."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self._root = os.fspath(root)
        # In one block, which is small when pickled. As bytes: not all names of files are text.
        self._paths = pa.array(map(os.fsencode, paths), pa.large_binary())

    def __len__(self) -> int:
        return len(self._paths)

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the paths as they were given."""
        return [os.fsdecode(path) for path in self._paths.take(pa.array(rows)).to_pylist()]

    def open(self, row: int) -> tuple[str | io.BytesIO, int]:
        """Return the file of an image, by its path or opened, and how many bytes it has."""
        path = os.fsdecode(self._paths[row].as_py())
        if not path:
            raise OSError("no path")
        return _file(os.path.join(self._root, path))

    def absolute(self, rows: np.ndarray) -> list[str]:
        """Return the absolute paths of images."""
        root = os.path.abspath(self._root)
        return [os.path.normpath(os.path.join(root, name)) for name in self.names(rows)]


class ArrowImages(Source):
    """Rows of Arrow stream files, as ``datasets`` saves them; mapped, not read, into memory.

    Args:
        files: In order.
        column: Holds images: their bytes, or a struct of ``bytes`` and ``path``.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self._files, self._column = tuple(files), column

    @cached_property
    def _images(self) -> pa.ChunkedArray:
        return map_arrow_files(self._files).column(self._column)

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_column": self._column}

    def __len__(self) -> int:
        return len(self._images)

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the paths that the rows name, or the rows' numbers."""
        return _names(_paths(self._images, rows), rows)

    def open(self, row: int) -> tuple[str | io.BytesIO, int]:
        """Return the file of an image, by its path or opened, and how many bytes it has."""
        image = self._images[row]
        content, path = (image, None) if is_binary(image.type) else (image["bytes"], image["path"])
        if content.is_valid:
            return _content(memoryview(content.as_buffer()))
        return _file_of(path.as_py() if path is not None else None, self._files[0].parent)


class PackedImages(Source):
    """Images whose bytes lie one after the other in a temporary file, which ends with this process.

    Parquet can only be read in blocks of many images, which is of no use where they are read in random order.

    Args:
        images: Batches of images: their bytes, or structs of ``bytes`` and ``path``.
        folder: What paths are relative to.
    """

    def __init__(self, images: Iterable[pa.Array], folder: Path) -> None:
        self._folder = os.fspath(folder)
        # Without a name nothing of it stays behind, however this process ends. Others open it by /proc.
        has_proc = os.path.isdir("/proc/self/fd")
        make = tempfile.TemporaryFile if has_proc else tempfile.NamedTemporaryFile
        self._file: Any = make()
        number = self._file.fileno()
        self._path = f"/proc/{os.getpid()}/fd/{number}" if has_proc else self._file.name
        try:
            paths, lengths = self._copy(images)
        except OSError as error:
            raise OSError(
                f"images of Parquet cannot be copied to {tempfile.gettempdir()} "
                f"(TMPDIR names another folder): {error.strerror or error}"
            ) from error
        self._paths = pa.array(paths, pa.large_string())
        self._lengths = np.array(lengths, np.int64)
        self._starts = np.cumsum(self._lengths.clip(0)) - self._lengths.clip(0)

    def _copy(self, images: Iterable[pa.Array]) -> tuple[list[str | None], list[int]]:
        paths: list[str | None] = []
        lengths: list[int] = []
        for batch in images:
            paths += _paths(batch, np.arange(len(batch)))
            for content in batch if is_binary(batch.type) else batch.field("bytes"):
                if content.is_valid:
                    self._file.write(memoryview(content.as_buffer()))
                lengths.append(len(content.as_buffer()) if content.is_valid else NO_BYTES)
        self._file.flush()
        return paths, lengths

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_file", "_descriptor")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __len__(self) -> int:
        return len(self._paths)

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the paths that the rows name, or the rows' numbers."""
        return _names(self._paths.take(pa.array(rows)).to_pylist(), rows)

    def open(self, row: int) -> tuple[str | io.BytesIO, int]:
        """Return the file of an image, by its path or opened, and how many bytes it has."""
        length = int(self._lengths[row])
        if length == NO_BYTES:
            return _file_of(self._paths[row].as_py(), self._folder)
        return _content(os.pread(self._descriptor, length, int(self._starts[row])))

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self._path, os.O_RDONLY)


def map_arrow_files(files: Sequence[Path]) -> pa.Table:
    """Return the rows of Arrow stream files, mapped into memory.

    Raises:
        OSError: a file cannot be opened.
        ValueError: it is no such file (pyarrow.ArrowInvalid), or they have different columns.
    """
    return pa.concat_tables(
        pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files
    )


def is_binary(kind: pa.DataType) -> bool:
    """Whether this is the type of a column of bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _paths(images: pa.Array | pa.ChunkedArray, rows: np.ndarray) -> list[str | None]:
    """Return the paths that rows name beside the bytes, or instead of them."""
    if is_binary(images.type):
        return [None] * len(rows)
    chunks = images.chunks if isinstance(images, pa.ChunkedArray) else [images]
    paths = pa.chunked_array([chunk.field("path") for chunk in chunks], pa.string())
    return paths.take(pa.array(rows)).to_pylist()


def _names(paths: list[str | None], rows: np.ndarray) -> list[str]:
    named = zip(rows.tolist(), paths, strict=True)
    return [f"row {row}" if path is None else path for row, path in named]


def _file_of(path: str | None, folder: str | Path) -> tuple[str, int]:
    if path is None:
        raise OSError("neither bytes nor a path")
    return _file(os.path.join(folder, path))


def _file(path: str) -> tuple[str, int]:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")  # opening a named pipe would wait for a writer
    if status.st_size == 0:
        raise OSError("the file is empty")
    return path, status.st_size


def _content(content: bytes | memoryview) -> tuple[io.BytesIO, int]:
    if len(content) == 0:
        raise OSError("the image is empty")
    return io.BytesIO(content), len(content)
