"""GroupNorm, activation and the residual sum before them, in Triton: launches.

A program works on some channels of one image: all its pixels ("whole"), or, where registers cannot keep
these, a range of them ("split"). Channels come in whole groups, so that a program has all it needs for its
statistics; ranges of the same image share them through a table of partial results, which the next launch
merges in a fixed order. There are no atomics: equal inputs give equal bits.

The kernels are in ``group_norm_act_forward`` and ``group_norm_act_backward``, the launch shapes in
``group_norm_act_tiling``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import group_norm_act_backward as backward_kernels
from . import group_norm_act_forward as forward_kernels
from . import group_norm_act_tiling
from .group_norm_act_tiling import Tiling, choose_tiling
from .launch import Device, Launch, ceil_div, device_of, next_power_of_two

# ---- launches -------------------------------------------------------------------------------------


def _tiling_for(
    x: Tensor,
    groups: int,
    activation: str,
    is_channels_last: bool,
    tensors: int,
    device: Device | None,
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
        # The error function takes 40 registers.
        group_norm_act_tiling.KEPT_VECTORS // (2 if activation == "gelu" else 1),
    )


def _constants(p: Tiling, x: Tensor, groups: int, is_channels_last: bool) -> dict[str, int | bool]:
    return {
        "GROUPS": groups,
        "PER_GROUP": x.shape[1] // groups,
        "CHANNELS_LAST": is_channels_last,
        "WIDE": p.is_wide,
        "CHUNKS": p.chunks,
        "BLOCK_P": p.block_pixels,
        "BLOCK_G": p.block_groups,
        "PADDED": p.padded,
    }


def _is_packed(x: Tensor) -> bool:
    """Whether kept numbers stay two to a register, which takes PTX code; see ``as_float32``."""
    is_interpreted = not isinstance(forward_kernels.forward_kernel, JITFunction)
    return x.element_size() == 2 and not is_interpreted and torch.version.hip is None


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
    p = _tiling_for(x, groups, activation, is_channels_last, 1, device)
    constants = _constants(p, x, groups, is_channels_last)
    has_residual = residual is not None
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
            "pixels": pixels,
            "eps": eps,
        }
        constants |= {
            "ACTIVATION": activation, "HAS_RESIDUAL": has_residual,
            "PACKED": _is_packed(x),
            "KEEPS_STATISTICS": keeps_statistics,
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
        {**constants, "HAS_RESIDUAL": has_residual},
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
    result: Tensor | None = None,
    device: Device | None = None,
) -> list[Launch]:
    """Return the launches that fill the gradients, and ``result`` if that is given.

    Args:
        grad: The gradient of the result; dense in the layout of x.
        grad_total: The gradient that reached x directly, which is added; in the same layout, or None.
        x: The tensor that was normalized: with a residual, the sum.
        weight, bias, mean, rstd, activation, is_channels_last: As in the forward launches.
        grad_x, grad_weight, grad_bias: To fill, in the dtypes of x, weight and bias.
        result: To fill with what the forward launches gave for x; like x.
        device: The GPU to fill with programs; by default the one that x is on.
    """
    batch, channels, height, width = x.shape
    groups, pixels = mean.shape[1], height * width
    if batch == 0:
        nothing = _buffers(x, (0, channels), "channel_d", "channel_dh")
        return [_parameter_launch(nothing, grad_weight, grad_bias)]
    p = _tiling_for(x, groups, activation, is_channels_last, 2, device)
    constants = {**_constants(p, x, groups, is_channels_last), "ACTIVATION": activation}
    has_grad_total = grad_total is not None
    sums = _buffers(x, (batch * p.splits, channels), "channel_d", "channel_dh")
    norm = {"weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    gradients = {"grad": grad, "grad_total": grad_total if has_grad_total else grad}
    written = {"grad_x": grad_x, "result": grad_x if result is None else result}
    flags = {"HAS_GRAD_TOTAL": has_grad_total, "RECOMPUTES": result is not None}
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
                **written,
                **sums,
                "pixels": pixels,
            },
            {**constants, **flags, "PACKED": _is_packed(x)},
            p.warps,
            (2 + has_grad_total) * tensor,
            (1 + flags["RECOMPUTES"]) * tensor + _nbytes(sums),
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
        {**gradients, "x": x, **norm, **partials, **written, **ranges},
        {**constants, **flags, "TABLE": next_power_of_two(p.splits * p.parts)},
        p.warps,
        (2 + has_grad_total) * tensor + _nbytes(partials),
        (1 + flags["RECOMPUTES"]) * tensor,
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
