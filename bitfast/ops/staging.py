"""Copies a batch of images of any sizes from the host's memory to a GPU, in one asynchronous copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
"""Each image in the packed batch begins at a multiple of so many bytes."""

MOST_WASTE = 4 / 3
"""Ratio of the bytes copied to the bytes needed, at most: that of RGB pixels of four bytes each."""


class Place(NamedTuple):
    """Where an image lies in the packed batch, and how."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element."""
        return self.span * self.dtype.itemsize

    def view(self, packed: Tensor) -> Tensor:
        """Return the image in a packed batch, on whatever device that is."""
        elements = packed[self.start : self.start + self.nbytes].view(self.dtype)
        return elements.as_strided(self.shape, self.strides)


def upload(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return images on a device; those that are there already, as they are.

    Images that go from the CPU to a GPU are packed into pinned memory and copied at once, on the current stream
    of the device. The host does not wait: torch's allocator keeps pinned memory until the copy is done.

    Args:
        images: Of any shapes, strides and dtypes.
        device: Where to.
    """
    on_host = [i for i, image in enumerate(images) if image.device.type == "cpu"]
    if device.type != "cuda" or not on_host:
        return [image.to(device) for image in images]
    dense = [dense_enough(images[i]) for i in on_host]
    places = places_of(dense)
    packed = torch.empty(packed_size(places), dtype=torch.uint8, pin_memory=True)
    pack(dense, places, packed)
    with torch.cuda.device(device):
        there = packed.to(device, non_blocking=True)
    result = [image if image.device.type == "cpu" else image.to(device) for image in images]
    for i, place in zip(on_host, places, strict=True):
        result[i] = place.view(there)
    return result


def dense_enough(image: Tensor) -> Tensor:
    """Return the image, or a contiguous copy if its memory has too many gaps to be copied as it is."""
    span = Place(0, tuple(image.shape), image.stride(), image.dtype).span
    needed = image.numel()
    # The span is shorter than the number of elements if some share memory.
    return image if needed <= span <= MOST_WASTE * needed else image.contiguous()


def places_of(images: Sequence[Tensor]) -> list[Place]:
    """Return where each of the images goes."""
    places = []
    start = 0
    for image in images:
        place = Place(start, tuple(image.shape), image.stride(), image.dtype)
        places.append(place)
        start += -(-place.nbytes // ALIGNMENT) * ALIGNMENT
    return places


def packed_size(places: Sequence[Place]) -> int:
    """Return the bytes of a packed batch."""
    return places[-1].start + places[-1].nbytes


def pack(images: Sequence[Tensor], places: Sequence[Place], packed: Tensor) -> None:
    """Copy images to their places."""
    for image, place in zip(images, places, strict=True):
        elements = image.as_strided((place.span,), (1,))
        packed[place.start : place.start + place.nbytes].view(place.dtype).copy_(elements)
