"""Google's own BiT files, ``BiT-{S,M}-R*.npz``: NumPy arrays under TensorFlow's names.

Kernels are (height, width, inputs, outputs), the head is a 1x1 convolution. All headers of the archive are read
and checked first, so that nothing is allocated for a file that cannot be loaded; pickled objects are never
loaded.

Google's code standardizes weights with an epsilon of 1e-10; bitfast, like transformers and timm, with 1e-8.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from bitfast.checkpoints.architecture import (
    Architecture,
    Scheme,
    Shape,
    as_parameter,
    infer_architecture,
    listed,
)
from bitfast.checkpoints.files import CheckpointError

logger = logging.getLogger("bitfast")

PREFIX = "resnet/"
SUFFIX = ".npy"
FLOATING = ("float16", "float32", "float64")
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Header(NamedTuple):
    """The header of an array in the archive."""

    member: zipfile.ZipInfo
    shape: Shape
    dtype: np.dtype


def _their_name(name: str) -> str:
    """Return the name that Google's files give to a parameter of BitForImageClassification.

    A block's "a", "b" and "c" are its three pairs of norm and convolution.
    """
    module, _, kind = name.rpartition(".")
    affine = {"weight": "gamma", "bias": "beta"}[kind]
    if name.startswith("classifier.1."):
        return f"{PREFIX}head/conv2d/{'kernel' if kind == 'weight' else 'bias'}"
    if module == "bit.embedder.convolution":
        return f"{PREFIX}root_block/standardized_conv2d/kernel"
    if module == "bit.norm":
        return f"{PREFIX}group_norm/{affine}"
    _, _, _, stage, _, layer, part, *_ = module.split(".")
    unit = f"{PREFIX}block{int(stage) + 1}/unit{int(layer) + 1:02d}"
    if part == "downsample":
        return f"{unit}/a/proj/standardized_conv2d/kernel"
    letter = "abc"[int(part[-1]) - 1]
    if part.startswith("norm"):
        return f"{unit}/{letter}/group_norm/{affine}"
    return f"{unit}/{letter}/standardized_conv2d/kernel"


SCHEME = Scheme(
    name="Google's npz",
    layer=re.compile(rf"{PREFIX}block(?P<stage>\d{{1,6}})/unit(?P<layer>\d{{1,6}})/"),
    first=1,
    their_name=_their_name,
)


def read(path: Path) -> tuple[Architecture, dict[str, Tensor]]:
    """Read a file's architecture and tensors.

    Arrays outside of ``resnet/`` are named in a warning and ignored.

    Returns:
        The architecture, and the contiguous tensors by their names in BitForImageClassification, in the
        file's precision.

    Raises:
        CheckpointError: the file is broken, or holds anything but a BiT network.
    """
    with _archive(path) as archive:
        headers = _read_headers(archive, path)
        shapes = {name: _as_ours(header.shape) for name, header in headers.items()}
        architecture = infer_architecture(shapes, SCHEME, str(path))
        return architecture, {
            name: as_parameter(name, _read_tensor(archive, headers[_their_name(name)]))
            for name in architecture.shapes()
        }


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever its content makes zipfile and numpy raise becomes a CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except CheckpointError:
        raise
    # numpy parses headers as Python literals: broken ones fail with almost any type of exception.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is not a readable npz file: {reason}") from error


def _read_headers(archive: zipfile.ZipFile, path: Path) -> dict[str, Header]:
    """Read the headers of the network's arrays, and check those of all."""
    headers: dict[str, Header] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(SUFFIX)
        if name == member.filename or name in headers:
            reason = "is there twice" if name in headers else f"is no {SUFFIX} array"
            raise CheckpointError(f"{path}: {member.filename!r} {reason}")
        headers[name] = _read_header(archive, member, path)
    network = {name: header for name, header in headers.items() if name.startswith(PREFIX)}
    if not network:
        raise CheckpointError(
            f"{path} is no BiT checkpoint of Google's: no name starts with {PREFIX!r}; it has "
            f"{listed(headers)}"
        )
    for name, header in network.items():
        if header.dtype.name not in FLOATING:
            raise CheckpointError(
                f"{path}: {name} is {header.dtype}; expected one of {', '.join(FLOATING)}"
            )
    others = [name for name in headers if name not in network]
    if others:
        logger.warning("%s: not used, as no part of the network: %s", path, listed(others))
    return network


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Header:
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in HEADERS:
            raise CheckpointError(
                f"{path}: {member.filename!r} is of the unknown version {version}"
            )
        shape, _, dtype = HEADERS[version](file)
        size = member.file_size - file.tell()
    if dtype.hasobject:
        raise CheckpointError(
            f"{path}: {member.filename!r} holds Python objects, which are never unpickled"
        )
    # Before numpy allocates what the header claims.
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or claimed != size:
        raise CheckpointError(
            f"{path}: {member.filename!r} claims {claimed} bytes by its shape {shape} and holds {size}"
        )
    return Header(member, shape, dtype)


def _read_tensor(archive: zipfile.ZipFile, header: Header) -> Tensor:
    with archive.open(header.member) as file:
        array = npy.read_array(file, allow_pickle=False)
        _require_end(file)
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    # Torch takes this machine's byte order only.
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _require_end(file: IO[bytes]) -> None:
    """Read to the end of an array, where the archive's checksum is compared."""
    if file.read(1):
        raise ValueError("an array is followed by more bytes")


def _as_ours(shape: Shape) -> Shape:
    """Return a kernel's (height, width, inputs, outputs) in the order of PyTorch."""
    if len(shape) != 4:
        return shape
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width


__all__ = ["SCHEME", "read"]
