"""weight_standardization: the kernels, forward and backward, of one weight and of all weights of a model.

A filter is a row of ``inner * taps`` numbers (input channels times kernel pixels), dense in memory. It comes
in the order of the parameter and is written in the order that the convolution needs. Either the two are the
same ("straight"), or the parameter is [inner, taps] and the result [taps, inner] ("turned"). Every filter is
read once into registers, standardized there in float32 and written once; only filters that are longer
than a tile, or not aligned to 16 bytes, go through a loop that reads them again from the cache.

KIND is the number of the way that a weight is computed; ``KINDS`` in ``weight_standardization`` chooses it.
"""

import triton
import triton.language as tl

from .arithmetic import reciprocal_std

LOOP_BLOCK = tl.constexpr(2048)
"""Numbers of a filter that the loop works on at a time."""


@triton.jit
def _straight(first_row, rows, fan_in, ROWS: tl.constexpr, FAN: tl.constexpr):
    """Return rows, whether they exist, offsets of a [ROWS, FAN] tile and which of those exist."""
    fan_in = fan_in // 16 * 16  # unchanged, but the compiler now knows the divisor
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, FAN)
    offset = row.to(tl.int64)[:, None] * fan_in + column[None, :]
    return row, row < rows, offset, (row < rows)[:, None] & (column < fan_in)[None, :]


@triton.jit
def _turned(row, inner, taps, INNER: tl.constexpr, TAPS: tl.constexpr):
    """Return the offsets of an [INNER, TAPS] tile in the parameter and in the result, and which exist."""
    inner = inner // 16 * 16  # unchanged, but the compiler now knows the divisor
    i = tl.arange(0, INNER)[:, None]
    tap = tl.arange(0, TAPS)[None, :]
    start = row.to(tl.int64) * (inner * taps)
    return start + i * taps + tap, start + tap * inner + i, (i < inner) & (tap < taps)


@triton.jit
def _looped(row, first, inner, taps, TURNED: tl.constexpr):
    """Return the offsets of LOOP_BLOCK numbers, from ``first`` on, in both orders, and which of them exist."""
    fan_in = inner * taps
    column = first + tl.arange(0, LOOP_BLOCK)
    start = row.to(tl.int64) * fan_in
    target = column % taps * inner + column // taps if TURNED else column
    return start + column, start + target, column < fan_in


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


# ---- forward --------------------------------------------------------------------------------------


@triton.jit
def _forward_straight(
    weight, result, mean, rstd, first_row, rows, fan_in, eps, ROWS: tl.constexpr, FAN: tl.constexpr
):
    row, exists, offset, inside = _straight(first_row, rows, fan_in, ROWS, FAN)
    value = tl.load(weight + offset, inside, other=0.0).to(tl.float32)
    row_mean = tl.sum(value, axis=1) / fan_in
    centered = tl.where(inside, value - row_mean[:, None], 0.0)
    # The rounding error of the mean, which matters where the mean is many standard deviations.
    left_over = tl.sum(centered, axis=1) / fan_in
    centered = tl.where(inside, centered - left_over[:, None], 0.0)
    row_rstd = reciprocal_std(tl.sum(centered * centered, axis=1) / fan_in, eps)
    tl.store(mean + row, row_mean + left_over, exists)
    tl.store(rstd + row, row_rstd, exists)
    standardized = centered * row_rstd[:, None]
    tl.store(result + offset, standardized.to(result.dtype.element_ty), inside)


@triton.jit
def _forward_turned(
    weight, result, mean, rstd, row, inner, taps, eps, INNER: tl.constexpr, TAPS: tl.constexpr
):
    source, target, inside = _turned(row, inner, taps, INNER, TAPS)
    fan_in = inner * taps
    value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
    row_mean = _sum(value) / fan_in
    centered = tl.where(inside, value - row_mean, 0.0)
    left_over = _sum(centered) / fan_in
    centered = tl.where(inside, centered - left_over, 0.0)
    row_rstd = reciprocal_std(_sum(centered * centered) / fan_in, eps)
    tl.store(mean + row, row_mean + left_over)
    tl.store(rstd + row, row_rstd)
    tl.store(result + target, (centered * row_rstd).to(result.dtype.element_ty), inside)


@triton.jit
def _forward_looped(weight, result, mean, rstd, row, inner, taps, eps, TURNED: tl.constexpr):
    fan_in = inner * taps
    total = tl.zeros([LOOP_BLOCK], tl.float32)
    for first in range(0, fan_in, LOOP_BLOCK):
        source, _, inside = _looped(row, first, inner, taps, TURNED)
        total += tl.load(weight + source, inside, other=0.0).to(tl.float32)
    row_mean = tl.sum(total, axis=0) / fan_in
    left_overs = tl.zeros([LOOP_BLOCK], tl.float32)
    squares = tl.zeros([LOOP_BLOCK], tl.float32)
    for first in range(0, fan_in, LOOP_BLOCK):
        source, _, inside = _looped(row, first, inner, taps, TURNED)
        value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, value - row_mean, 0.0)
        left_overs += centered
        squares += centered * centered
    left_over = tl.sum(left_overs, axis=0) / fan_in
    variance = tl.sum(squares, axis=0) / fan_in - left_over * left_over
    row_rstd = reciprocal_std(variance, eps)
    tl.store(mean + row, row_mean + left_over)
    tl.store(rstd + row, row_rstd)
    for first in range(0, fan_in, LOOP_BLOCK):
        source, target, inside = _looped(row, first, inner, taps, TURNED)
        value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
        standardized = (value - row_mean - left_over) * row_rstd
        tl.store(result + target, standardized.to(result.dtype.element_ty), inside)


@triton.jit
def forward_kernel(
    weight, result, mean, rstd, rows, inner, taps, eps, KIND: tl.constexpr, ROWS: tl.constexpr
):
    """Standardize one weight."""
    _forward(weight, result, mean, rstd, tl.program_id(0) * ROWS, rows, inner, taps, eps, KIND)


@triton.jit
def _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND: tl.constexpr):
    fan_in = inner * taps
    if KIND == 0:
        _forward_straight(weight, result, mean, rstd, row, rows, fan_in, eps, ROWS=32, FAN=256)
    elif KIND == 1:
        _forward_straight(weight, result, mean, rstd, row, rows, fan_in, eps, ROWS=8, FAN=1024)
    elif KIND == 2:
        _forward_straight(weight, result, mean, rstd, row, rows, fan_in, eps, ROWS=2, FAN=4096)
    elif KIND == 3:
        _forward_straight(weight, result, mean, rstd, row, rows, fan_in, eps, ROWS=1, FAN=8192)
    elif KIND == 4:
        _forward_turned(weight, result, mean, rstd, row, inner, taps, eps, INNER=256, TAPS=16)
    elif KIND == 5:
        _forward_turned(weight, result, mean, rstd, row, inner, taps, eps, INNER=512, TAPS=16)
    elif KIND == 6:
        _forward_looped(weight, result, mean, rstd, row, inner, taps, eps, TURNED=False)
    else:
        tl.static_assert(KIND == 7)
        _forward_looped(weight, result, mean, rstd, row, inner, taps, eps, TURNED=True)


@triton.jit
def _segment(programs, segments, FIELDS: tl.constexpr):
    """Return what the tables say about this program; the order is that of ``SEGMENT_FIELDS``."""
    place = tl.load(programs + tl.program_id(0) * 2)
    row = tl.load(programs + tl.program_id(0) * 2 + 1)
    entry = segments + place.to(tl.int64) * FIELDS
    address = tl.load(entry)
    first = tl.load(entry + 1)
    start = tl.load(entry + 2)
    rows = tl.load(entry + 3).to(tl.int32)
    inner = tl.load(entry + 4).to(tl.int32)
    taps = tl.load(entry + 5).to(tl.int32)
    kind = tl.load(entry + 6)
    return address, first, start, rows, inner, taps, kind, row


@triton.jit
def forward_all_kernel(programs, segments, like, result, mean, rstd, eps, FIELDS: tl.constexpr):
    """Standardize all weights that ``segments`` lists; ``like`` is any pointer of their dtype."""
    address, first, start, rows, inner, taps, kind, row = _segment(programs, segments, FIELDS)
    unaligned = address.to(like.dtype)
    weight = tl.multiple_of((address // 16 * 16).to(like.dtype), 16)
    result += start // 16 * 16
    mean += first
    rstd += first
    if kind == 0:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=0)
    elif kind == 1:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=1)
    elif kind == 2:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=2)
    elif kind == 3:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=3)
    elif kind == 4:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=4)
    elif kind == 5:
        _forward(weight, result, mean, rstd, row, rows, inner, taps, eps, KIND=5)
    elif kind == 6:
        _forward(unaligned, result, mean, rstd, row, rows, inner, taps, eps, KIND=6)
    else:
        _forward(unaligned, result, mean, rstd, row, rows, inner, taps, eps, KIND=7)


# ---- backward -------------------------------------------------------------------------------------
#
# With h = (weight - mean) rstd: dweight = rstd (dh - mean(dh) - h mean(dh h)), the means over a filter.


@triton.jit
def _backward_straight(
    grad,
    weight,
    mean,
    rstd,
    grad_weight,
    first_row,
    rows,
    fan_in,
    ROWS: tl.constexpr,
    FAN: tl.constexpr,
):
    row, exists, offset, inside = _straight(first_row, rows, fan_in, ROWS, FAN)
    row_mean = tl.load(mean + row, exists, other=0.0)
    row_rstd = tl.load(rstd + row, exists, other=0.0)
    value = tl.load(weight + offset, inside, other=0.0).to(tl.float32)
    d = tl.load(grad + offset, inside, other=0.0).to(tl.float32)
    h = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
    d_mean = tl.sum(d, axis=1) / fan_in
    projection = tl.sum(d * h, axis=1) / fan_in
    out = row_rstd[:, None] * (d - d_mean[:, None] - h * projection[:, None])
    tl.store(grad_weight + offset, out.to(grad_weight.dtype.element_ty), inside)


@triton.jit
def _backward_turned(
    grad,
    weight,
    mean,
    rstd,
    grad_weight,
    row,
    inner,
    taps,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
):
    source, target, inside = _turned(row, inner, taps, INNER, TAPS)
    fan_in = inner * taps
    row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
    d = tl.load(grad + target, inside, other=0.0).to(tl.float32)
    h = tl.where(inside, (value - row_mean) * row_rstd, 0.0)
    out = row_rstd * (d - _sum(d) / fan_in - h * (_sum(d * h) / fan_in))
    tl.store(grad_weight + source, out.to(grad_weight.dtype.element_ty), inside)


@triton.jit
def _backward_looped(grad, weight, mean, rstd, grad_weight, row, inner, taps, TURNED: tl.constexpr):
    fan_in = inner * taps
    row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    d_sum = tl.zeros([LOOP_BLOCK], tl.float32)
    dh_sum = tl.zeros([LOOP_BLOCK], tl.float32)
    for first in range(0, fan_in, LOOP_BLOCK):
        source, target, inside = _looped(row, first, inner, taps, TURNED)
        value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
        d = tl.load(grad + target, inside, other=0.0).to(tl.float32)
        d_sum += d
        dh_sum += d * ((value - row_mean) * row_rstd)
    d_mean = tl.sum(d_sum, axis=0) / fan_in
    projection = tl.sum(dh_sum, axis=0) / fan_in
    for first in range(0, fan_in, LOOP_BLOCK):
        source, target, inside = _looped(row, first, inner, taps, TURNED)
        value = tl.load(weight + source, inside, other=0.0).to(tl.float32)
        d = tl.load(grad + target, inside, other=0.0).to(tl.float32)
        out = row_rstd * (d - d_mean - (value - row_mean) * row_rstd * projection)
        tl.store(grad_weight + source, out.to(grad_weight.dtype.element_ty), inside)


@triton.jit
def _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND: tl.constexpr):
    fan_in = inner * taps
    if KIND == 0:
        _backward_straight(grad, weight, mean, rstd, out, row, rows, fan_in, ROWS=32, FAN=256)
    elif KIND == 1:
        _backward_straight(grad, weight, mean, rstd, out, row, rows, fan_in, ROWS=8, FAN=1024)
    elif KIND == 2:
        _backward_straight(grad, weight, mean, rstd, out, row, rows, fan_in, ROWS=2, FAN=4096)
    elif KIND == 3:
        _backward_straight(grad, weight, mean, rstd, out, row, rows, fan_in, ROWS=1, FAN=8192)
    elif KIND == 4:
        _backward_turned(grad, weight, mean, rstd, out, row, inner, taps, INNER=256, TAPS=16)
    elif KIND == 5:
        _backward_turned(grad, weight, mean, rstd, out, row, inner, taps, INNER=512, TAPS=16)
    elif KIND == 6:
        _backward_looped(grad, weight, mean, rstd, out, row, inner, taps, TURNED=False)
    else:
        tl.static_assert(KIND == 7)
        _backward_looped(grad, weight, mean, rstd, out, row, inner, taps, TURNED=True)


@triton.jit
def backward_kernel(
    grad,
    weight,
    mean,
    rstd,
    grad_weight,
    rows,
    inner,
    taps,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient of one weight."""
    row = tl.program_id(0) * ROWS
    _backward(grad, weight, mean, rstd, grad_weight, row, rows, inner, taps, KIND)


@triton.jit
def backward_all_kernel(
    programs, segments, grad, like, mean, rstd, grad_weight, FIELDS: tl.constexpr
):
    """Compute the gradients of all weights, in the order of ``grad``."""
    address, first, start, rows, inner, taps, kind, row = _segment(programs, segments, FIELDS)
    unaligned = address.to(like.dtype)
    weight = tl.multiple_of((address // 16 * 16).to(like.dtype), 16)
    start = start // 16 * 16
    grad += start
    out = grad_weight + start
    mean += first
    rstd += first
    if kind == 0:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=0)
    elif kind == 1:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=1)
    elif kind == 2:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=2)
    elif kind == 3:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=3)
    elif kind == 4:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=4)
    elif kind == 5:
        _backward(grad, weight, mean, rstd, out, row, rows, inner, taps, KIND=5)
    elif kind == 6:
        _backward(grad, unaligned, mean, rstd, out, row, rows, inner, taps, KIND=6)
    else:
        _backward(grad, unaligned, mean, rstd, out, row, rows, inner, taps, KIND=7)
