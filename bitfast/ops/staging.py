"""Sends a batch of images of any sizes from the host's memory to a GPU: packed by threads, piece after piece.

While one piece is copied, the next one is packed. Pieces lie in pinned memory, since only from there a GPU
copies by itself, and are given back as soon as their copy is under way: torch's allocator of pinned memory
lends them out again when it is done, so that a batch of any size passes through a few pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast import extension
from bitfast.ops.eager import is_unwatched

ALIGNMENT = 16
"""Each image in the packed batch begins at a multiple of so many bytes."""

SMALLEST_PIECE, LARGEST_PIECE = 2**21, 2**24
"""Bytes that are packed, and then copied, at a time. A piece costs the host some 50 microseconds."""

PIECES = 8
"""Of a batch that is neither small nor large: neither packing the first nor copying the last overlaps."""


class Batch(NamedTuple):
    """Images on the host, and how they are packed: dense, each with its axes in the order that they have there.

    Attributes:
        images: On the CPU, of any shapes, strides and dtypes.
        starts: The byte at which each begins.
        strides: Its strides there, in elements.
        nbytes: Of all together.
    """

    images: list[Tensor]
    starts: list[int]
    strides: list[list[int]]
    nbytes: int

    def pieces(self, size: int, pin_memory: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield the packed bytes ``size`` at a time, each time in memory of its own, and where they begin.

        ``pin_memory`` says whether that memory is pinned, which it can be only where there is a GPU.
        """
        for first in range(0, self.nbytes, size):
            end = min(first + size, self.nbytes)
            piece = torch.empty(end - first, dtype=torch.uint8, device="cpu", pin_memory=pin_memory)
            # From the last image that begins at or before it.
            wanted = slice(
                max(bisect_right(self.starts, first) - 1, 0), bisect_left(self.starts, end)
            )
            torch.ops.bitfast.pack_images.native(
                self.images[wanted], self.starts[wanted], first, piece
            )
            yield first, piece

    def views(self, packed: Tensor) -> list[Tensor]:
        """Return the images in the packed batch, on whatever device that is."""
        by_dtype: dict[torch.dtype, Tensor] = {torch.uint8: packed}
        result = []
        for image, start, strides in zip(self.images, self.starts, self.strides, strict=True):
            dtype = image.dtype
            if dtype not in by_dtype:
                by_dtype[dtype] = packed.view(dtype)
            place = start // dtype.itemsize
            result.append(by_dtype[dtype].as_strided(image.shape, strides, place))
        return result


def pack(images: list[Tensor]) -> Batch:
    """Return how images on the CPU are packed."""
    *places, nbytes = torch.ops.bitfast.packed_places.native(images, ALIGNMENT)
    starts, strides, at = [], [], 0
    for image in images:
        starts.append(places[at])
        end = at + 1 + image.dim()
        strides.append(places[at + 1 : end])
        at = end
    return Batch(images, starts, strides, nbytes)


def piece_size(nbytes: int) -> int:
    """Return the size of the pieces of a batch: a power of two, as torch's allocator rounds pinned memory."""
    wanted = max(nbytes // PIECES, 1)
    return min(max(1 << (wanted.bit_length() - 1), SMALLEST_PIECE), LARGEST_PIECE)


def send(batch: Batch, device: torch.device, piece: int | None = None) -> Tensor:
    """Return the packed batch on a device: bytes, of which the last may be more than there are.

    To a GPU the copies are asynchronous, on its current stream.

    Args:
        batch: The images.
        device: Where to.
        piece: Bytes at a time; None: :func:`piece_size`.
    """
    piece = piece_size(batch.nbytes) if piece is None else piece
    # So that the memory can be seen in any dtype.
    there = torch.empty(-(-batch.nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8, device=device)
    for first, packed in batch.pieces(piece, pin_memory=device.type == "cuda"):
        there[first : first + packed.numel()].copy_(packed, non_blocking=True)
    return there


def upload(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return images on a device; those that are there already, as they are.

    Images that go from the CPU to a GPU are packed, and copied on the current stream of the device. The host
    does not wait for the copies.

    Args:
        images: Of any shapes, strides and dtypes.
        device: Where to.
    """
    packed: list[int] = []
    if device.type == "cuda" and extension.CPU.problem is None and is_unwatched():
        packed = [i for i, image in enumerate(images) if _is_plain_memory(image)]
    if not packed:
        return [image.to(device) for image in images]
    batch = pack([images[i] for i in packed])
    views = dict(zip(packed, batch.views(send(batch, device)), strict=True))
    return [views[i] if i in views else image.to(device) for i, image in enumerate(images)]


def _is_plain_memory(image: Tensor) -> bool:
    """Whether an image is what its memory on the host holds, and autograd need not know of a copy."""
    return image.is_cpu and (
        image.dtype == torch.uint8
        or not (
            image.requires_grad
            or image.is_neg()
            or image.is_conj()
            or image.layout != torch.strided
        )
    )
