"""The gradients of a convolution, in plain functions: for backward passes that are written by hand.

On CPUs with AVX-512 kernels of bitfast compute those that they compute faster than torch does, as
:func:`_has_input_kernel` and :func:`_way_of` say. The gradient of the input is a convolution itself, of the
gradient with the filters turned round (Dumoulin & Visin, "A guide to convolution arithmetic for deep learning",
2016, https://arxiv.org/abs/1603.07285). That of the weight is a product of matrices for each place in the
filter, summed over pixels; for 3x3 filters in float32, over squares of 2x2 pixels, with 16 products instead of
36: Winograd's convolution (see ``norm_convolution``), transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfast import extension
from bitfast.memory_format import memory_format_of
from bitfast.ops.derivatives import call_without_autograd, refuse_derivatives
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.norm_convolution import (
    NO_NORM,
    SMALLEST_3X3,
    WIDEST_3X3_IN_TRAINING,
    Norm,
    has_kernel_for,
    may_train,
    packed_weight,
)

OP = "convolution_weight_gradient"

FEWEST_CHANNELS = 16
"""Of the input of a convolution whose weight's gradient a kernel of ours computes; it takes 32 at once."""


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    geometry: Geometry,
    like: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a convolution's input.

    Args:
        grad: The gradient of the result, of shape (N, out, H', W').
        weight: Shape (out, in, height, width), as the convolution used it, of the dtype of grad.
        input_shape: (N, in, H, W).
        geometry: Stride, padding and dilation.
        like: Of the shape, dtype, device and layout of the input; its contents are not read. None: it is made.

    Returns:
        Shape ``input_shape``, of the dtype of grad.

    Raises:
        ValueError: grad, weight and input_shape do not belong together.
    """
    _check_channels(grad, weight, input_shape[1])
    if not _has_input_kernel(grad, weight, input_shape, geometry):
        return _plain_input_gradient(grad, weight, input_shape, geometry, like)
    result = _turned_convolution(grad, weight)
    (vertical, horizontal), _, _ = geometry
    if (vertical, horizontal) == (1, 1):
        return result
    # The other pixels of the input reach no result.
    gradient = _empty_input(grad, input_shape).zero_()
    gradient[:, :, ::vertical, ::horizontal] = result
    return gradient


def add_input_gradient_(total: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Add :func:`input_gradient` to ``total`` in place, where several convolutions read the same; return it."""
    _check_channels(grad, weight, total.shape[1])
    if not _has_input_kernel(grad, weight, total.shape, geometry):
        return total.add_(_plain_input_gradient(grad, weight, total.shape, geometry))
    (vertical, horizontal), _, _ = geometry
    if (vertical, horizontal) != (1, 1) or not total.is_contiguous(
        memory_format=torch.channels_last
    ):
        total[:, :, ::vertical, ::horizontal] += _turned_convolution(grad, weight)
        return total
    call_without_autograd(
        torch.ops.bitfast.norm_convolution_add_.native,
        _dense(grad), None, *NO_NORM, packed_weight(weight, turned=True), total, weight.shape[2], 1, False,
    )  # fmt: skip
    return total


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's weight.

    How it is summed, and so its last bits, depends on the number of threads.

    Args:
        x: The input, of shape (N, in, H, W).
        grad: The gradient of the result, of shape (N, out, H', W'), of the dtype of x.
        weight: Shape (out, in, height, width), as the convolution used it, of the dtype of x.
        geometry: Stride, padding and dilation.

    Returns:
        Of the shape, dtype and layout of weight.

    Raises:
        ValueError: x, grad and weight do not belong together.
    """
    _check_channels(grad, weight, x.shape[1])
    way = _way_of(x, grad, weight, geometry)
    if way is not None:
        return _kernel_gradient(way, x, (None, None), NO_NORM, grad, weight, geometry)
    _, gradient, _ = _plain_gradients(grad, x, weight, geometry, (False, True, False))
    result = torch.empty_like(weight)
    return gradient if gradient.stride() == result.stride() else result.copy_(gradient)


def norm_weight_gradient(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm: Norm,
    grad: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor | None:
    """Return :func:`weight_gradient` of an input that is normalized and activated while it is read.

    Args:
        x: What is normalized.
        mean, rstd: Of its groups: float32, shape (N, groups).
        norm: The norm.
        grad, weight, geometry: As in :func:`weight_gradient`.

    Returns:
        As :func:`weight_gradient`; None where no kernel does this.
    """
    _check_channels(grad, weight, x.shape[1])
    way = _way_of(x, grad, weight, geometry)
    if way is None:
        return None
    parameters = (norm.weight, norm.bias, norm.num_groups, norm.eps, norm.activation)
    return _kernel_gradient(way, x, (mean, rstd), parameters, grad, weight, geometry)


def _check_channels(grad: Tensor, weight: Tensor, channels: int) -> None:
    if tuple(weight.shape[:2]) != (grad.shape[1], channels):
        raise ValueError(
            f"{OP}: weight must have {grad.shape[1]} output channels, as many as grad, and {channels} input "
            f"channels, as many as the input; got {tuple(weight.shape)}"
        )


# ---- who computes what ----------------------------------------------------------------------------


def _has_input_kernel(
    grad: Tensor, weight: Tensor, input_shape: Sequence[int], geometry: Geometry
) -> bool:
    """Whether kernels compute the gradient of the input: what ``norm_convolution`` has for turned filters."""
    out_channels, channels, *size = weight.shape
    turned = (channels, out_channels, *size)
    return (
        grad.dtype == weight.dtype
        and has_kernel_for(turned, geometry, grad.dtype, input_shape[2:], WIDEST_3X3_IN_TRAINING)
        and may_train(grad.device.type, grad.dtype)
    )


DIRECT, WINOGRAD = "direct", "winograd"


def _way_of(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> str | None:
    """Return how a kernel computes the gradient of the weight; None if torch is to."""
    if not (x.dtype == grad.dtype == weight.dtype) or x.shape[1] < FEWEST_CHANNELS:
        return None
    if not may_train(x.device.type, x.dtype):
        return None
    if (
        weight.shape[2:] == (3, 3)
        and geometry == ((1, 1), (1, 1), (1, 1))
        and x.dtype == torch.float32
        and min(x.shape[2:]) >= SMALLEST_3X3
        and weight.shape[0] * weight.shape[1] <= WIDEST_3X3_IN_TRAINING
    ):
        return WINOGRAD
    return DIRECT


def _kernel_gradient(
    way: str,
    x: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    norm: tuple[Any, ...],
    grad: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    result = torch.empty_like(weight)
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    gradient = result if is_dense else torch.empty(weight.shape, dtype=weight.dtype)
    norm_weight, norm_bias, num_groups, _, activation = norm
    call_without_autograd(
        torch.ops.bitfast.convolution_weight_gradient.native,
        _dense(x), *statistics, norm_weight, norm_bias, num_groups, activation,
        _dense(grad), *geometry, way == WINOGRAD, gradient,
    )  # fmt: skip
    return result if is_dense else result.copy_(gradient)


def _turned_convolution(grad: Tensor, weight: Tensor) -> Tensor:
    """Convolve grad with the turned filters: the input's gradient, where its stride is 1."""
    _, channels, kernel_size, _ = weight.shape
    result, _ = call_without_autograd(
        torch.ops.bitfast.norm_convolution.native,
        _dense(grad), None, *NO_NORM, packed_weight(weight, turned=True), channels, kernel_size, 1, False,
    )  # fmt: skip
    return result


def _empty_input(grad: Tensor, shape: Sequence[int]) -> Tensor:
    # On a CPU convolutions are fastest channels_last, whatever the layout of grad.
    layout = torch.channels_last if grad.device.type == "cpu" else memory_format_of(grad)
    # The device of grad is not the default device, which may be another.
    return torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=layout)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---- torch's own ----------------------------------------------------------------------------------


def _plain_input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    geometry: Geometry,
    like: Tensor | None = None,
) -> Tensor:
    # Its memory is not read, but its layout decides how torch computes.
    x = _empty_input(grad, input_shape) if like is None else like
    gradient, _, _ = _plain_gradients(grad, x, weight, geometry, (True, False, False))
    return gradient


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, wanted
    )


if extension.CPU.problem is None:
    torch.library.register_fake(f"bitfast::{OP}.native", lambda *_: None)
    refuse_derivatives(OP, "native")

__all__ = ["add_input_gradient_", "input_gradient", "norm_weight_gradient", "weight_gradient"]
