"""resize_normalize: the kernels of its two passes, each over a whole batch of images of any sizes.

A pass resamples one axis: each output is the sum of ``taps`` adjacent inputs times integer weights, rounded to
a byte as Pillow rounds it. The first pass writes bytes, the second the values that bytes stand for. Tables hold
the address of each image and how it is resampled, and which tile of which image each program computes.
A tile is [ROWS, INNER]; columns and channels both go along INNER.
"""

import triton
import triton.language as tl

PRECISION_BITS = tl.constexpr(22)
"""Fractional bits of a weight."""

HALF = tl.constexpr(1 << 21)
"""Half a level, for rounding."""


@triton.jit
def _tile(programs, segments, FIELDS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr):
    """Return the image's number, its row of the table, and the rows and the inner indices of the tile."""
    program = programs + tl.program_id(0) * 3
    image = tl.load(program)
    row = tl.load(program + 1) + tl.arange(0, ROWS)
    inner = tl.load(program + 2) + tl.arange(0, INNER)
    return image, segments + image * FIELDS, row, inner


@triton.jit
def _sum_of_taps(source, step, weight, count, taps, inside, exists):
    """Return the sum of pixels ``step`` bytes apart, weighted and rounded to bytes.

    The weights of ``count`` outputs stand side by side, tap after tap.
    """
    total = tl.zeros(inside.shape, tl.int32) + HALF
    for tap in range(0, taps):
        pixel = tl.load(source + tap * step, inside, other=0).to(tl.int32)
        total += pixel * tl.load(weight + tap * count, exists, other=0)
    return tl.minimum(tl.maximum(total >> PRECISION_BITS, 0), 255)


@triton.jit
def _along_height(
    source, row_stride, pixel_stride, starts, weights, rows, taps, row, column, has_row, inside
):
    start = tl.load(starts + row, has_row, other=0)
    pixel = source + ((start * row_stride)[:, None] + (column * pixel_stride)[None, :])
    weight = (weights + row)[:, None]
    return _sum_of_taps(pixel, row_stride, weight, rows, taps, inside, has_row[:, None])


@triton.jit
def _along_width(
    source,
    row_stride,
    pixel_stride,
    starts,
    weights,
    columns,
    taps,
    row,
    column,
    has_column,
    inside,
):
    start = tl.load(starts + column, has_column, other=0)
    pixel = source + ((row * row_stride)[:, None] + (start * pixel_stride)[None, :])
    weight = (weights + column)[None, :]
    return _sum_of_taps(pixel, pixel_stride, weight, columns, taps, inside, has_column[None, :])


@triton.jit
def _resampled(segment, starts, weights, like, row, column, channel):
    """Return a tile of the result of an image's pass, and which elements of it exist.

    ``row`` [ROWS] and ``column`` [INNER] count from the result's first.
    """
    row_stride = tl.load(segment + 1)
    pixel_stride = tl.load(segment + 2)
    source = tl.load(segment).to(like.dtype) + (channel * tl.load(segment + 3))[None, :]
    starts += tl.load(segment + 4)
    weights += tl.load(segment + 5)
    taps = tl.load(segment + 6).to(tl.int32)
    rows = tl.load(segment + 8)
    columns = tl.load(segment + 9)
    has_row = (row >= 0) & (row < rows)
    has_column = (column >= 0) & (column < columns)
    inside = has_row[:, None] & has_column[None, :]
    if tl.load(segment + 7) != 0:
        byte = _along_height(
            source,
            row_stride,
            pixel_stride,
            starts,
            weights,
            rows,
            taps,
            row,
            column,
            has_row,
            inside,
        )
    else:
        byte = _along_width(
            source,
            row_stride,
            pixel_stride,
            starts,
            weights,
            columns,
            taps,
            row,
            column,
            has_column,
            inside,
        )
    return byte, inside


@triton.jit
def first_pass_kernel(
    programs,
    segments,
    starts,
    weights,
    intermediate,
    FIELDS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Resample each image along its first axis into ``intermediate``, as (rows, columns, channels)."""
    _, segment, row, inner = _tile(programs, segments, FIELDS, ROWS, INNER)
    byte, inside = _resampled(
        segment, starts, weights, intermediate, row, inner // CHANNELS, inner % CHANNELS
    )
    length = tl.load(segment + 9) * CHANNELS
    target = tl.load(segment + 10) + (row * length)[:, None] + inner[None, :]
    tl.store(intermediate + target, byte.to(tl.uint8), inside)


@triton.jit
def second_pass_kernel(
    programs,
    segments,
    starts,
    weights,
    like,
    values,
    result,
    height,
    width,
    FIELDS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Resample each image along its second axis, and look up the values of its bytes.

    Outside of the image the byte is 0. ``values`` is (256, CHANNELS), ``result`` a batch of windows.
    """
    image, segment, y, inner = _tile(programs, segments, FIELDS, ROWS, INNER)
    if CHANNELS_LAST:
        x, channel = inner // CHANNELS, inner % CHANNELS
        offset = (y.to(tl.int64) * width * CHANNELS)[:, None] + inner[None, :]
    else:
        x, channel = inner % width, inner // width
        plane = channel.to(tl.int64) * height * width
        offset = (y.to(tl.int64) * width)[:, None] + (plane + x)[None, :]
    row = y - tl.load(segment + 10)
    # The last tile of a window (C, H, W) ends in channels that do not exist.
    column = tl.where(channel < CHANNELS, x - tl.load(segment + 11), -1)
    byte, inside = _resampled(segment, starts, weights, like, row, column, channel)
    exists = (y < height)[:, None] & (inner < width * CHANNELS)[None, :]
    value = tl.load(values + tl.where(inside, byte, 0) * CHANNELS + channel[None, :], exists)
    start = image.to(tl.int64) * height * width * CHANNELS
    tl.store(result + start + offset, value, exists)
