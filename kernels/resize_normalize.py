"""Resizing and normalizing in Triton: a batch of images of any sizes in two launches, one per pass.

Integer arithmetic, hence the same bits on every device. Tables drive both launches: a row per image says
where it lies and how it is resampled, a row per program which tile of which image it makes. The kernels are in
``resize_normalize_tiles``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""The fields of a pass over an image: where its first pixel is that counts, and the strides in bytes; where
the filter's starts and weights begin among those of all lines, how many inputs an output has, and whether they
lie along the height; and the result. ``rows`` and ``columns`` are its size. For the first pass ``place`` is its
offset in the buffer; for the second it is its first row, and ``left`` its first column, in the window. Zeros
stand for a pass that an image does not need, since no pixel of it is in the window, or the axis that comes
first keeps its size.
``csrc/resize_plan.h`` has the same fields."""


class Tables(NamedTuple):
    """What drives one pass: ``segments``, (images, FIELDS) int64, and ``programs``, (programs, 3) int32.

    A row of ``segments`` is the pass over one image; :data:`FIELDS` says what its numbers are. A row of
    ``programs`` is a tile of its result: the number of the image, the first row, and the first inner index.
    Images with many taps come first.
    """

    segments: Tensor
    programs: Tensor


def tables_of(packed: Tensor, places: Sequence[int]) -> tuple[Tables, Tables]:
    """Return the tables of both passes.

    Args:
        packed: Bytes that hold them one after the other.
        places: Where these begin: the first pass's segments and programs, and those of the second; then how
            many programs either has.
    """
    first_segments, first_programs, second_segments, second_programs, first, second = places
    numbers, words = packed.view(torch.int64), packed.view(torch.int32)
    images = (first_programs - first_segments) // (8 * len(FIELDS))

    def segments(start: int) -> Tensor:
        return numbers.as_strided((images, len(FIELDS)), (len(FIELDS), 1), start // 8)

    def programs(start: int, count: int) -> Tensor:
        return words.as_strided((count, 3), (3, 1), start // 4)

    return (
        Tables(segments(first_segments), programs(first_programs, first)),
        Tables(segments(second_segments), programs(second_programs, second)),
    )


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
        programs, segments: The :class:`Tables` of the first pass, on the device.
        starts, weights: int32, of all lines; both may be one tensor.
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
        programs, segments: The :class:`Tables` of the second pass, on the device.
        starts, weights: int32, of all lines; both may be one tensor.
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
