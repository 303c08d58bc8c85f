"""group_norm_act, forward: statistics, normalization and activation, with or without a residual sum."""

import triton
import triton.language as tl

from .arithmetic import reciprocal_std
from .group_norm_act_tiles import (
    activate,
    channels,
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
    offset,
    inside,
    HAS_RESIDUAL: tl.constexpr,
    SUM_IN_PLACE: tl.constexpr,
):
    """Load a tile; with a residual, add it, keep the sum and return it as it was rounded.

    SUM_IN_PLACE: the sum takes the place of x or of the residual. In a tile of fewer elements than threads
    several warps load the same element, so none may store its sum before all have loaded it.
    """
    value = tl.load(x + offset, inside, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + offset, inside, other=0.0)
        if SUM_IN_PLACE:
            tl.debug_barrier()
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + offset, value, inside)
    return value.to(tl.float32)


@triton.jit
def _tile_moments(value, inside, count, BLOCK_G: tl.constexpr, PADDED: tl.constexpr):
    """Return the mean, and the sum of squares around it, of each group of one tile: [BLOCK_G]."""
    mean = sum_groups(tl.sum(value, axis=0), BLOCK_G, PADDED) / count
    centered = tl.where(inside, value - per_channel(mean, BLOCK_G, PADDED)[None, :], 0.0)
    # The rounding error of the mean, which matters where the mean is 100 standard deviations.
    left_over = sum_groups(tl.sum(centered, axis=0), BLOCK_G, PADDED) / count
    squares = sum_groups(tl.sum(centered * centered, axis=0), BLOCK_G, PADDED)
    return mean + left_over, squares - count * left_over * left_over


@triton.jit
def _range_moments(
    x,
    residual,
    total,
    start,
    stop,
    count,
    channel,
    exists,
    pixels,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SUM_IN_PLACE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the mean, and the sum of squares around it, of each group over pixels start to stop: [BLOCK_G].

    Each element of the tile keeps a mean and a sum of squares of its own while the tile moves over the
    pixels (Welford, 1962); they are merged at the end (Chan, Golub & LeVeque, 1979).
    """
    row = tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    seen = 0.0
    for first in range(start, stop, BLOCK_P):
        pixel = first + row
        inside = (pixel < stop)[:, None] & exists[None, :]
        offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
        value = _load_sum(x, residual, total, offset, inside, HAS_RESIDUAL, SUM_IN_PLACE)
        seen += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / seen)
        squares += tl.where(inside, delta * (value - mean), 0.0)
    rows_seen = tl.maximum((stop - start - row + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    group_mean = sum_groups(tl.sum(mean * rows_seen, axis=0), BLOCK_G, PADDED) / count
    away = tl.where(exists[None, :], mean - per_channel(group_mean, BLOCK_G, PADDED)[None, :], 0.0)
    left_over = sum_groups(tl.sum(away * rows_seen, axis=0), BLOCK_G, PADDED) / count
    squares += away * away * rows_seen
    group_squares = sum_groups(tl.sum(squares, axis=0), BLOCK_G, PADDED)
    return group_mean + left_over, group_squares - count * left_over * left_over


@triton.jit
def _write_range(
    total,
    result,
    start,
    stop,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    channel,
    exists,
    pixels,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Normalize, scale, shift and activate pixels start to stop."""
    for first in range(start, stop, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & exists[None, :]
        offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
        value = tl.load(total + offset, inside, other=0.0, eviction_policy="evict_first")
        normalized = (value.to(tl.float32) - channel_mean[None, :]) * channel_rstd[None, :]
        activated = activate(normalized * scale[None, :] + shift[None, :], ACTIVATION)
        tl.store(result + offset, activated.to(result.dtype.element_ty), inside)


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
    images,
    pixels,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SUM_IN_PLACE: tl.constexpr,
    KEEPS_STATISTICS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Everything in one launch: a program has all pixels of its channels.

    ONE_TILE: they fit in registers and are read once. Else they are read a second time, from the cache if
    the launch keeps few enough programs at work; therefore the programs loop over the images.
    """
    C: tl.constexpr = GROUPS * PER_GROUP
    if WIDE:
        pixels = pixels.to(tl.int64)
    blocks = tl.cdiv(GROUPS, BLOCK_G)
    count = pixels * 1.0 * PER_GROUP
    for item in range(tl.program_id(0), images * blocks, tl.num_programs(0)):
        channel, exists, group, _ = channels(
            item % blocks, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS=1
        )
        image = (item // blocks).to(tl.int64)
        base = image * C * pixels
        scale, shift = scale_and_shift(weight, bias, channel, exists)
        if ONE_TILE:
            pixel = tl.arange(0, BLOCK_P)
            inside = (pixel < pixels)[:, None] & exists[None, :]
            offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
            value = _load_sum(
                x + base,
                residual + base,
                total + base,
                offset,
                inside,
                HAS_RESIDUAL,
                SUM_IN_PLACE,
            )
            group_mean, squares = _tile_moments(value, inside, count, BLOCK_G, PADDED)
        else:
            group_mean, squares = _range_moments(
                x + base,
                residual + base,
                total + base,
                0,
                pixels,
                count,
                channel,
                exists,
                pixels,
                C,
                CHANNELS_LAST,
                WIDE,
                HAS_RESIDUAL,
                SUM_IN_PLACE,
                BLOCK_P,
                BLOCK_G,
                PADDED,
            )
        group_rstd = reciprocal_std(squares / count, eps)
        if KEEPS_STATISTICS:
            tl.store(mean + image * GROUPS + group, group_mean, group < GROUPS)
            tl.store(rstd + image * GROUPS + group, group_rstd, group < GROUPS)
        channel_mean = per_channel(group_mean, BLOCK_G, PADDED)
        channel_rstd = per_channel(group_rstd, BLOCK_G, PADDED)
        if ONE_TILE:
            normalized = (value - channel_mean[None, :]) * channel_rstd[None, :]
            activated = activate(normalized * scale[None, :] + shift[None, :], ACTIVATION)
            tl.store(result + base + offset, activated.to(result.dtype.element_ty), inside)
        else:
            tl.debug_barrier()  # other threads of this program may have written what is read next
            _write_range(
                (total if HAS_RESIDUAL else x) + base,
                result + base,
                0,
                pixels,
                channel_mean,
                channel_rstd,
                scale,
                shift,
                channel,
                exists,
                pixels,
                C,
                ACTIVATION,
                CHANNELS_LAST,
                WIDE,
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
    SUM_IN_PLACE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """First of two launches: partial statistics [image, split and part, group] of a range of pixels."""
    C: tl.constexpr = GROUPS * PER_GROUP
    image, split, start, stop, block = split_of_program(
        tl.program_id(0), pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
    )
    channel, exists, group, part = channels(block, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS)
    base = image * C * pixels
    group_mean, squares = _range_moments(
        x + base,
        residual + base,
        total + base,
        start,
        stop,
        (stop - start) * 1.0 * part_size(part, PER_GROUP, PADDED),
        channel,
        exists,
        pixels,
        C,
        CHANNELS_LAST,
        WIDE,
        HAS_RESIDUAL,
        SUM_IN_PLACE,
        BLOCK_P,
        BLOCK_G,
        PADDED,
    )
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
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Second launch: merge an image's partial statistics and normalize a range of its pixels."""
    C: tl.constexpr = GROUPS * PER_GROUP
    image, split, start, stop, block = split_of_program(
        tl.program_id(0), pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
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
    _write_range(
        total + image * C * pixels,
        result + image * C * pixels,
        start,
        stop,
        per_channel(group_mean, BLOCK_G, PADDED),
        per_channel(group_rstd, BLOCK_G, PADDED),
        scale,
        shift,
        channel,
        exists,
        pixels,
        C,
        ACTIVATION,
        CHANNELS_LAST,
        WIDE,
        BLOCK_P,
    )
