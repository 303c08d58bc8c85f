"""The gradients of a convolution, in plain functions: for backward passes that are written by hand.

On CPUs with AVX-512, kernels of bitfast compute those that they compute faster than torch does. The gradient of
the input is a convolution itself, of the gradient with the filters turned round (Dumoulin & Visin, "A guide to
convolution arithmetic for deep learning", 2016, https://arxiv.org/abs/1603.07285).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfast.ops.derivatives import call_without_autograd
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.norm_convolution import NO_NORM, has_kernel_for, uses_norm_convolution

OP = "convolution_gradients"


def input_gradient(
    grad: Tensor, weight: Tensor, input_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """Return the gradient of a convolution's input.

    Args:
        grad: The gradient of the result, of shape (N, out, H', W').
        weight: Shape (out, in, height, width), as the convolution used it, of the dtype of grad.
        input_shape: (N, in, H, W).
        geometry: Stride, padding and dilation.

    Returns:
        Shape ``input_shape``, of the dtype of grad.

    Raises:
        ValueError: grad, weight and input_shape do not belong together.
    """
    _check_channels(grad, weight, input_shape[1])
    stride, _, _ = geometry
    size = input_shape[2:]
    if not _can_use_kernels(grad, weight) or not has_kernel_for(
        _turned_shape(weight), geometry, grad.dtype, size
    ):
        return _plain_input_gradient(grad, weight, input_shape, geometry)
    result = _convolve(_dense(grad), _turned(weight), weight.shape[1], weight.shape[2])
    if stride == (1, 1):
        return result
    # The other pixels of the input reach no result.
    gradient = grad.new_zeros(input_shape).contiguous(memory_format=torch.channels_last)
    gradient[:, :, :: stride[0], :: stride[1]] = result
    return gradient


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's weight.

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
    _, gradient, _ = _plain_gradients(grad, x, weight, geometry, (False, True, False))
    return gradient


def _check_channels(grad: Tensor, weight: Tensor, channels: int) -> None:
    if tuple(weight.shape[:2]) != (grad.shape[1], channels):
        raise ValueError(
            f"{OP}: weight must have {grad.shape[1]} output channels, as many as grad, and {channels} input "
            f"channels, as many as the input; got {tuple(weight.shape)}"
        )


def _can_use_kernels(grad: Tensor, weight: Tensor) -> bool:
    return grad.dtype == weight.dtype and uses_norm_convolution(grad.device.type, grad.dtype)


# ---- what the kernels need ------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _turned_shape(weight: Tensor) -> torch.Size:
    out, channels, *size = weight.shape
    return torch.Size((channels, out, *size))


def _turned(weight: Tensor) -> Tensor:
    """Return the filters of the input's gradient, packed."""
    turned = weight.transpose(0, 1).flip(2, 3).float().contiguous()
    pack = torch.ops.bitfast.pack_norm_convolution.native
    return call_without_autograd(pack, turned, weight.dtype == torch.bfloat16)


def _convolve(x: Tensor, packed: Tensor, out_channels: int, kernel_size: int) -> Tensor:
    result, _ = call_without_autograd(
        torch.ops.bitfast.norm_convolution.native,
        x, None, *NO_NORM, packed, out_channels, kernel_size, 1, False,
    )  # fmt: skip
    return result


# ---- torch's own ----------------------------------------------------------------------------------


def _plain_input_gradient(
    grad: Tensor, weight: Tensor, input_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    # Its memory is not read, but on a CPU its layout decides how torch computes.
    if grad.device.type == "cpu":
        x = torch.empty(
            tuple(input_shape),
            dtype=grad.dtype,
            device=grad.device,  # not the default device, which may be another
            memory_format=torch.channels_last,
        )
    else:
        x = grad.new_empty(1).expand(input_shape)
    gradient, _, _ = _plain_gradients(grad, x, weight, geometry, (True, False, False))
    return gradient


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, wanted
    )


__all__ = ["input_gradient", "weight_gradient"]
