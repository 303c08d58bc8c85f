"""Resizing and normalizing in Triton: a batch of images of any sizes in two launches, one per pass.

Integer arithmetic, hence the same bits on every device. Tables drive both launches: a row per image says
where it lies and how it is resampled, a row per program which tile of which image it makes. The kernels are in
``resize_normalize_tiles``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import resize_normalize_tiles as kernels
from .launch import Launch

ROWS, INNER = 8, 256
"""The shape of a tile."""
WARPS = 8

FIELDS = (
    "address", "row_stride", "pixel_stride", "channel_stride", "starts", "weights", "taps", "is_height",
    "rows", "columns", "place", "left",
)  # fmt: skip
"""The fields of a table's row for an image. ``rows`` and ``columns`` are the size of the pass's result. For the
first pass ``place`` is the offset of that in the buffer; for the second it is its first row, and ``left`` its
first column, in the window."""


class Axis(NamedTuple):
    """How one axis of an image is resampled, and where its numbers are in the tables.

    Attributes:
        count: The number of outputs.
        taps: The number of inputs of each output.
        starts, weights: The offsets of its ``count`` starts, and of its weights (taps, count).
        first_input, end: The range of the inputs that are read.
        is_unchanged: Whether the axis keeps its size: the outputs are the inputs from ``first_input`` on.
    """

    count: int
    taps: int
    starts: int
    weights: int
    first_input: int
    end: int
    is_unchanged: bool


class Picture(NamedTuple):
    """An image, and how its resized version is placed in the window.

    Attributes:
        image: (H, W, C), uint8, any strides.
        height, width: Its axes; None if no pixel of it is in the window.
        top, left: Where it begins in the window.
        height_first: Whether the height is resampled first.
    """

    image: Tensor
    height: Axis | None
    width: Axis | None
    top: int
    left: int
    height_first: bool


class Tables(NamedTuple):
    """The tables of both launches, on the host: (images, FIELDS) int64, and (programs, 3) int32.

    Where ``is_buffered``, the second pass reads an image from the buffer between the passes, and its address is
    an offset in that buffer.
    """

    first_segments: Tensor
    first_programs: Tensor
    second_segments: Tensor
    second_programs: Tensor
    is_buffered: Tensor
    buffer_size: int


def tables_for(pictures: Sequence[Picture], window: tuple[int, int]) -> Tables:
    """Return the tables for a batch whose results are windows of this (height, width)."""
    channels = pictures[0].image.shape[2]
    first, second, buffered = [], [], []
    # By taps: the last programs to finish should be short ones.
    first_programs: list[tuple[int, Tensor]] = []
    second_programs: list[tuple[int, Tensor]] = []
    window_programs = _programs(window[0], window[1] * channels)
    size = 0
    for number, picture in enumerate(pictures):
        nothing = [0] * len(FIELDS)
        numbered = _numbered(number, window_programs)
        if picture.height is None or picture.width is None:
            first.append(nothing)
            second.append(nothing)
            buffered.append(False)
            second_programs.append((0, numbered))
            continue
        a, b = _passes(picture, size)
        second.append(b)
        second_programs.append((b[6], numbered))
        buffered.append(a is not None)
        first.append(a or nothing)
        if a is not None:
            rows, columns = a[8:10]
            tiles = _programs(rows, columns * channels)
            first_programs.append((a[6], _numbered(number, tiles)))
            size += rows * columns * channels
    return Tables(
        torch.tensor(first, dtype=torch.int64),
        _longest_first(first_programs),
        torch.tensor(second, dtype=torch.int64),
        _longest_first(second_programs),
        torch.tensor(buffered),
        size,
    )


def _longest_first(programs: list[tuple[int, Tensor]]) -> Tensor:
    if not programs:
        return torch.empty((0, 3), dtype=torch.int32)
    return torch.cat([tiles for _, tiles in sorted(programs, key=lambda pair: -pair[0])])


def _passes(picture: Picture, place: int) -> tuple[list[int] | None, list[int]]:
    """Return an image's rows of the two tables; the first is None if that axis needs no pass."""
    image, height, width, top, left, height_first = picture
    assert height is not None
    assert width is not None
    row_stride, pixel_stride, channel_stride = image.stride()
    channels = image.shape[2]
    a, b = (height, width) if height_first else (width, height)
    stride_a, stride_b = (row_stride, pixel_stride) if height_first else (pixel_stride, row_stride)
    window = [height.count, width.count, top, left]
    coefficients_b = [b.starts, b.weights, b.taps, int(not height_first)]
    if a.is_unchanged:
        address = image.data_ptr() + a.first_input * stride_a
        strides = [row_stride, pixel_stride, channel_stride]
        return None, [address, *strides, *coefficients_b, *window]
    # Of the other axis, only what the second pass will read.
    span = b.end - b.first_input
    rows, columns = (a.count, span) if height_first else (span, a.count)
    address = image.data_ptr() + b.first_input * stride_b
    first = [
        address, row_stride, pixel_stride, channel_stride,
        a.starts, a.weights, a.taps, int(height_first), rows, columns, place, 0,
    ]  # fmt: skip
    strides = [columns * channels, channels, 1]
    # The second pass counts its inputs from the image's first, not from the first that is there.
    address = place - b.first_input * (channels if height_first else columns * channels)
    return first, [address, *strides, *coefficients_b, *window]


@lru_cache(maxsize=512)
def _programs(rows: int, inner: int) -> Tensor:
    """Return the first row and inner index of each tile: (programs, 2), not to be written to."""
    return torch.cartesian_prod(
        torch.arange(0, rows, ROWS, dtype=torch.int32),
        torch.arange(0, inner, INNER, dtype=torch.int32),
    )


def _numbered(number: int, programs: Tensor) -> Tensor:
    return torch.nn.functional.pad(programs, (1, 0), value=number)


def first_pass_launch(
    programs: Tensor,
    segments: Tensor,
    starts: Tensor,
    weights: Tensor,
    *,
    intermediate: Tensor,
    channels: int,
    reads: int = 0,
) -> Launch:
    """Return the launch that resamples each image along its first axis.

    Args:
        programs, segments: The first tables of a :class:`Tables`, on the device.
        starts, weights: int32, of all axes.
        intermediate: The buffer between the passes, uint8.
        channels: Of every image.
        reads: Bytes of the images that are read.
    """
    return Launch(
        kernels.first_pass_kernel,
        programs.shape[0],
        {
            "programs": programs, "segments": segments, "starts": starts, "weights": weights,
            "intermediate": intermediate,
        },
        {"FIELDS": len(FIELDS), "CHANNELS": channels, "ROWS": ROWS, "INNER": INNER},
        WARPS,
        reads + programs.nbytes + segments.nbytes + starts.nbytes + weights.nbytes,
        intermediate.nbytes,
    )  # fmt: skip


def second_pass_launch(
    programs: Tensor,
    segments: Tensor,
    starts: Tensor,
    weights: Tensor,
    values: Tensor,
    *,
    intermediate: Tensor,
    result: Tensor,
    channels_last: bool,
) -> Launch:
    """Return the launch that resamples each image along its second axis and fills the result.

    Args:
        programs, segments: The second tables of a :class:`Tables`, on the device.
        starts, weights: int32, of all axes.
        values: (256, C): the value of each byte, in the dtype of the result.
        intermediate: The buffer between the passes, uint8.
        result: (N, C, height, width).
        channels_last: Its layout.
    """
    channels, height, width = result.shape[1:]
    return Launch(
        kernels.second_pass_kernel,
        programs.shape[0],
        {
            "programs": programs, "segments": segments, "starts": starts, "weights": weights,
            "like": intermediate, "values": values, "result": result, "height": height, "width": width,
        },
        {
            "FIELDS": len(FIELDS), "CHANNELS": channels, "CHANNELS_LAST": channels_last,
            "ROWS": ROWS, "INNER": INNER,
        },
        WARPS,
        intermediate.nbytes + programs.nbytes + segments.nbytes + starts.nbytes + weights.nbytes
        + values.nbytes,
        result.nbytes,
    )  # fmt: skip
