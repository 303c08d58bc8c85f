"""Weight standardization of convolution filters.

Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019
(https://arxiv.org/abs/1903.10520).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import LIBRARY, autocast_dtype, check_floating, define_operator

OP = "weight_standardization"

SIGNATURE = "(Tensor weight, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)"
"""What every kernel takes and returns: the result, and the mean and 1/std of each filter, in float32
(float64 for float64 weights)."""

BACKWARD_SIGNATURE = "(Tensor grad, Tensor weight, Tensor mean, Tensor rstd) -> Tensor"
"""What every backward kernel takes and returns: the gradient of weight."""


def weight_standardization(
    weight: Tensor, eps: float = 1e-8, dtype: torch.dtype | None = None
) -> Tensor:
    """Shift and scale each output filter to zero mean and unit (biased) variance.

    Computed in float32 (float64 for float64 weights) whatever the dtypes, then rounded once.

    Args:
        weight: Shape (out, in, kernel height, kernel width), floating point, any strides.
        eps: Added to the variance before the square root.
        dtype: Of the result. Default: under autocast the autocast dtype, else that of ``weight``.

    Returns:
        The shape of ``weight``; channels_last if it is, else contiguous.

    Raises:
        TypeError: ``weight`` or ``dtype`` is not floating point.
        ValueError: ``weight`` is not four-dimensional or is empty, or ``eps`` is negative.
    """
    check_floating(OP, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{OP}: weight must have shape (out, in, height, width), each at least 1,"
            f" got {tuple(weight.shape)}"
        )
    if eps < 0:
        raise ValueError(f"{OP}: eps must be at least 0, got {eps}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{OP}: dtype must be a floating-point dtype, got {dtype}")
    dtype = dtype or autocast_dtype(weight)
    backend = select_backend(OP, weight.device.type, weight.dtype)
    if backend == "reference":
        return reference.weight_standardization_forward(weight, eps, dtype)[0]
    return getattr(torch.ops.bitfast.weight_standardization, backend)(weight, eps, dtype)[0]


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake(weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    result = torch.empty_like(
        weight, dtype=dtype or weight.dtype, memory_format=memory_format_of(weight)
    )
    mean = weight.new_empty((weight.shape[0],), dtype=reference.compute_dtype(weight.dtype))
    return result, mean, torch.empty_like(mean)


def _fake_backward(grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=memory_format_of(weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.save_for_backward(inputs[0], mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::weight_standardization.<backend>`` and its backward."""
    define_operator(OP, backend, SIGNATURE, forward, _fake)
    backward_op = define_operator(
        f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, _fake_backward
    )

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return backward_op(grad, *ctx.saved_tensors), None, None

    torch.library.register_autograd(
        f"bitfast::{OP}.{backend}", run_backward, setup_context=_setup_context, lib=LIBRARY
    )


define_kernel(
    "reference",
    reference.weight_standardization_forward,
    reference.weight_standardization_backward,
)
