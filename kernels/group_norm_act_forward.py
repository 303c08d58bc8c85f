"""group_norm_act, forward: statistics, normalization and activation, with or without a residual sum."""

import triton
import triton.language as tl

from .arithmetic import reciprocal_std
from .group_norm_act_tiles import (
    activate,
    as_float32,
    channels,
    load_tile,
    mask,
    offset_of_pixel,
    offsets,
    part_size,
    partials,
    per_channel,
    scale_and_shift,
    split_of_program,
    sum_groups,
)


@triton.jit
def _load_sum(
    x,
    residual,
    total,
    first,
    stop,
    offset,
    exists,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Load a tile; with a residual, add it, keep the sum and return it as it was rounded.

    The sum may take the place of x or of the residual: no two threads load the same element, since a chunk has
    at least as many as the program has threads.
    """
    tile = load_tile(
        x, first, stop, offset, exists, C, CHANNELS_LAST, IS_WHOLE, CHUNKS, BLOCK_P
    )  # fmt: skip
    if HAS_RESIDUAL:
        other = load_tile(
            residual, first, stop, offset, exists, C, CHANNELS_LAST, IS_WHOLE, CHUNKS, BLOCK_P
        )  # fmt: skip
        added = ()
        for i in tl.static_range(CHUNKS):
            pixel = first + i * BLOCK_P
            inside = mask(pixel, stop, exists, IS_WHOLE and i < CHUNKS - 1, BLOCK_P)
            value = (tile[i].to(tl.float32) + other[i].to(tl.float32)).to(tile[i].dtype)
            tl.store(total + offset_of_pixel(pixel, C, CHANNELS_LAST) + offset, value, inside)
            added = added + (value,)  # noqa: RUF005 (Triton unpacks no tuples)
        return added
    else:
        return tile


@triton.jit
def _tile_moments(
    tile,
    first,
    stop,
    exists,
    count,
    zero,
    PACKED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the mean, and the sum of squares around it, of each group of one tile: [BLOCK_G].

    Chunks are added up element by element first: few sums are taken across threads.
    """
    total = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    for i in tl.static_range(CHUNKS):
        total += tile[i].to(tl.float32)
    mean = sum_groups(tl.sum(total, axis=0), BLOCK_G, PADDED) / count
    channel_mean = per_channel(mean, BLOCK_G, PADDED)[None, :]
    away = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    for i in tl.static_range(CHUNKS):
        inside = mask(
            first + i * BLOCK_P, stop, exists, IS_WHOLE and i < CHUNKS - 1, BLOCK_P
        )  # fmt: skip
        centered = tl.where(inside, as_float32(tile[i], zero, PACKED) - channel_mean, 0.0)
        away += centered
        squares += centered * centered
    # The rounding error of the mean, which matters where the mean is 100 standard deviations.
    left_over = sum_groups(tl.sum(away, axis=0), BLOCK_G, PADDED) / count
    group_squares = sum_groups(tl.sum(squares, axis=0), BLOCK_G, PADDED)
    return mean + left_over, group_squares - count * left_over * left_over


@triton.jit
def _write_tile(
    tile,
    result,
    first,
    stop,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    offset,
    exists,
    zero,
    PACKED: tl.constexpr,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Normalize, scale, shift and activate a tile."""
    for i in tl.static_range(CHUNKS):
        pixel = first + i * BLOCK_P
        inside = mask(pixel, stop, exists, IS_WHOLE and i < CHUNKS - 1, BLOCK_P)
        value = as_float32(tile[i], zero, PACKED)
        normalized = (value - channel_mean[None, :]) * channel_rstd[None, :]
        activated = activate(normalized * scale[None, :] + shift[None, :], ACTIVATION)
        chunk = result + offset_of_pixel(pixel, C, CHANNELS_LAST) + offset
        tl.store(chunk, activated.to(result.dtype.element_ty), inside)


@triton.jit
def forward_kernel(
    x,
    residual,
    total,
    weight,
    bias,
    result,
    mean,
    rstd,
    pixels,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEPS_STATISTICS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Everything in one launch: a program keeps all pixels of its channels in registers."""
    C: tl.constexpr = GROUPS * PER_GROUP
    blocks = tl.cdiv(GROUPS, BLOCK_G)
    program = tl.program_id(0)
    channel, exists, group, _ = channels(
        program % blocks, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS=1
    )
    if WIDE:
        pixels = pixels.to(tl.int64)
        channel = channel.to(tl.int64)
    image = (program // blocks).to(tl.int64)
    base = image * C * pixels
    offset = offsets(channel, pixels, C, CHANNELS_LAST, BLOCK_P)
    tile = _load_sum(
        x + base,
        residual + base,
        total + base,
        0,
        pixels,
        offset,
        exists,
        C,
        HAS_RESIDUAL,
        CHANNELS_LAST,
        True,
        CHUNKS,
        BLOCK_P,
    )
    scale, shift = scale_and_shift(weight, bias, channel, exists)
    count = pixels * 1.0 * PER_GROUP
    group_mean, squares = _tile_moments(
        tile, 0, pixels, exists, count, pixels < 0, PACKED, True, CHUNKS, BLOCK_P, BLOCK_G, PADDED
    )  # fmt: skip
    group_rstd = reciprocal_std(squares / count, eps)
    if KEEPS_STATISTICS:
        tl.store(mean + image * GROUPS + group, group_mean, group < GROUPS)
        tl.store(rstd + image * GROUPS + group, group_rstd, group < GROUPS)
    _write_tile(
        tile,
        result + base,
        0,
        pixels,
        per_channel(group_mean, BLOCK_G, PADDED),
        per_channel(group_rstd, BLOCK_G, PADDED),
        scale,
        shift,
        offset,
        exists,
        pixels < -1,
        PACKED,
        C,
        ACTIVATION,
        CHANNELS_LAST,
        True,
        CHUNKS,
        BLOCK_P,
    )


@triton.jit
def moments_kernel(
    x,
    residual,
    total,
    partial_mean,
    partial_squares,
    pixels,
    pixels_per_split,
    splits,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """First of two launches: partial statistics [image, split and part, group] of a range of pixels.

    Those of its tiles are merged one after the other (Chan, Golub & LeVeque, 1979).
    """
    C: tl.constexpr = GROUPS * PER_GROUP
    image, split, start, stop, block = split_of_program(
        tl.program_id(0), pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
    )
    channel, exists, group, part = channels(block, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS)
    if WIDE:
        channel = channel.to(tl.int64)
    base = image * C * pixels
    offset = offsets(channel, pixels, C, CHANNELS_LAST, BLOCK_P)
    size = part_size(part, PER_GROUP, PADDED)
    group_mean = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    count = 0.0
    for first in range(start, stop, CHUNKS * BLOCK_P):
        tile = _load_sum(
            x + base,
            residual + base,
            total + base,
            first,
            stop,
            offset,
            exists,
            C,
            HAS_RESIDUAL,
            CHANNELS_LAST,
            False,
            CHUNKS,
            BLOCK_P,
        )
        added = tl.minimum(stop - first, CHUNKS * BLOCK_P) * 1.0 * size
        tile_mean, tile_squares = _tile_moments(
            tile, first, stop, exists, added, 0, False, False, CHUNKS, BLOCK_P, BLOCK_G, PADDED
        )
        share = added / (count + added)
        away = tile_mean - group_mean
        group_mean += away * share
        squares += tile_squares + away * (away * (count * share))
        count += added
    place = ((image * splits + split) * PARTS + part) * GROUPS + group
    tl.store(partial_mean + place, group_mean, group < GROUPS)
    tl.store(partial_squares + place, squares, group < GROUPS)


@triton.jit
def apply_kernel(
    total,
    weight,
    bias,
    partial_mean,
    partial_squares,
    result,
    mean,
    rstd,
    pixels,
    pixels_per_split,
    splits,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEPS_STATISTICS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Second launch: merge an image's partial statistics and normalize a range of its pixels.

    The last ranges come first: of these the cache still has most.
    """
    C: tl.constexpr = GROUPS * PER_GROUP
    image, split, start, stop, block = split_of_program(
        tl.num_programs(0) - 1 - tl.program_id(0),
        pixels,
        pixels_per_split,
        splits,
        GROUPS,
        WIDE,
        BLOCK_G,
        PARTS,
    )
    channel, exists, group, part = channels(block, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS)

    place, is_partial, number = partials(image, group, splits, GROUPS, PARTS, TABLE)
    range_size = tl.minimum(pixels - number // PARTS * pixels_per_split, pixels_per_split)
    size = range_size * 1.0 * part_size(number % PARTS, PER_GROUP, PADDED)
    size = tl.where(number < splits * PARTS, size, 0.0)[:, None]
    count = pixels * 1.0 * PER_GROUP
    means = tl.load(partial_mean + place, is_partial, other=0.0)
    group_mean = tl.sum(means * size, axis=0) / count
    away = tl.where(is_partial, means - group_mean[None, :], 0.0)
    left_over = tl.sum(away * size, axis=0) / count
    squares = tl.load(partial_squares + place, is_partial, other=0.0) + away * away * size
    variance = (tl.sum(squares, axis=0) - count * left_over * left_over) / count
    group_rstd = reciprocal_std(variance, eps)
    group_mean += left_over
    if KEEPS_STATISTICS:
        # One program of the image writes each group's.
        is_first = group < tl.where(split + part == 0, GROUPS, 0)
        tl.store(mean + image * GROUPS + group, group_mean, is_first)
        tl.store(rstd + image * GROUPS + group, group_rstd, is_first)

    scale, shift = scale_and_shift(weight, bias, channel, exists)
    channel_mean = per_channel(group_mean, BLOCK_G, PADDED)
    channel_rstd = per_channel(group_rstd, BLOCK_G, PADDED)
    if WIDE:
        channel = channel.to(tl.int64)
    base = image * C * pixels
    offset = offsets(channel, pixels, C, CHANNELS_LAST, BLOCK_P)
    for first in range(start, stop, CHUNKS * BLOCK_P):
        tile = load_tile(
            total + base, first, stop, offset, exists, C, CHANNELS_LAST, False, CHUNKS, BLOCK_P
        )  # fmt: skip
        _write_tile(
            tile,
            result + base,
            first,
            stop,
            channel_mean,
            channel_rstd,
            scale,
            shift,
            offset,
            exists,
            0,
            False,
            C,
            ACTIVATION,
            CHANNELS_LAST,
            False,
            CHUNKS,
            BLOCK_P,
        )
