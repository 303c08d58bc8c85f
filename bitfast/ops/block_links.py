"""A link of a residual block in training: a norm with activation, and the convolutions that read its result.

Everything here is computed without autograd, which sees a whole block as one node
(:mod:`bitfast.ops.residual_block`). A link keeps what its norm reads and that one's statistics. What the
convolutions read is written again in the backward pass, by the kernel that computes the norm's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import select_backend
from bitfast.ops import group_norm_act_gradients as norms
from bitfast.ops.convolution_gradients import (
    add_input_gradient_,
    input_gradient,
    norm_weight_gradient,
    weight_gradient,
)
from bitfast.ops.derivatives import call_without_autograd
from bitfast.ops.group_norm_act_gradients import NormSettings, Statistics
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.norm_convolution_training import norm_convolve
from bitfast.ops.same_padding import OP as SAME_PADDING
from bitfast.ops.same_padding import same_padding
from bitfast.ops.same_padding_cuda import Window
from bitfast.torch_state import is_dispatch_watched


class Convolution(NamedTuple):
    """What determines a convolution besides its filters.

    Attributes:
        geometry: Stride, zeros on each side, and dilation.
        window: Kernel size, stride and dilation, by which the input gets TensorFlow's "same" padding first.
    """

    geometry: Geometry
    window: Window | None = None


class Link(NamedTuple):
    """What determines a link besides its parameters.

    Attributes:
        norm: Of what the convolutions read. None: they read the link's input as it is.
        convolutions: The first computes the branch, a second one the shortcut.
    """

    norm: NormSettings | None
    convolutions: tuple[Convolution, ...]


class Parameters(NamedTuple):
    """The parameters of a link, or other values that belong to them: see ``Form.cut``.

    Attributes:
        norm: The weight and the bias of the norm; none without one.
        filters: The standardized filters of each convolution.
    """

    norm: tuple[Any, ...]
    filters: tuple[Any, ...]


class Made(NamedTuple):
    """What a link computes.

    Attributes:
        total: The link's input, or its sum with the residual.
        statistics: Of ``total``; None without a norm.
        outputs: Of each convolution; the shortcut is added to the first.
        moments: Of the first output's channels, if the kernel has them.
    """

    total: Tensor
    statistics: Statistics | None
    outputs: Sequence[Tensor]
    moments: Tensor | None


class Wanted(NamedTuple):
    """Which gradients of a link are wanted."""

    input: bool
    norm: bool
    filters: tuple[bool, ...]


def forward(
    link: Link,
    parameters: Parameters,
    x: Tensor,
    residual: Tensor | None = None,
    moments: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    keeps_statistics: bool = True,
) -> Made:
    """Compute a link.

    Args:
        link: Its settings.
        parameters: Its parameters.
        x: Shape (N, C, H, W).
        residual: Added to x first; only with a norm. Of the shape and dtype of x.
        moments: Of the channels of x, if they are known.
        shortcut: Added to the first convolution's output.
        keeps_statistics: Whether there is a backward pass.
    """
    if residual is None:
        made = _fused(link, parameters, x, moments, shortcut)
        if made is not None:
            return made
    total, read, statistics = x, x, None
    if link.norm is not None:
        norm = link.norm.of(parameters.norm)
        total, read, statistics = norms.forward(x, residual, norm, keeps_statistics)
    outputs = [
        torch.conv2d(padded(convolution, read), filters, None, *convolution.geometry)
        for convolution, filters in zip(link.convolutions, parameters.filters, strict=True)
    ]
    if shortcut is not None:
        outputs[0] = added_to(outputs[0], shortcut)
    return Made(total, statistics, outputs, None)


def added_to(x: Tensor, other: Tensor) -> Tensor:
    """Return x + other in the memory of x, unless a mode may hold on to x, as selective checkpoints do."""
    return x + other if is_dispatch_watched() else x.add_(other)


def _fused(
    link: Link,
    parameters: Parameters,
    x: Tensor,
    moments: Tensor | None,
    shortcut: Tensor | None,
) -> Made | None:
    """Compute a link by kernels that normalize what they read, where there are such."""
    if x.device.type != "cpu" or any(c.window is not None for c in link.convolutions):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):  # which their results would be
        return None
    norm = None if link.norm is None else link.norm.of(parameters.norm)
    geometries = [convolution.geometry for convolution in link.convolutions]
    made = norm_convolve(x, moments, norm, parameters.filters, geometries, True, shortcut)
    if made is None:
        return None
    statistics = None
    if made.mean is not None and made.rstd is not None:
        statistics = Statistics.of_operator("native", made.mean, made.rstd)
    return Made(x, statistics, made.results, made.moments[0])


def gradients(
    link: Link,
    parameters: Parameters,
    x: Tensor,
    statistics: Statistics | None,
    grads: Sequence[Tensor | None],
    grad_total: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of x, of the norm's parameters and of the filters; None for those not wanted.

    Args:
        link: Its settings.
        parameters: Its parameters.
        x: What the norm read: ``Made.total``.
        statistics: ``Made.statistics``.
        grads: The gradients of the convolutions' outputs; None if no gradient of that convolution is wanted.
        grad_total: The gradient that reached x in another way, which is added; or None.
        wanted: Which gradients.
    """
    grad_filters = _filter_gradients_of_normed(link, parameters, x, statistics, grads, wanted)
    is_missing = [
        is_wanted and found is None
        for is_wanted, found in zip(wanted.filters, grad_filters, strict=True)
    ]
    grad_read = _read_gradient(link, parameters, x, grads) if wanted.input or wanted.norm else None
    grad_x, read = grad_total, x
    grad_norm: list[Tensor | None] = [None] * len(parameters.norm)
    if link.norm is None:
        if grad_read is not None:
            grad_x = grad_read if grad_total is None else grad_read.add_(grad_total)
    elif grad_read is not None:
        assert statistics is not None
        grad_x, grad_weight, grad_bias, result = norms.gradients(
            grad_read, grad_total, x, link.norm.of(parameters.norm), statistics, any(is_missing)
        )
        grad_norm = [grad_weight, grad_bias]
        read = x if result is None else result
    elif any(is_missing):
        _, read, _ = norms.forward(x, None, link.norm.of(parameters.norm), False)
    for number, (convolution, filters, grad) in enumerate(
        zip(link.convolutions, parameters.filters, grads, strict=True)
    ):
        if is_missing[number] and grad is not None:
            grad_filters[number] = weight_gradient(
                padded(convolution, read), grad, filters, convolution.geometry
            )
    return grad_x, grad_norm, grad_filters


def _filter_gradients_of_normed(
    link: Link,
    parameters: Parameters,
    x: Tensor,
    statistics: Statistics | None,
    grads: Sequence[Tensor | None],
    wanted: Wanted,
) -> list[Tensor | None]:
    """Return those gradients of filters that kernels compute which normalize x while they read it."""
    found: list[Tensor | None] = [None] * len(link.convolutions)
    if link.norm is None or statistics is None or x.device.type != "cpu":
        return found
    if not isinstance(statistics.origin, str):
        return found
    mean, rstd = statistics.tensors
    for number, (convolution, filters, grad) in enumerate(
        zip(link.convolutions, parameters.filters, grads, strict=True)
    ):
        if wanted.filters[number] and grad is not None and convolution.window is None:
            norm = link.norm.of(parameters.norm)
            found[number] = norm_weight_gradient(
                x, mean, rstd, norm, grad, filters, convolution.geometry
            )
    return found


def _read_gradient(
    link: Link, parameters: Parameters, x: Tensor, grads: Sequence[Tensor | None]
) -> Tensor:
    """Return the gradient of what the convolutions read, of the shape of x."""
    total: Tensor | None = None
    for convolution, filters, grad in zip(
        link.convolutions, parameters.filters, grads, strict=True
    ):
        assert grad is not None
        if total is None:
            total = input_gradient_of(convolution, filters, grad, x)
        elif convolution.window is None:
            total = add_input_gradient_(total, grad, filters, convolution.geometry)
        else:
            total = total.add_(input_gradient_of(convolution, filters, grad, x))
    assert total is not None
    return total


def input_gradient_of(convolution: Convolution, filters: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x, of which only shape and layout are read, before a convolution's padding."""
    sides = _sides(convolution, x.shape)
    if not any(sides):
        return input_gradient(grad, filters, x.shape, convolution.geometry, like=x)
    images, channels, height, width = x.shape
    top, bottom, left, right = sides
    padded = torch.Size((images, channels, height + top + bottom, width + left + right))
    gradient = input_gradient(grad, filters, padded, convolution.geometry)
    return pad(gradient, [-side for side in sides])


def padded(convolution: Convolution, x: Tensor) -> Tensor:
    """Return x with a convolution's "same" padding."""
    sides = _sides(convolution, x.shape)
    return pad(x, sides) if any(sides) else x


def _sides(convolution: Convolution, shape: torch.Size) -> list[int]:
    """Return (top, bottom, left, right) of the "same" padding."""
    window = convolution.window
    return [0, 0, 0, 0] if window is None else same_padding(shape[2:], *window)


def pad(x: Tensor, sides: list[int]) -> Tensor:
    """Pad x with zeros by (top, bottom, left, right) of them, or crop it by negative numbers."""
    backend = select_backend(SAME_PADDING, x.device.type, x.dtype)
    return call_without_autograd(getattr(torch.ops.bitfast.same_pad, backend), x, sides, 0.0)


def size_after(
    convolution: Convolution, kernel_size: Sequence[int], size: tuple[int, ...]
) -> tuple[int, ...]:
    """Return height and width of a convolution's result, given those of its input."""
    sides = [0, 0, 0, 0] if convolution.window is None else same_padding(size, *convolution.window)
    padded = reference.padded_size(size, sides)
    return tuple(
        (n + 2 * zeros - dilation * (k - 1) - 1) // stride + 1
        for n, k, stride, zeros, dilation in zip(
            padded, kernel_size, *convolution.geometry, strict=True
        )
    )


def composite(link: Link, parameters: Parameters, x: Tensor) -> list[Tensor]:
    """Compute the outputs of a link in plain PyTorch, differentiable to any order."""
    read = x
    if link.norm is not None:
        read = reference.group_norm_act_forward(x, *link.norm.of(parameters.norm))[0]
    outputs = []
    for convolution, filters in zip(link.convolutions, parameters.filters, strict=True):
        padded = read
        if convolution.window is not None:
            padded = reference.same_pad_forward(read, _sides(convolution, x.shape), 0.0)
        outputs.append(torch.conv2d(padded, filters, None, *convolution.geometry))
    return outputs


__all__ = [
    "Convolution",
    "Link",
    "Made",
    "Parameters",
    "Wanted",
    "added_to",
    "composite",
    "forward",
    "gradients",
    "input_gradient_of",
    "pad",
    "padded",
    "size_after",
]
