"""What every backend of weight_standardization takes, returns and refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfast import reference
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import check_floating
from bitfast.ops.weight_buffer import starts_of

OP = "weight_standardization"
ALL_OP = "weight_standardization_all"

SIGNATURE = "(Tensor weight, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)"
"""Of every backend's ``weight_standardization``. Returns the result, and the mean and 1/std of each filter, in
float32 (float64 for float64 weights)."""

BACKWARD_SIGNATURE = "(Tensor grad, Tensor weight, Tensor mean, Tensor rstd) -> Tensor"
"""Of every backend's ``weight_standardization_backward``. Returns the gradient of weight."""

ALL_SIGNATURE = (
    "(Tensor[] weights, float eps, ScalarType? dtype, bool channels_last)"
    " -> (Tensor, Tensor, Tensor)"
)
"""Of every backend's ``weight_standardization_all``. Returns the results in one buffer, where ``starts_of``
says, and the statistics of all filters, in order. With ``channels_last`` every result has that layout."""

ALL_BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor[] weights, Tensor mean, Tensor rstd, bool channels_last) -> Tensor"
)
"""Of every backend's ``weight_standardization_all_backward``. Returns the gradients in one buffer, in the
layouts of the weights."""


def check(name: str, weight: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the op can take these."""
    check_floating(OP, name, weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{OP}: {name} must have shape (out, in, height, width), each at least 1,"
            f" got {tuple(weight.shape)}"
        )
    if eps < 0:
        raise ValueError(f"{OP}: eps must be at least 0, got {eps}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{OP}: dtype must be a floating-point dtype, got {dtype}")


def fake(weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``weight_standardization`` returns."""
    result = torch.empty_like(
        weight, dtype=dtype or weight.dtype, memory_format=memory_format_of(weight)
    )
    mean = weight.new_empty((weight.shape[0],), dtype=reference.compute_dtype(weight.dtype))
    return result, mean, torch.empty_like(mean)


def fake_backward(grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return a tensor without contents, like that of ``weight_standardization_backward``."""
    return torch.empty_like(weight, memory_format=memory_format_of(weight))


def fake_all(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``weight_standardization_all`` returns."""
    like = weights[0]
    _, end = starts_of([weight.numel() for weight in weights])
    packed = like.new_empty((end,), dtype=dtype or like.dtype)
    filters = sum(weight.shape[0] for weight in weights)
    mean = like.new_empty((filters,), dtype=reference.compute_dtype(like.dtype))
    return packed, mean, torch.empty_like(mean)


def fake_all_backward(
    grad: Tensor, weights: Sequence[Tensor], mean: Tensor, rstd: Tensor, channels_last: bool
) -> Tensor:
    """Return a tensor without contents, like that of ``weight_standardization_all_backward``."""
    return torch.empty_like(grad, dtype=weights[0].dtype)
