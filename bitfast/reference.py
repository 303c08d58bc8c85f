"""The oracle of every op: plain, differentiable PyTorch, right in any floating dtype.

These functions define what the ops mean. Kernels are tested against them in float64, and where there is no
kernel for a tensor they are used themselves. Each follows its input's memory format: channels_last
in, channels_last out; everything else comes back contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.activations import ACTIVATION_GRADIENTS, ACTIVATIONS
from bitfast.memory_format import format_for, is_channels_last, laid_out, memory_format_of
from bitfast.torch_state import is_in_forward_mode

# ---- weight_standardization ---------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics for data of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_standardization_forward(
    weight: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Standardize each output filter; return (result, mean, rstd), the statistics of shape (out,).

    Not by torch's batch norm, whose channels could be the filters: its third derivative is wrong, because
    its second one takes the statistics for constants.
    """
    flat = weight.flatten(1).to(compute_dtype(weight.dtype))
    variance, mean = torch.var_mean(flat, dim=1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    result = (flat - mean[:, None]) * rstd[:, None]
    result = result.to(dtype or weight.dtype).view(weight.shape)
    return laid_out(result, memory_format_of(weight)), mean, rstd


def weight_standardization_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Return dL/dweight from grad = dL/dresult and the statistics that the forward returned.

    With w the weight and h = (w - mean) rstd its standardized form:
    dw = rstd (dh - mean(dh) - h mean(dh h)), the means over one filter.
    """
    flat = weight.flatten(1).to(mean.dtype)
    grad_flat = grad.flatten(1).to(mean.dtype)
    standardized = (flat - mean[:, None]) * rstd[:, None]
    grad_mean = grad_flat.mean(dim=1, keepdim=True)
    projection = (grad_flat * standardized).mean(dim=1, keepdim=True)
    result = rstd[:, None] * (grad_flat - grad_mean - standardized * projection)
    result = result.to(weight.dtype).view(weight.shape)
    return laid_out(result, memory_format_of(weight))


# ---- group_norm_act -----------------------------------------------------------------------------


def group_norm_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize groups of channels, scale, shift and activate; return (result, mean, rstd).

    The statistics have shape (N, num_groups). torch's own GroupNorm is used for contiguous tensors. For
    channels_last ones it squares before it subtracts on the CPU (an error of 1e-2 where the mean is
    100 times the standard deviation) and changes the layout on older GPUs, so those are computed here;
    so is what is differentiated in forward mode, for which its backward pass has no formula.
    """
    if is_channels_last(x) or is_in_forward_mode():
        normalized, mean, rstd = _group_norm_channels_last(x, weight, bias, num_groups, eps)
        normalized = laid_out(normalized, memory_format_of(x))
    else:
        batch, channels, height, width = x.shape
        normalized, mean, rstd = torch.native_group_norm(
            x.contiguous(), weight.to(x.dtype), bias.to(x.dtype),
            batch, channels, height * width, num_groups, eps,
        )  # fmt: skip
        mean, rstd = mean.to(compute_dtype(x.dtype)), rstd.to(compute_dtype(x.dtype))
    return ACTIVATIONS[activation](normalized), mean, rstd


def _group_norm_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Computed in the order of memory, so that autograd's gradients are channels_last too.
    dtype = compute_dtype(x.dtype)
    groups = x.permute(0, 2, 3, 1).unflatten(3, (num_groups, -1)).to(dtype)
    mean = _group_mean(groups)
    centered = groups - mean
    # The rounding error of the mean, which matters where the mean is 100 standard deviations.
    left_over = _group_mean(centered)
    centered = centered - left_over
    # Not torch.var, which takes several times as long on the CPU.
    rstd = torch.rsqrt(_group_mean(centered.square()) + eps)
    scale, shift = (p.to(dtype).unflatten(0, (num_groups, -1)) for p in (weight, bias))
    normalized = torch.addcmul(shift, centered, rstd * scale)
    result = normalized.to(x.dtype).flatten(3).permute(0, 3, 1, 2)
    return result, (mean + left_over).view(-1, num_groups), rstd.view(-1, num_groups)


def _group_mean(x: Tensor) -> Tensor:
    """Average (N, H, W, groups, channels) over all but images and groups.

    In two steps, because torch's CPU sum over both at once adds pixel to pixel and loses digits.
    """
    return x.mean(dim=(1, 2), keepdim=True).mean(dim=4, keepdim=True)


def _per_channel(statistic: Tensor, channels_per_group: int) -> Tensor:
    """Repeat a statistic of shape (N, groups) for each channel: (N, channels, 1, 1)."""
    return statistic.repeat_interleave(channels_per_group, dim=1)[:, :, None, None]


def add_group_norm_act_forward(
    x: Tensor, residual: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the residual and normalize the sum; return (sum, result, mean, rstd)."""
    total = laid_out(x + residual, memory_format_of(x))
    return total, *group_norm_act_forward(total, *arguments)


def group_norm_act_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dL/dx, dL/dweight, dL/dbias) from grad = dL/dresult and the forward's statistics.

    The activation is recomputed from x and the statistics, so that none has to be stored. With
    h = (x - mean) rstd and g = dL/dh: dx = rstd (g - mean(g) - h mean(g h)), the means over one group.
    ``grad_total``, if given, is the gradient that reached x directly; it is added to dx.
    """
    dtype = compute_dtype(x.dtype)
    scale = weight.to(dtype).view(1, -1, 1, 1)
    normalized, before = _normalized_again(x, weight, bias, mean, rstd)
    grad_before = ACTIVATION_GRADIENTS[activation](grad.to(dtype), before)
    grad_weight = (grad_before * normalized).sum(dim=(0, 2, 3))
    grad_bias = grad_before.sum(dim=(0, 2, 3))
    g = (grad_before * scale).unflatten(1, (num_groups, -1))
    h = normalized.unflatten(1, (num_groups, -1))
    group_dims = (2, 3, 4)
    g_mean, projection = (v.mean(dim=group_dims, keepdim=True) for v in (g, g * h))
    grad_x = (g - g_mean - h * projection).flatten(1, 2)
    grad_x = grad_x * _per_channel(rstd.to(dtype), x.shape[1] // num_groups)
    if grad_total is not None:
        grad_x = grad_x + grad_total
    grad_x = laid_out(grad_x.to(x.dtype), memory_format_of(x))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _normalized_again(
    x: Tensor, weight: Tensor, bias: Tensor, *statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x normalized with the forward's mean and 1/std, and that scaled and shifted."""
    dtype = compute_dtype(x.dtype)
    mean, rstd = (_per_channel(s.to(dtype), x.shape[1] // s.shape[1]) for s in statistics)
    normalized = (x.to(dtype) - mean) * rstd
    scale, shift = (p.to(dtype).view(1, -1, 1, 1) for p in (weight, bias))
    return normalized, normalized * scale + shift


def group_norm_act_recompute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`group_norm_act_backward` returns, and what the forward returned for x."""
    x, activation = arguments[2], arguments[-1]
    result = ACTIVATIONS[activation](_normalized_again(*arguments[2:7])[1])
    result = laid_out(result.to(x.dtype), memory_format_of(x))
    return *group_norm_act_backward(*arguments), result


# ---- same_padding ---------------------------------------------------------------------------------

Ints = list[int] | tuple[int, ...]
"""Two sizes (height, width), or four sides (top, bottom, left, right)."""


def padded_size(size: Ints, padding: Ints) -> tuple[int, int]:
    """Return (height, width) after padding by (top, bottom, left, right)."""
    height, width = size
    top, bottom, left, right = padding
    return height + top + bottom, width + left + right


def pooled_size(
    size: Ints,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
) -> tuple[int, int]:
    """Return (height, width) after padding and pooling."""
    height, width = (
        (n - (k - 1) * d - 1) // s + 1
        for n, k, s, d in zip(
            padded_size(size, padding), kernel_size, stride, dilation, strict=True
        )
    )
    return height, width


def dtype_of_taps(kernel_size: Ints) -> torch.dtype:
    """Return the dtype of the numbers of a window's pixels."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int16


def same_pad_forward(x: Tensor, padding: Ints, value: float) -> Tensor:
    """Pad by (top, bottom, left, right), where negative numbers crop."""
    top, bottom, left, right = padding
    result = F.pad(x, (left, right, top, bottom), value=value)
    return laid_out(result, memory_format_of(x))


def same_max_pool(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
    value: float,
) -> Tensor:
    """Pad, then take the maximum of each window."""
    padded = same_pad_forward(x, padding, value)
    result = F.max_pool2d(padded, kernel_size, stride, 0, dilation)
    return laid_out(result, memory_format_of(x))


def same_max_pool_forward(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
    value: float,
    with_taps: bool,
) -> tuple[Tensor, Tensor]:
    """Pad and pool; also return the number, within its window, of the pixel that was the maximum."""
    if not with_taps:
        result = same_max_pool(x, kernel_size, stride, dilation, padding, value)
        return result, x.new_empty((0,), dtype=dtype_of_taps(kernel_size))
    memory_format = memory_format_of(x)
    padded = same_pad_forward(x, padding, value)
    result, index = F.max_pool2d(padded, kernel_size, stride, 0, dilation, return_indices=True)
    row, column = _window_starts(result, stride)
    from_row = index // padded.shape[3] - row
    from_column = index % padded.shape[3] - column
    taps = from_row // dilation[0] * kernel_size[1] + from_column // dilation[1]
    # Of windows of nothing but -inf, CUDA names the first pixel of the image, which may not be theirs.
    taps = torch.where((from_row < 0) | (from_column < 0), 0, taps).to(dtype_of_taps(kernel_size))
    return (
        laid_out(result, memory_format),
        laid_out(taps, memory_format),
    )


def same_max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    size: Ints,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
) -> Tensor:
    """Add each gradient to the pixel that its maximum came from; drop what falls into the padding.

    Also dropped is the gradient of a tap that no pixel of the window has: it would lie outside of the memory.

    Raises:
        ValueError: ``taps`` are not of an input of this size.
    """
    pooled = pooled_size(size, kernel_size, stride, dilation, padding)
    if tuple(taps.shape[2:]) != pooled:
        raise ValueError(
            f"same_padding: taps must have height and width {pooled} for an input of size {tuple(size)},"
            f" got {tuple(taps.shape[2:])}"
        )
    height, width = padded_size(size, padding)
    memory_format = memory_format_of(taps)
    row, column = _window_starts(taps, stride)
    taps = taps.long()  # 256 itself is no uint8
    is_tap = (taps >= 0) & (taps < kernel_size[0] * kernel_size[1])
    tap = torch.where(is_tap, taps, 0)
    row = row + tap // kernel_size[1] * dilation[0]
    column = column + tap % kernel_size[1] * dilation[1]
    grad = torch.where(is_tap, grad, 0)
    padded = grad.new_zeros((*taps.shape[:2], height * width), dtype=compute_dtype(grad.dtype))
    index = (row * width + column).flatten(2)
    # Not flatten and unflatten, which gradients in batches (is_grads_batched=True) do not have.
    flat = grad.reshape(index.shape).to(padded.dtype)
    result = padded.scatter_add(2, index, flat).view(*taps.shape[:2], height, width)
    result = F.pad(result, [-side for side in (*padding[2:], *padding[:2])])
    return laid_out(result.to(grad.dtype), memory_format)


def _window_starts(pooled: Tensor, stride: Ints) -> tuple[Tensor, Tensor]:
    """Return the first row and the first column of each window, to broadcast over a pooled tensor."""
    row, column = (
        torch.arange(n, device=pooled.device) * s
        for n, s in zip(pooled.shape[2:], stride, strict=True)
    )
    return row[:, None], column


# ---- stem ---------------------------------------------------------------------------------------

STEM_KERNEL, STEM_POOL = 7, 3
"""Height and width of the stem's filters and of its pooling window. The stride of both is 2."""


def stem_size(size: Ints, padding: Ints, pool_padding: Ints | None) -> tuple[int, int]:
    """Return (height, width) of what the stem makes of images of this size."""
    for kernel, sides in ((STEM_KERNEL, padding), (STEM_POOL, pool_padding)):
        if sides is not None:
            size = pooled_size(size, (kernel, kernel), (2, 2), (1, 1), sides)
    height, width = size
    return height, width


def stem_forward(
    images: Tensor, filters: Tensor, padding: Ints, pool_padding: Ints | None
) -> Tensor:
    """Convolve images, rounded to the dtype of the filters, with stride 2; pad with zeros and max-pool.

    ``filters`` have shape (out, 7, 8, 4): the last channel is not theirs, and neither is the first of the eight
    pixels if the padding on the left is odd, else the last. The result is channels_last.
    """
    first = padding[2] % 2
    weight = filters[:, :, first : first + STEM_KERNEL, :3].permute(0, 3, 1, 2)
    result = F.conv2d(same_pad_forward(images.to(filters.dtype), padding, 0.0), weight, stride=2)
    if pool_padding is not None:
        result = F.max_pool2d(same_pad_forward(result, pool_padding, 0.0), STEM_POOL, 2)
    return result.contiguous(memory_format=torch.channels_last)


# ---- resize_normalize ---------------------------------------------------------------------------

PRECISION_BITS = 32 - 8 - 2
"""Fractional bits of the integer filter weights that Pillow uses for 8-bit images."""


def _bicubic(x: Tensor) -> Tensor:
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _sine(x: Tensor) -> Tensor:
    """sin(x), rounded as the C library rounds it; torch's vectorised sine may differ in the last bit."""
    return x.new_tensor([math.sin(v) for v in x.flatten().tolist()]).view(x.shape)


def _cosine(x: Tensor) -> Tensor:
    return x.new_tensor([math.cos(v) for v in x.flatten().tolist()]).view(x.shape)


def _sinc(x: Tensor) -> Tensor:
    x = x * math.pi
    return torch.where(x == 0, 1.0, _sine(x) / x)


def _hamming(x: Tensor) -> Tensor:
    # Pillow writes the two constants in single precision, where they do not add up to 1.
    a, b = (torch.tensor(v, dtype=torch.float32).item() for v in (0.54, 0.46))
    window = torch.where(x == 0, 1.0, a + b * _cosine(x * math.pi))
    return torch.where(x < 1.0, _sinc(x) * window, 0.0)


RESAMPLING_FILTERS: dict[int, tuple[float, Callable[[Tensor], Tensor]]] = {
    1: (3.0, lambda x: torch.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)),
    2: (1.0, lambda x: (1.0 - x.abs()).clamp_min(0.0)),
    3: (2.0, lambda x: _bicubic(x.abs())),
    4: (0.5, lambda x: torch.where((x > -0.5) & (x <= 0.5), 1.0, 0.0).to(x.dtype)),
    5: (1.0, lambda x: _hamming(x.abs())),
}
"""Support and kernel of Pillow's filters LANCZOS, BILINEAR, BICUBIC, BOX and HAMMING, by number."""

NEAREST = 0
"""The number of Pillow's filter that copies pixels."""


def resampling_weights(in_size: int, out_size: int, resample: int) -> tuple[Tensor, Tensor]:
    """Return (index, weight), each (taps, out_size): the input pixels of each output pixel, and their weights.

    The weights are float64, sum to 1 over the taps and round as Pillow's do, which takes the same
    operations in the same order. A tap that an output pixel does not need has weight 0.
    """
    support, kernel = RESAMPLING_FILTERS[resample]
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support *= filter_scale
    center = (torch.arange(out_size, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).trunc().clamp_min(0)
    last = (center + support + 0.5).trunc().clamp_max(in_size)
    tap = torch.arange(int((last - first).max()), dtype=torch.float64)[:, None]
    weight = kernel((tap + first - center + 0.5) * (1.0 / filter_scale))
    weight = torch.where(first + tap < last, weight, 0.0)
    total = torch.zeros_like(center)
    for row in weight:
        total += row
    weight = torch.where(total != 0.0, weight / total, weight)
    return (first + tap).clamp_max(in_size - 1).long(), weight


def _nearest_index(in_size: int, out_size: int) -> Tensor:
    """Return the input pixel of each output pixel. Positions advance by repeated addition, as Pillow's do."""
    scale = in_size / out_size
    positions = itertools.accumulate(itertools.repeat(scale, out_size - 1), initial=scale * 0.5)
    return torch.tensor([min(int(p), in_size - 1) for p in positions])


def _resample_axis(image: Tensor, axis: int, out_size: int, resample: int) -> Tensor:
    """Resample one axis of a (C, H, W) image, uint8 or floating, to ``out_size``."""
    in_size = image.shape[axis]
    if out_size == in_size:
        return image
    if resample == NEAREST:
        return image.index_select(axis, _nearest_index(in_size, out_size).to(image.device))
    index, weight = resampling_weights(in_size, out_size, resample)
    integer = image.dtype == torch.uint8
    if integer:  # round halves away from zero
        scaled = weight * (1 << PRECISION_BITS)
        weight = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().to(torch.int32)
    index, weight = index.to(image.device), weight.to(image.device)
    weight = weight[:, None, :, None] if axis == 1 else weight[:, None, None, :]
    total = torch.zeros((), dtype=weight.dtype, device=image.device)
    for tap_index, tap_weight in zip(index, weight, strict=True):
        total = total + image.index_select(axis, tap_index) * tap_weight
    if integer:
        total = ((total + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS).clamp(0, 255)
    return total.to(image.dtype)


def _crop(image: Tensor, height: int, width: int, top: int, left: int) -> Tensor:
    """Cut a window out of a (C, H, W) image; zeros stand where it leaves the image."""
    result = image.new_zeros((image.shape[0], height, width))
    source, target = [slice(None)], [slice(None)]
    for have, want, offset in zip(image.shape[1:], (height, width), (top, left), strict=True):
        first, last = max(offset, 0), max(min(offset + want, have), 0)
        source.append(slice(first, last))
        target.append(slice(first - offset, max(last, first) - offset))
    result[tuple(target)] = image[tuple(source)]
    return result


def resize_normalize_forward(
    images: list[Tensor],
    sizes: list[int],
    crop: list[int],
    offsets: list[int],
    resample: int,
    rescale_factors: list[float],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    first_axes: list[int],
) -> Tensor:
    """Resize, crop, rescale and normalize (H, W, C) images of any sizes into one (N, C, H, W) batch.

    ``sizes`` holds (height, width) after resizing of one image after another, ``offsets`` (top, left) of
    the window that ``crop`` is the size of, ``first_axes`` the axis that is resampled first, 0 (height)
    or 1 (width): the second pass reads what the first one rounded and clipped, so the order shows.
    Integers are resampled in Pillow's integer arithmetic; floating pixels as Pillow's mode "F": in
    float64, and stored between the two passes. Each product with one of ``rescale_factors`` is rounded
    once, from float64.
    """
    batch = []
    for i, image in enumerate(images):
        pixels = image.permute(2, 0, 1)
        if pixels.is_floating_point():
            pixels = pixels.to(compute_dtype(pixels.dtype))
        passes = [(1, sizes[2 * i]), (2, sizes[2 * i + 1])]
        if first_axes[i] == 1:
            passes.reverse()
        for axis, out_size in passes:
            pixels = _resample_axis(pixels, axis, out_size, resample)
        batch.append(_crop(pixels, *crop, *offsets[2 * i : 2 * i + 2]))
    result = torch.stack(batch)
    for factor in rescale_factors:
        result = (result.double() * factor).to(compute_dtype(dtype))
    if mean:
        result = result.to(compute_dtype(dtype))
        shape = (1, -1, 1, 1)
        result = (result - result.new_tensor(mean).view(shape)) / result.new_tensor(std).view(shape)
    return result.to(dtype).contiguous(memory_format=format_for(channels_last))
