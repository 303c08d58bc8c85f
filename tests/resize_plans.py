"""The plan of a batch for the kernels of resize_normalize, worked out in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.kernels import resize_normalize as kernels
from bitfast.ops.resize_filters import FIELDS, Plan

Line = tuple[int, int, int, int]
"""How one axis is resampled: its size before and after, the first output that is wanted, and how many."""


class Filter(NamedTuple):
    """A row of the table of filters, besides the line."""

    starts: int
    weights: int
    taps: int
    first_input: int
    end: int


class Batch(NamedTuple):
    """What is to be planned.

    Attributes:
        images: (H, W, C), uint8, any strides.
        sizes: (height, width) after resizing.
        window: (height, width) of the results.
        offsets: (top, left) of the window in each image.
        first_axes: 0: the height is resampled first; 1: the width.
    """

    images: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]
    window: tuple[int, int]
    offsets: Sequence[tuple[int, int]]
    first_axes: Sequence[int]

    def line(self, i: int, axis: int) -> tuple[Line, int]:
        """Return what is wanted of an image's axis, and where that begins in the window."""
        size, offset = self.sizes[i][axis], self.offsets[i][axis]
        first = min(max(offset, 0), size)
        count = min(max(offset + self.window[axis], first), size) - first
        return (self.images[i].shape[axis], size, first, count), first - offset

    def is_in_window(self, i: int) -> bool:
        return all(self.line(i, axis)[0][3] > 0 for axis in (0, 1))

    def lines(self) -> set[Line]:
        """Return the lines whose filters are needed."""
        pictures = [i for i in range(len(self.images)) if self.is_in_window(i)]
        return {self.line(i, axis)[0] for i in pictures for axis in (0, 1)}


def plan_with(
    filters: Tensor,
    images: Sequence[Tensor],
    sizes: Sequence[int],
    window: Sequence[int],
    offsets: Sequence[int] | None = None,
    first_axes: Sequence[int] | None = None,
    layout: str = "HWC",
) -> Plan:
    """Call the operator that plans."""
    offsets = [0] * len(sizes) if offsets is None else offsets
    first_axes = [1] * len(images) if first_axes is None else first_axes
    tile = (kernels.ROWS, kernels.INNER)
    return Plan(
        *torch.ops.bitfast.resize_plan.native(
            images, sizes, window, offsets, first_axes, layout == "CHW", filters, tile, False
        )
    )


def known_filters(table: Tensor) -> dict[Line, Filter]:
    """Return the rows of a table of filters by line."""
    assert table.shape[1] == len(FIELDS)
    return {(a, b, c, d): Filter(*rest) for a, b, c, d, *rest in table.tolist()}


class Tables(NamedTuple):
    """The rows of all tables, and the bytes of the buffer between the passes."""

    first_segments: list[list[int]]
    first_programs: list[list[int]]
    second_segments: list[list[int]]
    second_programs: list[list[int]]
    buffer_size: int


def expected_tables(batch: Batch, filters: dict[Line, Filter], buffer: int) -> Tables:
    """Return the tables of a batch; ``buffer`` is the address of the buffer between the passes."""
    channels = batch.images[0].shape[2]
    nothing = [0] * len(kernels.FIELDS)
    window = (batch.window[0], batch.window[1] * channels)
    first, second = [], []
    first_programs, second_programs = [], []  # with the number of taps
    size = 0
    for i in range(len(batch.images)):
        if not batch.is_in_window(i):
            first.append(nothing)
            second.append(nothing)
            second_programs.append((0, _programs(i, *window)))
            continue
        a, b = _passes(batch, i, filters, buffer, size)
        second.append(b)
        second_programs.append((b[6], _programs(i, *window)))
        first.append(a or nothing)
        if a is not None:
            rows, columns = a[8:10]
            first_programs.append((a[6], _programs(i, rows, columns * channels)))
            size += rows * columns * channels
    return Tables(
        first, _longest_first(first_programs), second, _longest_first(second_programs), size
    )


def _programs(number: int, rows: int, inner: int) -> list[list[int]]:
    return [
        [number, row, column]
        for row in range(0, rows, kernels.ROWS)
        for column in range(0, inner, kernels.INNER)
    ]


def _longest_first(programs: list[tuple[int, list[list[int]]]]) -> list[list[int]]:
    ordered = sorted(programs, key=lambda pair: -pair[0])
    return [program for _, tiles in ordered for program in tiles]


def _passes(
    batch: Batch, i: int, filters: dict[Line, Filter], buffer: int, place: int
) -> tuple[list[int] | None, list[int]]:
    """Return an image's rows of the two tables; the first is None if that axis needs no pass."""
    image, height_first = batch.images[i], batch.first_axes[i] == 0
    (rows, top), (columns, left) = (batch.line(i, axis) for axis in (0, 1))
    height, width = filters[rows], filters[columns]
    strides, channels = list(image.stride()), image.shape[2]
    line_a, a, b = (rows, height, width) if height_first else (columns, width, height)
    stride_a, stride_b = strides[:2] if height_first else strides[1::-1]
    result = [rows[3], columns[3], top, left]
    coefficients_b = [b.starts, b.weights, b.taps, int(not height_first)]
    if line_a[0] == line_a[1]:
        address = image.data_ptr() + a.first_input * stride_a
        return None, [address, *strides, *coefficients_b, *result]
    span = b.end - b.first_input
    shape = (line_a[3], span) if height_first else (span, line_a[3])
    coefficients_a = [a.starts, a.weights, a.taps, int(height_first)]
    address = image.data_ptr() + b.first_input * stride_b
    first = [address, *strides, *coefficients_a, *shape, place, 0]
    step = channels if height_first else shape[1] * channels
    address = buffer + place - b.first_input * step
    return first, [address, shape[1] * channels, channels, 1, *coefficients_b, *result]
