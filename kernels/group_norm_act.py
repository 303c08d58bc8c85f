"""GroupNorm, activation and the residual sum before them, in Triton: launch shapes and launches.

A program works on some channels of one image: all its pixels ("whole"), or, where the batch alone cannot
fill the device, a range of them ("split"). Channels come in whole groups, so that a program has all it
needs for its statistics; ranges of the same image share them through a table of partial results, which
the next launch merges in a fixed order. There are no atomics: equal inputs give equal bits.

The kernels are in ``group_norm_act_forward`` and ``group_norm_act_backward``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import group_norm_act_backward as backward_kernels
from . import group_norm_act_forward as forward_kernels
from .launch import Device, Launch, ceil_div, device_of, next_power_of_two

# ---- launch shapes --------------------------------------------------------------------------------

TILE_IN_REGISTERS = 16384
"""Elements that a program can keep in registers between their two uses: 32 per thread of 16 warps."""

STREAM_TILE = 8192
"""Elements of a tile that moves over all pixels: 16 per thread, since 32 did not fit in the registers."""

SPLIT_BYTES = 8192
"""Bytes of a tile that moves over a range of the pixels."""

SMALLEST_TILE = 2048
"""Elements up to which an NCHW tile takes in more groups. (For channels_last tiles the row decides.)"""

WIDEST_TILE = 1024
"""Channels of a tile's group, at most. Wider groups are cut into parts."""

MOST_PARTIALS = 256
"""Partial results per image and group, at most: every program of the second launch reads all of them."""


class Tiling(NamedTuple):
    """How one call is cut into programs.

    Attributes:
        is_whole: One launch, each program having all pixels of its channels; else two launches.
        one_tile: Whole, and all the pixels stay in registers.
        programs: Of each launch.
        block_pixels, block_groups, padded, parts: The tile, see ``group_norm_act_tiles``.
        splits, pixels_per_split: How an image's pixels are shared out, if not whole.
        warps: Per program.
        is_wide: Offsets within an image need 64 bits.
    """

    is_whole: bool
    one_tile: bool
    programs: int
    block_pixels: int
    block_groups: int
    padded: int
    parts: int
    splits: int
    pixels_per_split: int
    warps: int
    is_wide: bool


def choose_tiling(
    batch: int,
    pixels: int,
    channels: int,
    groups: int,
    itemsize: int,
    is_channels_last: bool,
    tensors: int,
    device: Device,
) -> Tiling:
    """Choose the launch shapes. Equal arguments give equal shapes: nothing is tried out at run time.

    1. A row of a channels_last tile is 128 bytes, or one group if that is wider. It is halved while there
       are fewer programs than multiprocessors, down to a memory sector of 32 bytes. It is halved to 64
       bytes if all pixels then fit in registers, or if the tensors exceed half of the L2 cache.
    2. Where all pixels fit in registers, one launch reads everything once.
    3. Else, where the tensors exceed half of the L2 cache, one launch of so few programs that what they
       are at work on stays in that half for the second reading. (They must still fill half the device.)
    4. Else two launches, an image's pixels being shared out among programs until there are four for
       each multiprocessor.

    Args:
        batch: Images, at least 1.
        pixels: Height times width.
        channels: Divisible by ``groups``.
        groups: In which the channels are normalized.
        itemsize: Bytes per element.
        is_channels_last: Else contiguous NCHW.
        tensors: How many tensors are read twice: 1 forward, 2 backward.
        device: The GPU to fill with programs.
    """
    per_group = channels // groups
    padded = min(next_power_of_two(per_group), WIDEST_TILE)
    parts = ceil_div(per_group, padded)
    registers = TILE_IN_REGISTERS // tensors
    all_pixels = next_power_of_two(pixels)
    cache = device.l2_bytes // 2
    exceeds_cache = batch * pixels * channels * itemsize * tensors > cache

    def programs(block_groups: int) -> int:
        return batch * ceil_div(groups, block_groups) * parts

    def fits_in_registers(block_groups: int) -> bool:
        return parts == 1 and all_pixels * block_groups * padded <= registers

    block_groups, most = 1, next_power_of_two(groups) if parts == 1 else 1
    if is_channels_last:
        row, half_row, sector = (max(n // itemsize // padded, 1) for n in (128, 64, 32))
        block_groups = min(row, most)
        while block_groups > sector and programs(block_groups) < device.multiprocessors:
            block_groups //= 2
        if not fits_in_registers(block_groups) and (fits_in_registers(half_row) or exceeds_cache):
            block_groups = min(block_groups, half_row)
    else:
        while block_groups < most and 2 * block_groups * padded * all_pixels <= SMALLEST_TILE:
            block_groups *= 2

    block_channels = block_groups * padded
    items = programs(block_groups)
    one_tile = fits_in_registers(block_groups)
    at_work = min(cache // (pixels * block_channels * itemsize * tensors), items)
    streams = parts == 1 and exceeds_cache and at_work >= device.multiprocessors // 2
    is_whole = one_tile or streams
    if one_tile:
        block_pixels = all_pixels
        warps = warps_for(all_pixels * block_channels)
    else:
        tile = STREAM_TILE if is_whole else SPLIT_BYTES // itemsize
        block_pixels = max(min(all_pixels, tile // block_channels), 1)
        warps = 16 if is_whole else 8

    splits, pixels_per_split = 1, pixels
    if not is_whole:
        wanted = ceil_div(4 * device.multiprocessors, items)
        splits = min(wanted, max(MOST_PARTIALS // parts, 1), ceil_div(pixels, block_pixels))
        pixels_per_split = ceil_div(ceil_div(pixels, splits), block_pixels) * block_pixels
        splits = ceil_div(pixels, pixels_per_split)
    return Tiling(
        is_whole,
        one_tile,
        items if one_tile else at_work if streams else items * splits,
        block_pixels,
        block_groups,
        padded,
        parts,
        splits,
        pixels_per_split,
        warps,
        is_wide(pixels, channels, block_pixels, block_channels),
    )


def warps_for(elements: int) -> int:
    """Return how many warps hold ``elements`` in registers, with at most 32 per thread."""
    return min(max(next_power_of_two(ceil_div(elements, 32 * 32)), 4), 16)


def is_wide(pixels: int, channels: int, block_pixels: int, block_channels: int) -> bool:
    """Whether an offset within an image, masked ones included, may need more than 32 bits.

    (The offset of the image itself always has 64.)
    """
    return (pixels + block_pixels) * (channels + block_channels) >= 2**31


# ---- launches -------------------------------------------------------------------------------------


def _tiling_for(
    x: Tensor, groups: int, is_channels_last: bool, tensors: int, device: Device | None
) -> Tiling:
    batch, channels, height, width = x.shape
    return choose_tiling(
        batch,
        height * width,
        channels,
        groups,
        x.element_size(),
        is_channels_last,
        tensors,
        device or device_of(x.device),
    )


def _constants(p: Tiling, x: Tensor, groups: int, is_channels_last: bool) -> dict[str, int | bool]:
    return {
        "GROUPS": groups,
        "PER_GROUP": x.shape[1] // groups,
        "CHANNELS_LAST": is_channels_last,
        "WIDE": p.is_wide,
        "BLOCK_P": p.block_pixels,
        "BLOCK_G": p.block_groups,
        "PADDED": p.padded,
    }


def forward_launches(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    is_channels_last: bool,
    *,
    total: Tensor | None,
    result: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    groups: int | None = None,
    device: Device | None = None,
) -> list[Launch]:
    """Return the launches that fill ``total`` (x + residual), ``result``, ``mean`` and ``rstd``.

    ``result`` may be x or the residual, and ``total`` may be x or the residual, whatever the tiling, if they
    are the same tensor objects. Other outputs must not share memory with anything.

    Args:
        x, residual, total, result: (N, C, H, W), dense in one layout, of one dtype; ``residual`` and
            ``total`` may both be missing.
        weight, bias: (C,), contiguous.
        eps, activation: As in the op.
        is_channels_last: The layout; else NCHW.
        mean, rstd: (N, groups), float32. Without them, statistics are not stored.
        groups: Needed only without the statistics.
        device: The GPU to fill with programs; by default the one that x is on.

    Raises:
        ValueError: ``result`` is ``total``; neither statistics nor groups, or only one of the statistics.
    """
    keeps_statistics = mean is not None
    if keeps_statistics != (rstd is not None) or (mean is None and groups is None):
        raise ValueError("mean and rstd, or groups, must be given")
    if result is total:
        # Both would be stored to one address, maybe by two threads, in either order.
        raise ValueError("result must not take the place of total, which it is computed from")
    batch, _, height, width = x.shape
    if batch == 0:
        return []
    groups, pixels = mean.shape[1] if mean is not None else groups, height * width
    p = _tiling_for(x, groups, is_channels_last, 1, device)
    constants = _constants(p, x, groups, is_channels_last)
    has_residual = residual is not None
    sum_in_place = has_residual and (total is x or total is residual)
    # Missing tensors are never read, but the kernels need some pointer.
    inputs = {"x": x, "residual": residual if has_residual else x}
    outputs = {
        "result": result,
        "mean": mean if keeps_statistics else x,
        "rstd": rstd if keeps_statistics else x,
    }
    tensor = x.numel() * x.element_size()
    first_reads, first_writes = (2 * tensor, tensor) if has_residual else (tensor, 0)
    if p.is_whole:
        arguments = {
            **inputs,
            "total": total if has_residual else x,
            "weight": weight,
            "bias": bias,
            **outputs,
            "images": batch,
            "pixels": pixels,
            "eps": eps,
        }
        constants |= {
            "ACTIVATION": activation, "HAS_RESIDUAL": has_residual, "SUM_IN_PLACE": sum_in_place,
            "KEEPS_STATISTICS": keeps_statistics, "ONE_TILE": p.one_tile,
        }  # fmt: skip
        kernel = forward_kernels.forward_kernel
        return [
            Launch(
                kernel,
                p.programs,
                arguments,
                constants,
                p.warps,
                first_reads,
                first_writes + tensor,
            )
        ]
    partials = _buffers(x, (batch, p.splits * p.parts, groups), "partial_mean", "partial_squares")
    ranges = {"pixels": pixels, "pixels_per_split": p.pixels_per_split, "splits": p.splits}
    constants["PARTS"] = p.parts
    moments = Launch(
        forward_kernels.moments_kernel,
        p.programs,
        {**inputs, "total": total if has_residual else x, **partials, **ranges},
        {**constants, "HAS_RESIDUAL": has_residual, "SUM_IN_PLACE": sum_in_place},
        p.warps,
        first_reads,
        first_writes + _nbytes(partials),
    )
    apply = Launch(
        forward_kernels.apply_kernel,
        p.programs,
        {
            "total": total if has_residual else x,
            "weight": weight,
            "bias": bias,
            **partials,
            **outputs,
            **ranges,
            "eps": eps,
        },
        {
            **constants,
            "ACTIVATION": activation,
            "KEEPS_STATISTICS": keeps_statistics,
            "TABLE": next_power_of_two(p.splits * p.parts),
        },
        p.warps,
        tensor + _nbytes(partials),
        tensor,
    )
    return [moments, apply]


def backward_launches(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    is_channels_last: bool,
    *,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    device: Device | None = None,
) -> list[Launch]:
    """Return the launches that fill the gradients.

    Args:
        grad: The gradient of the result; dense in the layout of x.
        grad_total: The gradient that reached x directly, which is added; in the same layout, or None.
        x: The tensor that was normalized: with a residual, the sum.
        weight, bias, mean, rstd, activation, is_channels_last: As in the forward launches.
        grad_x, grad_weight, grad_bias: To fill, in the dtypes of x, weight and bias.
        device: The GPU to fill with programs; by default the one that x is on.
    """
    batch, channels, height, width = x.shape
    groups, pixels = mean.shape[1], height * width
    if batch == 0:
        nothing = _buffers(x, (0, channels), "channel_d", "channel_dh")
        return [_parameter_launch(nothing, grad_weight, grad_bias)]
    p = _tiling_for(x, groups, is_channels_last, 2, device)
    constants = {**_constants(p, x, groups, is_channels_last), "ACTIVATION": activation}
    has_grad_total = grad_total is not None
    sums = _buffers(x, (batch * p.splits, channels), "channel_d", "channel_dh")
    norm = {"weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    gradients = {"grad": grad, "grad_total": grad_total if has_grad_total else grad}
    tensor = x.numel() * x.element_size()
    last = _parameter_launch(sums, grad_weight, grad_bias)
    if p.is_whole:
        whole = Launch(
            backward_kernels.backward_kernel,
            p.programs,
            {
                **gradients,
                "x": x,
                **norm,
                "grad_x": grad_x,
                **sums,
                "images": batch,
                "pixels": pixels,
            },
            {**constants, "HAS_GRAD_TOTAL": has_grad_total, "ONE_TILE": p.one_tile},
            p.warps,
            (2 + has_grad_total) * tensor,
            tensor + _nbytes(sums),
        )
        return [whole, last]
    partials = _buffers(x, (batch, p.splits * p.parts, groups), "partial_d", "partial_dh")
    ranges = {"pixels": pixels, "pixels_per_split": p.pixels_per_split, "splits": p.splits}
    constants["PARTS"] = p.parts
    first = Launch(
        backward_kernels.backward_sums_kernel,
        p.programs,
        {"grad": grad, "x": x, **norm, **sums, **partials, **ranges},
        constants,
        p.warps,
        2 * tensor,
        _nbytes(sums) + _nbytes(partials),
    )
    second = Launch(
        backward_kernels.backward_apply_kernel,
        p.programs,
        {**gradients, "x": x, **norm, **partials, "grad_x": grad_x, **ranges},
        {
            **constants,
            "HAS_GRAD_TOTAL": has_grad_total,
            "TABLE": next_power_of_two(p.splits * p.parts),
        },
        p.warps,
        (2 + has_grad_total) * tensor + _nbytes(partials),
        tensor,
    )
    return [first, second, last]


def _parameter_launch(sums: dict[str, Tensor], grad_weight: Tensor, grad_bias: Tensor) -> Launch:
    rows, channels = sums["channel_d"].shape
    block_channels = 32
    return Launch(
        backward_kernels.parameter_gradients_kernel,
        ceil_div(channels, block_channels),
        {**sums, "grad_weight": grad_weight, "grad_bias": grad_bias, "rows": rows},
        {"C": channels, "BLOCK_R": 64, "BLOCK_C": block_channels},
        4,
        _nbytes(sums),
        grad_weight.nbytes + grad_bias.nbytes,
    )


def _buffers(x: Tensor, shape: tuple[int, ...], *names: str) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=torch.float32, device=x.device) for name in names}


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
