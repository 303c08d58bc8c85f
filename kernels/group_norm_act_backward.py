"""group_norm_act, backward.

With h = (x - mean) rstd, z = h weight + bias and d = grad activation'(z), all recomputed from x:
  dbias = sum d,  dweight = sum d h,  dx = rstd (d weight - (sum d weight + h sum d weight h) / count),
the first two sums over images and pixels, the last two over a group's pixels and channels. Where the forward
pass did not keep its result, activation(z), that is stored beside dx.
"""

import triton
import triton.language as tl

from .group_norm_act_tiles import (
    activate,
    activation_slope,
    as_float32,
    channels,
    load_tile,
    mask,
    offset_of_pixel,
    offsets,
    partials,
    per_channel,
    scale_and_shift,
    split_of_program,
    sum_groups,
)


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
def _normalized_and_slope(
    value, channel_mean, channel_rstd, scale, shift, ACTIVATION: tl.constexpr
):
    """Return h, z and the activation's derivative of a chunk of float32."""
    normalized = (value - channel_mean[None, :]) * channel_rstd[None, :]
    before = normalized * scale[None, :] + shift[None, :]
    return normalized, before, activation_slope(before, ACTIVATION)


@triton.jit
def _add_sums(
    sum_d,
    sum_dh,
    grads,
    values,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    inside,
    ACTIVATION: tl.constexpr,
):
    """Add d and d h of a chunk to sums [BLOCK_P, BLOCK_C]."""
    normalized, _, slope = _normalized_and_slope(
        values.to(tl.float32), channel_mean, channel_rstd, scale, shift, ACTIVATION
    )
    d = tl.where(inside, grads.to(tl.float32) * slope, 0.0)
    return sum_d + d, sum_dh + d * normalized


@triton.jit
def _write_tile(
    grads,
    values,
    grad_total,
    grad_x,
    result,
    first,
    stop,
    channel_mean,
    channel_rstd,
    scale,
    shift,
    mean_term,
    projection,
    offset,
    exists,
    zero,
    PACKED: tl.constexpr,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    RECOMPUTES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write dx of a tile, plus the gradient that reached the sum directly; and the result again if asked."""
    for i in tl.static_range(CHUNKS):
        pixel = first + i * BLOCK_P
        inside = mask(pixel, stop, exists, IS_WHOLE and i < CHUNKS - 1, BLOCK_P)
        place = offset_of_pixel(pixel, C, CHANNELS_LAST)
        normalized, before, slope = _normalized_and_slope(
            as_float32(values[i], zero, PACKED),
            channel_mean,
            channel_rstd,
            scale,
            shift,
            ACTIVATION,
        )
        d = as_float32(grads[i], zero, PACKED) * slope
        value = d * scale[None, :] - mean_term[None, :] - normalized * projection[None, :]
        value *= channel_rstd[None, :]
        if HAS_GRAD_TOTAL:
            value += tl.load(grad_total + place + offset, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place + offset, value.to(grad_x.dtype.element_ty), inside)
        if RECOMPUTES:
            activated = activate(before, ACTIVATION).to(result.dtype.element_ty)
            tl.store(result + place + offset, activated, inside)


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
    result,
    channel_d,
    channel_dh,
    pixels,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    RECOMPUTES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dx, and the sums of each channel of each image, in one launch; arranged like forward_kernel."""
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
    values = load_tile(
        x + base, 0, pixels, offset, exists, C, CHANNELS_LAST, True, CHUNKS, BLOCK_P
    )  # fmt: skip
    grads = load_tile(
        grad + base, 0, pixels, offset, exists, C, CHANNELS_LAST, True, CHUNKS, BLOCK_P
    )  # fmt: skip
    scale, shift = scale_and_shift(weight, bias, channel, exists)
    channel_mean, channel_rstd = _channel_statistics(
        mean, rstd, image, group, GROUPS, BLOCK_G, PADDED
    )
    elements_d = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    elements_dh = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    for i in tl.static_range(CHUNKS):
        elements_d, elements_dh = _add_sums(
            elements_d,
            elements_dh,
            grads[i],
            values[i],
            channel_mean,
            channel_rstd,
            scale,
            shift,
            mask(i * BLOCK_P, pixels, exists, i < CHUNKS - 1, BLOCK_P),
            ACTIVATION,
        )
    sum_d, sum_dh = tl.sum(elements_d, axis=0), tl.sum(elements_dh, axis=0)
    tl.store(channel_d + image * C + channel, sum_d, exists)
    tl.store(channel_dh + image * C + channel, sum_dh, exists)
    count = pixels * 1.0 * PER_GROUP
    mean_term = sum_groups(sum_d * scale, BLOCK_G, PADDED) / count
    projection = sum_groups(sum_dh * scale, BLOCK_G, PADDED) / count
    _write_tile(
        grads,
        values,
        grad_total + base,
        grad_x + base,
        result + base,
        0,
        pixels,
        channel_mean,
        channel_rstd,
        scale,
        shift,
        per_channel(mean_term, BLOCK_G, PADDED),
        per_channel(projection, BLOCK_G, PADDED),
        offset,
        exists,
        pixels < 0,
        PACKED,
        C,
        ACTIVATION,
        HAS_GRAD_TOTAL,
        RECOMPUTES,
        CHANNELS_LAST,
        True,
        CHUNKS,
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
    CHUNKS: tl.constexpr,
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
    if WIDE:
        channel = channel.to(tl.int64)
    base = image * C * pixels
    offset = offsets(channel, pixels, C, CHANNELS_LAST, BLOCK_P)
    scale, shift = scale_and_shift(weight, bias, channel, exists)
    channel_mean, channel_rstd = _channel_statistics(
        mean, rstd, image, group, GROUPS, BLOCK_G, PADDED
    )
    elements_d = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    elements_dh = tl.zeros([BLOCK_P, BLOCK_G * PADDED], tl.float32)
    for first in range(start, stop, CHUNKS * BLOCK_P):
        values = load_tile(
            x + base, first, stop, offset, exists, C, CHANNELS_LAST, False, CHUNKS, BLOCK_P
        )  # fmt: skip
        grads = load_tile(
            grad + base, first, stop, offset, exists, C, CHANNELS_LAST, False, CHUNKS, BLOCK_P
        )  # fmt: skip
        for i in tl.static_range(CHUNKS):
            elements_d, elements_dh = _add_sums(
                elements_d,
                elements_dh,
                grads[i],
                values[i],
                channel_mean,
                channel_rstd,
                scale,
                shift,
                mask(first + i * BLOCK_P, stop, exists, False, BLOCK_P),
                ACTIVATION,
            )
    sum_d, sum_dh = tl.sum(elements_d, axis=0), tl.sum(elements_dh, axis=0)
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
    result,
    pixels,
    pixels_per_split,
    splits,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    RECOMPUTES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Second launch: merge an image's sums and write dx of a range of its pixels, the last ranges first."""
    C: tl.constexpr = GROUPS * PER_GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, _, start, stop, block = split_of_program(
        program, pixels, pixels_per_split, splits, GROUPS, WIDE, BLOCK_G, PARTS
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
    channel_mean_term = per_channel(mean_term, BLOCK_G, PADDED)
    channel_projection = per_channel(projection, BLOCK_G, PADDED)
    if WIDE:
        channel = channel.to(tl.int64)
    base = image * C * pixels
    offset = offsets(channel, pixels, C, CHANNELS_LAST, BLOCK_P)
    for first in range(start, stop, CHUNKS * BLOCK_P):
        values = load_tile(
            x + base, first, stop, offset, exists, C, CHANNELS_LAST, False, CHUNKS, BLOCK_P
        )  # fmt: skip
        grads = load_tile(
            grad + base, first, stop, offset, exists, C, CHANNELS_LAST, False, CHUNKS, BLOCK_P
        )  # fmt: skip
        _write_tile(
            grads,
            values,
            grad_total + base,
            grad_x + base,
            result + base,
            first,
            stop,
            channel_mean,
            channel_rstd,
            scale,
            shift,
            channel_mean_term,
            channel_projection,
            offset,
            exists,
            0,
            False,
            C,
            ACTIVATION,
            HAS_GRAD_TOTAL,
            RECOMPUTES,
            CHANNELS_LAST,
            False,
            CHUNKS,
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
