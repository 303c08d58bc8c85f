"""What the forward and backward kernels of group_norm_act share: activations and geometry.

A tile is a tuple of CHUNKS chunks, so that its pixels need not be a power of two, and all its loads are on
the way before the first is waited for. A chunk is [BLOCK_P pixels, BLOCK_C channels] in both layouts; only
the strides differ. BLOCK_C is BLOCK_G groups of PADDED channels, PADDED being the channels of a group rounded
up to a power of two. A group wider than a chunk is cut into PARTS, each with partial results of its own.
"""

import triton
import triton.language as tl

# ---- activations ----------------------------------------------------------------------------------


@triton.jit
def _gelu_new_exponent(z):
    """Return e with which the tanh approximation of gelu is z / (1 + e)."""
    return tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return the activation of z. The comparisons are written so that NaN passes through."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":
        return z / (1 + _gelu_new_exponent(z))
    elif ACTIVATION == "selu":
        negative = 1.6732632423543772 * (tl.exp(tl.where(z > 0, 0.0, z)) - 1)
        return 1.0507009873554805 * tl.where(z > 0, z, negative)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation at z."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_new":
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
        below, above = 1 / (1 + _gelu_new_exponent(z)), 1 / (1 + _gelu_new_exponent(-z))
        return below + z * below * above * slope
    elif ACTIVATION == "selu":
        negative = 1.6732632423543772 * tl.exp(tl.where(z > 0, 0.0, z))
        return 1.0507009873554805 * tl.where(z > 0, 1.0, negative)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z * 0 + 1


# ---- geometry -------------------------------------------------------------------------------------


@triton.jit
def channels(
    block,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return a block's channels and which of them exist [BLOCK_C], its groups [BLOCK_G], its part."""
    lane = tl.arange(0, BLOCK_G * PADDED)
    part = block % PARTS
    group = block // PARTS * BLOCK_G
    if PARTS * PADDED == PER_GROUP:
        channel = block * (BLOCK_G * PADDED) + lane  # without gaps, which allows wide loads
        if GROUPS % BLOCK_G == 0:
            exists = tl.full([BLOCK_G * PADDED], True, tl.int1)  # known beforehand: no masks
        else:
            exists = channel < GROUPS * PER_GROUP
    else:
        within = part * PADDED + lane % PADDED
        channel = (group + lane // PADDED) * PER_GROUP + within
        exists = (within < PER_GROUP) & (group + lane // PADDED < GROUPS)
    return channel, exists, group + tl.arange(0, BLOCK_G), part


@triton.jit
def part_size(part, PER_GROUP: tl.constexpr, PADDED: tl.constexpr):
    """Return how many channels of its group a part has."""
    return tl.minimum(PER_GROUP - part * PADDED, PADDED)


@triton.jit
def offsets(channel, pixels, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the offsets within a chunk from its first pixel: [BLOCK_P, BLOCK_C].

    They have 64 bits if ``channel`` or ``pixels`` has.
    """
    row = tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        return row[:, None] * C + channel[None, :]
    else:
        return row[:, None] + channel[None, :] * pixels


@triton.jit
def offset_of_pixel(pixel, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the offset of a pixel's first channel within its image."""
    if CHANNELS_LAST:
        return pixel * C
    else:
        return pixel


@triton.jit
def mask(first, stop, exists, IS_FULL: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return which elements of the chunk at pixel ``first`` lie before pixel ``stop``: [BLOCK_P, BLOCK_C].

    IS_FULL: all of its pixels do, known beforehand.
    """
    row = tl.arange(0, BLOCK_P)
    if IS_FULL:
        return (row >= 0)[:, None] & exists[None, :]
    else:
        return (row < stop - first)[:, None] & exists[None, :]


@triton.jit
def load_tile(
    x,
    first,
    stop,
    offset,
    exists,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Load the tile at pixel ``first``, with zeros from pixel ``stop`` on.

    IS_WHOLE: all chunks but the last are full. Else any may end early.
    """
    tile = ()
    for i in tl.static_range(CHUNKS):
        pixel = first + i * BLOCK_P
        inside = mask(pixel, stop, exists, IS_WHOLE and i < CHUNKS - 1, BLOCK_P)
        chunk = x + offset_of_pixel(pixel, C, CHANNELS_LAST) + offset
        tile = tile + (tl.load(chunk, inside, other=0.0),)  # noqa: RUF005 (Triton unpacks no tuples)
    return tile


@triton.jit
def as_float32(chunk, zero, PACKED: tl.constexpr):
    """Convert a chunk that is kept for long.

    PACKED: 16-bit numbers stay two to a register until they are needed. Otherwise the compiler converts them
    once and keeps the float32 numbers, which take twice the registers. So that it cannot see that this chunk
    was converted before, ``zero`` goes into it: a number that is 0 for reasons that the compiler does not know.
    """
    if PACKED:
        nothing = tl.zeros(chunk.shape, tl.int32) + zero
        if chunk.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 pair;
                xor.b32 pair, $2, $3;
                shl.b32 $0, pair, 16;
                and.b32 $1, pair, 0xffff0000;
                }""",
                "=r,=r,r,r,r",
                [chunk, nothing],
                tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            tl.static_assert(chunk.dtype == tl.float16)
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 pair;
                .reg .b16 first, second;
                xor.b32 pair, $2, $3;
                mov.b32 {first, second}, pair;
                cvt.f32.f16 $0, first;
                cvt.f32.f16 $1, second;
                }""",
                "=r,=r,r,r,r",
                [chunk, nothing],
                tl.float32,
                is_pure=True,
                pack=2,
            )
    else:
        return chunk.to(tl.float32)


@triton.jit
def sum_groups(values, BLOCK_G: tl.constexpr, PADDED: tl.constexpr):
    """Sum [BLOCK_C] over the channels of each group: [BLOCK_G]."""
    return tl.sum(tl.reshape(values, [BLOCK_G, PADDED]), axis=1)


@triton.jit
def per_channel(values, BLOCK_G: tl.constexpr, PADDED: tl.constexpr):
    """Repeat [BLOCK_G] for each channel: [BLOCK_C]."""
    return tl.reshape(tl.broadcast_to(values[:, None], [BLOCK_G, PADDED]), [BLOCK_G * PADDED])


@triton.jit
def split_of_program(
    program,
    pixels,
    pixels_per_split,
    splits,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return a program's image, split, first pixel, end, and block. Adjacent programs share their pixels."""
    blocks = tl.cdiv(GROUPS, BLOCK_G) * PARTS
    split = program // blocks % splits
    start = split * pixels_per_split
    if WIDE:
        start = split.to(tl.int64) * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    return (program // blocks // splits).to(tl.int64), split, start, stop, program % blocks


@triton.jit
def partials(image, group, splits, GROUPS: tl.constexpr, PARTS: tl.constexpr, TABLE: tl.constexpr):
    """Return the offsets of an image's partial results [TABLE, BLOCK_G], which of them exist, their numbers."""
    number = tl.arange(0, TABLE)
    place = image * splits * PARTS * GROUPS + number[:, None] * GROUPS + group[None, :]
    exists = (number < splits * PARTS)[:, None] & (group < GROUPS)[None, :]
    return place, exists, number


@triton.jit
def scale_and_shift(weight, bias, channel, exists):
    """Load the scale and the shift of each channel: [BLOCK_C] each."""
    scale = tl.load(weight + channel, exists, other=0.0).to(tl.float32)
    return scale, tl.load(bias + channel, exists, other=0.0).to(tl.float32)
