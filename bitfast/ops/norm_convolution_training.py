"""GroupNorm, activation and convolutions in one pass, for the forward pass of training on the CPU.

As ``norm_convolution``, but with standardized weights, which change in each step: they are packed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.ops.derivatives import call_without_autograd
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.norm_convolution import (
    NO_NORM,
    WIDEST_3X3_IN_TRAINING,
    Norm,
    has_kernel_for,
    may_train,
    packed_weight,
)


class Link(NamedTuple):
    """What the convolutions that read one normalized input give."""

    results: list[Tensor]
    moments: list[Tensor | None]
    """Of the results, or None where nobody wants them."""
    mean: Tensor | None
    """Of the groups of the input, (N, groups) in float32; None without a norm."""
    rstd: Tensor | None


def norm_convolve(
    x: Tensor,
    moments: Tensor | None,
    norm: Norm | None,
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
    wants_moments: bool,
    residual: Tensor | None = None,
) -> Link | None:
    """Convolve the normalized, activated x with each of the weights, if there are kernels for all of them.

    Args:
        x: Shape (N, in, H, W).
        moments: The mean and the (biased) variance of each image's channels: float64, shape (2, N, in). None:
            they are computed if they are needed.
        norm: None: x is convolved as it is.
        weights: Shape (out, in, height, width) each, standardized, of the dtype of x.
        geometries: Stride, padding and dilation of each.
        wants_moments: Also return the moments of the results.
        residual: Added to the first result, of whose shape and dtype it is.

    Returns:
        The results, channels_last; None where a kernel is missing.
    """
    if not _has_kernels(x, weights, geometries):
        return None
    x = _dense(x)
    mean = rstd = None
    if norm is not None:
        if moments is None:
            moments = call_without_autograd(torch.ops.bitfast.channel_moments.native, x)
        mean, rstd = call_without_autograd(
            torch.ops.bitfast.group_statistics.native, moments, norm.num_groups, norm.eps
        )
    results, found = [], []
    for number, (weight, (stride, _, _)) in enumerate(zip(weights, geometries, strict=True)):
        addend = _dense(residual) if number == 0 and residual is not None else None
        result, of_result = call_without_autograd(
            torch.ops.bitfast.norm_convolution.native,
            x, moments, *(norm or NO_NORM), packed_weight(weight), weight.shape[0], weight.shape[2], stride[0],
            wants_moments, addend,
        )  # fmt: skip
        results.append(result)
        found.append(of_result if wants_moments else None)
    return Link(results, found, mean, rstd)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _has_kernels(x: Tensor, weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> bool:
    return may_train(x.device.type, x.dtype) and all(
        weight.dtype == x.dtype
        and has_kernel_for(weight.shape, geometry, x.dtype, x.shape[2:], WIDEST_3X3_IN_TRAINING)
        for weight, geometry in zip(weights, geometries, strict=True)
    )


__all__ = ["Link", "norm_convolve"]
