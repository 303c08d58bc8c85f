"""The memory of PIL images as arrays, without a copy.

Pillow hands its memory out by the Arrow C data interface
(https://arrow.apache.org/docs/format/CDataInterface.html), from version 11.3 on. Before 13.0 it crashes the
process if the memory is not its own: a mapped file, a numpy array ("L" only), another library's Arrow array.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import PIL
from PIL import Image

EXPORTS_ANY_MEMORY = int(PIL.__version__.split(".")[0]) >= 13
"""Whether this Pillow can export memory that is not its own without crashing."""

BYTES_PER_PIXEL = {"RGB": 4, "L": 1}
"""The modes that are read in place. The last of the four bytes of an RGB pixel is unused."""


class _ArrowArray(ctypes.Structure):
    """The first fields of Arrow's structure ``ArrowArray``."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


_address_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
"""Returns the address in a capsule, given the capsule and its name."""


class _Memory:
    """Presents an image's memory to numpy, and keeps it alive as long as an array refers to it."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], owner: Any):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": shape,
            "strides": strides,
            # torch warns of memory that must not be written to. Nothing here writes to an image.
            "data": (address, False),
        }


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return the pixels of a PIL image, in place where that is possible; not to be written to.

    Returns:
        (H, W, C) or (H, W), as ``numpy.asarray(image)``. In place are images of the modes "RGB" and (from
        Pillow 13 on) "L" that lie in one block of memory, as those of up to 16 MiB do.

    Raises:
        OSError: the image cannot be decoded; whatever else Pillow's decoders raise.
    """
    image.load()
    memory = _memory_of(image)
    return np.asarray(image if memory is None else memory)


def _memory_of(image: Image.Image) -> _Memory | None:
    depth = BYTES_PER_PIXEL.get(image.mode)
    export = getattr(image, "__arrow_c_array__", None)
    # Rows that Pillow was told to align would have gaps between them, of which Arrow knows nothing.
    if depth is None or export is None or Image.core.get_alignment() != 1:
        return None
    # Only in mode RGB is the memory certainly Pillow's own: no file or array is mapped in this mode.
    if not EXPORTS_ANY_MEMORY and (image.mode != "RGB" or image.readonly):
        return None
    try:
        _, array = export()
    except (ValueError, NotImplementedError):  # several blocks, or somebody else's subclass
        return None
    head = _ArrowArray.from_address(_address_in(array, b"arrow_array"))
    pixels = head.children[0].contents if head.n_children == 1 else head
    size = image.width * image.height * depth
    if pixels.length != size or pixels.offset != 0 or pixels.n_buffers != 2:
        return None
    address = pixels.buffers[1]
    if not address:
        return None
    shape: tuple[int, ...] = (image.height, image.width)
    strides: tuple[int, ...] = (image.width * depth, depth)
    if image.mode == "RGB":
        shape, strides = (*shape, 3), (*strides, 1)
    return _Memory(address, shape, strides, array)
