"""group_norm_act, backward.

With h = (x - mean) rstd, z = h weight + bias and d = grad activation'(z), all recomputed from x:
  dbias = sum d,  dweight = sum d h,  dx = rstd (d weight - (sum d weight + h sum d weight h) / count),
the first two sums over images and pixels, the last two over a group's pixels and channels.
"""

import triton
import triton.language as tl

from .group_norm_act_tiles import (
    activation_slope,
    channels,
    offsets,
    partials,
    per_channel,
    scale_and_shift,
    split_of_program,
    sum_groups,
)


@triton.jit
def _backward_tile(
    grad,
    x,
    offset,
    inside,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    ACTIVATION: tl.constexpr,
):
    """Return h and d of a tile."""
    value = tl.load(x + offset, inside, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + offset, inside, other=0.0).to(tl.float32)
    normalized = (value - channel_mean[None, :]) * channel_rstd[None, :]
    slope = activation_slope(normalized * scale[None, :] + shift[None, :], ACTIVATION)
    return normalized, tl.where(inside, grad_value * slope, 0.0)


@triton.jit
def _write_grad(
    grad_x,
    grad_total,
    offset,
    inside,
    normalized,
    d,
    scale,
    channel_rstd,
    mean_term,
    projection,
    HAS_GRAD_TOTAL: tl.constexpr,
):
    """Write dx of a tile, plus the gradient that reached the sum directly."""
    value = d * scale[None, :] - mean_term[None, :] - normalized * projection[None, :]
    value *= channel_rstd[None, :]
    if HAS_GRAD_TOTAL:
        value += tl.load(grad_total + offset, inside, other=0.0).to(tl.float32)
    tl.store(grad_x + offset, value.to(grad_x.dtype.element_ty), inside)


@triton.jit
def _channel_statistics(
    mean,
    rstd,
    image,
    group,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    group_mean = tl.load(mean + image * GROUPS + group, group < GROUPS, other=0.0)
    group_rstd = tl.load(rstd + image * GROUPS + group, group < GROUPS, other=0.0)
    return per_channel(group_mean, BLOCK_G, PADDED), per_channel(group_rstd, BLOCK_G, PADDED)


@triton.jit
def _range_sums(
    grad,
    x,
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
    BLOCK_C: tl.constexpr,
):
    """Return the sums of d and of d h of each channel over pixels start to stop: [BLOCK_C]."""
    sum_d = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dh = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & exists[None, :]
        offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
        normalized, d = _backward_tile(
            grad, x, offset, inside, channel_mean, channel_rstd, scale, shift, ACTIVATION
        )
        sum_d += d
        sum_dh += d * normalized
    return tl.sum(sum_d, axis=0), tl.sum(sum_dh, axis=0)


@triton.jit
def _write_grad_range(
    grad,
    x,
    grad_total,
    grad_x,
    start,
    stop,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    mean_term,
    projection,
    channel,
    exists,
    pixels,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    for first in range(start, stop, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & exists[None, :]
        offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
        normalized, d = _backward_tile(
            grad, x, offset, inside, channel_mean, channel_rstd, scale, shift, ACTIVATION
        )
        _write_grad(
            grad_x,
            grad_total,
            offset,
            inside,
            normalized,
            d,
            scale,
            channel_rstd,
            mean_term,
            projection,
            HAS_GRAD_TOTAL,
        )


@triton.jit
def backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    bias,
    mean,
    rstd,
    grad_x,
    channel_d,
    channel_dh,
    images,
    pixels,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dx, and the sums of each channel of each image, in one launch; arranged like forward_kernel."""
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
        channel_mean, channel_rstd = _channel_statistics(
            mean, rstd, image, group, GROUPS, BLOCK_G, PADDED
        )
        if ONE_TILE:
            pixel = tl.arange(0, BLOCK_P)
            inside = (pixel < pixels)[:, None] & exists[None, :]
            offset = offsets(pixel, channel, pixels, C, CHANNELS_LAST, WIDE)
            normalized, d = _backward_tile(
                grad + base,
                x + base,
                offset,
                inside,
                channel_mean,
                channel_rstd,
                scale,
                shift,
                ACTIVATION,
            )
            sum_d = tl.sum(d, axis=0)
            sum_dh = tl.sum(d * normalized, axis=0)
        else:
            sum_d, sum_dh = _range_sums(
                grad + base,
                x + base,
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
                BLOCK_G * PADDED,
            )
        tl.store(channel_d + image * C + channel, sum_d, exists)
        tl.store(channel_dh + image * C + channel, sum_dh, exists)
        group_mean_term = sum_groups(sum_d * scale, BLOCK_G, PADDED) / count
        group_projection = sum_groups(sum_dh * scale, BLOCK_G, PADDED) / count
        mean_term = per_channel(group_mean_term, BLOCK_G, PADDED)
        projection = per_channel(group_projection, BLOCK_G, PADDED)
        if ONE_TILE:
            _write_grad(
                grad_x + base,
                grad_total + base,
                offset,
                inside,
                normalized,
                d,
                scale,
                channel_rstd,
                mean_term,
                projection,
                HAS_GRAD_TOTAL,
            )
        else:
            _write_grad_range(
                grad + base,
                x + base,
                grad_total + base,
                grad_x + base,
                0,
                pixels,
                channel_mean,
                channel_rstd,
                scale,
                shift,
                mean_term,
                projection,
                channel,
                exists,
                pixels,
                C,
                ACTIVATION,
                HAS_GRAD_TOTAL,
                CHANNELS_LAST,
                WIDE,
                BLOCK_P,
            )


@triton.jit
def backward_sums_kernel(
    grad,
    x,
    weight,
    bias,
    mean,
    rstd,
    channel_d,
    channel_dh,
    partial_d,
    partial_dh,
    pixels,
    pixels_per_split,
    splits,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """First of two launches: sums over a range of pixels, of each channel and of each group."""
    C: tl.constexpr = GROUPS * PER_GROUP
    image, split, start, stop, block = split_of_program(
        tl.program_id(0), pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
    )
    channel, exists, group, part = channels(block, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS)
    scale, shift = scale_and_shift(weight, bias, channel, exists)
    channel_mean, channel_rstd = _channel_statistics(
        mean, rstd, image, group, GROUPS, BLOCK_G, PADDED
    )
    sum_d, sum_dh = _range_sums(
        grad + image * C * pixels,
        x + image * C * pixels,
        start,
        stop,
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
        BLOCK_G * PADDED,
    )
    place = (image * splits + split) * C + channel
    tl.store(channel_d + place, sum_d, exists)
    tl.store(channel_dh + place, sum_dh, exists)
    place = ((image * splits + split) * PARTS + part) * GROUPS + group
    tl.store(partial_d + place, sum_groups(sum_d * scale, BLOCK_G, PADDED), group < GROUPS)
    tl.store(partial_dh + place, sum_groups(sum_dh * scale, BLOCK_G, PADDED), group < GROUPS)


@triton.jit
def backward_apply_kernel(
    grad,
    grad_total,
    x,
    weight,
    bias,
    mean,
    rstd,
    partial_d,
    partial_dh,
    grad_x,
    pixels,
    pixels_per_split,
    splits,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Second launch: merge an image's sums and write dx of a range of its pixels."""
    C: tl.constexpr = GROUPS * PER_GROUP
    image, _, start, stop, block = split_of_program(
        tl.program_id(0), pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
    )
    channel, exists, group, _ = channels(block, GROUPS, PER_GROUP, BLOCK_G, PADDED, PARTS)
    place, is_partial, _ = partials(image, group, splits, GROUPS, PARTS, TABLE)
    count = pixels * 1.0 * PER_GROUP
    mean_term = tl.sum(tl.load(partial_d + place, is_partial, other=0.0), axis=0) / count
    projection = tl.sum(tl.load(partial_dh + place, is_partial, other=0.0), axis=0) / count
    scale, shift = scale_and_shift(weight, bias, channel, exists)
    channel_mean, channel_rstd = _channel_statistics(
        mean, rstd, image, group, GROUPS, BLOCK_G, PADDED
    )
    base = image * C * pixels
    _write_grad_range(
        grad + base,
        x + base,
        grad_total + base,
        grad_x + base,
        start,
        stop,
        channel_mean,
        channel_rstd,
        scale,
        shift,
        per_channel(mean_term, BLOCK_G, PADDED),
        per_channel(projection, BLOCK_G, PADDED),
        channel,
        exists,
        pixels,
        C,
        ACTIVATION,
        HAS_GRAD_TOTAL,
        CHANNELS_LAST,
        WIDE,
        BLOCK_P,
    )


@triton.jit
def parameter_gradients_kernel(
    channel_d,
    channel_dh,
    grad_weight,
    grad_bias,
    rows,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum [rows, C] over the rows, in a fixed order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_d = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_dh = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (row < rows)[:, None] & (channel < C)[None, :]
        place = row[:, None] * C + channel[None, :]
        sum_d += tl.load(channel_d + place, inside, other=0.0)
        sum_dh += tl.load(channel_dh + place, inside, other=0.0)
    total_d, total_dh = tl.sum(sum_d, axis=0), tl.sum(sum_dh, axis=0)
    tl.store(grad_bias + channel, total_d.to(grad_bias.dtype.element_ty), channel < C)
    tl.store(grad_weight + channel, total_dh.to(grad_weight.dtype.element_ty), channel < C)
