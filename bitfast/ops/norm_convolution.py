"""GroupNorm, activation and convolution in one pass; for inference on the CPU.

The input is normalized and activated while it is packed for a matrix product; a residual is added to the result
and its statistics are computed while it is still in the cache. So between two convolutions of a preactivation
block only their results are read and written. 1x1 filters are plain products; 3x3 filters
take 16 multiplications for four outputs instead of 36, after Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks", 2015 (https://arxiv.org/abs/1509.09308), in float32 only: rounded to bfloat16, the sums that
it takes of its input would lose digits.

There is a kernel for AVX-512. Everywhere else, and for other filters, the layers call one op after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitfast import extension
from bitfast.backends import register_kernel, select_backend
from bitfast.ops.common import NATIVE_CPU_DTYPES, complete_operator
from bitfast.ops.derivatives import call_without_autograd, refuse_derivatives
from bitfast.ops.group_norm_act import OP as GROUP_NORM_ACT
from bitfast.ops.kept_weights import Geometry, kept_weights
from bitfast.ops.packed_convolution import uses_packed_weights
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.torch_state import constant_when_compiled, unseen

OP = "norm_convolution"

_NORM = (
    "(Tensor x, Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, int num_groups, float eps,"
    " str activation"
)

SIGNATURE = (
    f"{_NORM}, Tensor packed, int out_channels, int kernel_size, int stride, bool wants_moments,"
    " Tensor? residual=None) -> (Tensor, Tensor)"
)
"""Of ``norm_convolution``. Returns the convolution, with the residual added to it, and the result's moments (of
0 images unless ``wants_moments``)."""

ADD_SIGNATURE = (
    f"{_NORM}, Tensor packed, Tensor(a!) total, int kernel_size, int stride, bool wants_moments)"
    " -> Tensor"
)
"""Of ``norm_convolution_add_``: adds the convolution to ``total`` in place, and returns the sum's moments."""

STATISTICS_SIGNATURE = "(Tensor moments, int num_groups, float eps) -> (Tensor mean, Tensor rstd)"
"""Of ``group_statistics``. Returns the mean and 1/std of each (image, group) of a norm from the moments of its
input: float32, as ``group_norm_act_backward`` takes it after a forward pass by ``norm_convolution``."""

WIDEST_3X3 = 256 * 256
"""Input times output channels of a 3x3 filter, at most: packed, filters take 16/9 of their memory."""

WIDEST_3X3_IN_TRAINING = 512 * 512
"""The same where filters are packed for one use. R50x1's widest still gain then: 15 ms and 2 for packing,
against torch's 21, for 8 images of 512 channels and 7x7 pixels on a core of an AMD EPYC."""

SMALLEST_3X3 = 4
"""Pixels along each axis of the input of a 3x3 filter, at least. On smaller images most taps meet padding, and
terms that should cancel leave rounding errors that are not small against the result."""


class Norm(NamedTuple):
    """A GroupNorm with activation, to be applied to x; the arguments of ``group_norm_act``."""

    weight: Tensor
    bias: Tensor
    num_groups: int
    eps: float
    activation: str


def norm_convolution(
    x: Tensor,
    moments: Tensor | None,
    norm: Norm | None,
    weight: Tensor,
    weight_eps: float,
    stride: int,
    wants_moments: bool,
) -> tuple[Tensor, Tensor | None]:
    """Convolve the normalized, activated x with the standardized weight, of which a packed copy is kept.

    Args:
        x: Shape (N, in, H, W), channels_last, of a device and a dtype for which :func:`uses_norm_convolution`
            is true.
        moments: The mean and the (biased) variance of each image's channels: float64, shape (2, N, in). None:
            they are computed.
        norm: None: x is convolved as it is.
        weight: Shape (out, in, height, width), not standardized, for which
            :func:`has_norm_convolution_kernel` is true. 3x3 filters are padded with one zero on each side,
            after the norm.
        weight_eps: As in ``weight_standardization``.
        stride: In both axes.
        wants_moments: Also return the moments of the result.

    Returns:
        Shape (N, out, ceil(H / stride), ceil(W / stride)), channels_last, of the dtype of x; and its moments
        or None.
    """
    packed = packed_filters(x, weight, weight_eps)
    result, result_moments = call_without_autograd(
        torch.ops.bitfast.norm_convolution.native,
        x, moments, *(norm or NO_NORM), packed, weight.shape[0], weight.shape[2], stride, wants_moments,
    )  # fmt: skip
    return result, result_moments if wants_moments else None


def add_norm_convolution_(
    x: Tensor,
    moments: Tensor | None,
    norm: Norm | None,
    weight: Tensor,
    total: Tensor,
    weight_eps: float,
    stride: int,
    wants_moments: bool,
) -> Tensor | None:
    """Add what :func:`norm_convolution` returns to ``total`` in place, rounded once; return the sum's moments.

    Args:
        total: Of the shape and dtype of the convolution, channels_last.
    """
    if total.shape[1] != weight.shape[0]:
        raise ValueError(
            f"{OP}: total must have the {weight.shape[0]} channels that weight gives, got {tuple(total.shape)}"
        )
    packed = packed_filters(x, weight, weight_eps)
    result = call_without_autograd(
        torch.ops.bitfast.norm_convolution_add_.native,
        x, moments, *(norm or NO_NORM), packed, total, weight.shape[2], stride, wants_moments,
    )  # fmt: skip
    return result if wants_moments else None


NO_NORM = (None, None, 1, 0.0, "none")
"""The norm arguments of the operators where x is convolved as it is."""


def uses_norm_convolution(device_type: str, dtype: torch.dtype) -> bool:
    """Whether :func:`norm_convolution` may be used for such tensors where no gradient is recorded.

    It does the work of three ops, and is not used where another backend of one of them is demanded.
    """
    return (
        select_backend(OP, device_type, dtype) == "native"
        and uses_packed_weights(device_type, dtype)
        and select_backend(GROUP_NORM_ACT, device_type, dtype) == "native"
    )


def may_train(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernels may compute convolutions of such tensors, and their gradients, in training.

    Where a backend is demanded that cannot take the dtype, as for inference, training goes without.
    """
    return (
        device_type == "cpu"
        and dtype in NATIVE_CPU_DTYPES
        and uses_norm_convolution(device_type, dtype)
    )


def has_norm_convolution_kernel(
    weight: Tensor, geometry: Geometry, dtype: torch.dtype, size: torch.Size
) -> bool:
    """Whether there is a kernel for a convolution with this weight and geometry, of an input of this dtype.

    Args:
        size: Height and width of the input.
    """
    if type(weight) is not nn.Parameter or weight.dtype not in NATIVE_CPU_DTYPES:
        return False
    if weight.device.type != "cpu" or weight.is_inference():
        return False
    return has_kernel_for(weight.shape, geometry, dtype, size)


def has_kernel_for(
    shape: Sequence[int],
    geometry: Geometry,
    dtype: torch.dtype,
    size: Sequence[int],
    widest_3x3: int = WIDEST_3X3,
) -> bool:
    """Whether there is a kernel for weights of this shape, as :func:`has_norm_convolution_kernel` says it."""
    stride, padding, dilation = geometry
    kernel_size = tuple(shape[2:])
    if kernel_size == (1, 1):
        return stride[0] == stride[1] and padding == (0, 0)
    return (
        kernel_size == (3, 3)
        and (stride, padding, dilation) == ((1, 1), (1, 1), (1, 1))
        and dtype == torch.float32
        and min(size) >= SMALLEST_3X3
        and shape[0] * shape[1] <= widest_3x3
    )


@constant_when_compiled
def why_no_norm_convolution(dtype: torch.dtype) -> str | None:
    """Return why the kernels of this dtype cannot, or should not, run on this machine; None if they should."""
    return _why_no_norm_convolution(dtype)


@lru_cache
def _why_no_norm_convolution(dtype: torch.dtype) -> str | None:
    if dtype not in NATIVE_CPU_DTYPES:
        return f"the kernels are for float32 and bfloat16, not {dtype}"
    if extension.CPU.problem is not None:
        return extension.CPU.problem
    with unseen():
        return torch.ops.bitfast.norm_convolution_problem(dtype == torch.bfloat16) or None


# ---- the kept weights -----------------------------------------------------------------------------


def packed_filters(x: Tensor, weight: Tensor, weight_eps: float) -> Tensor:
    """Return the standardized weight, packed for inputs of the dtype of x, from the kept weights.

    Raises:
        ValueError: weight and x differ in channels.
    """
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{OP}: weight must have {x.shape[1]} input channels, as many as x; got {tuple(weight.shape)}"
        )
    return packed_for(weight, weight_eps, x.dtype)


def packed_for(weight: Tensor, weight_eps: float, dtype: torch.dtype) -> Tensor:
    """Return the standardized weight, packed for inputs of a dtype, from the kept weights."""

    def make() -> Tensor:
        standardized = weight_standardization(weight, weight_eps, torch.float32)
        return packed_weight(standardized.to(dtype))

    return kept_weights.get(weight, (OP, weight_eps, dtype), make)


def packed_weight(standardized: Tensor, turned: bool = False) -> Tensor:
    """Return a standardized weight as the kernels read it, for inputs of its dtype.

    Args:
        standardized: Shape (out, in, height, width).
        turned: Pack the filters of the gradient of the convolution's input.
    """
    pack = torch.ops.bitfast.pack_norm_convolution.native
    return call_without_autograd(pack, standardized, standardized.dtype == torch.bfloat16, turned)


# ---- the operators --------------------------------------------------------------------------------


def _fake_result(x: Tensor, out_channels: int, stride: int, wants: bool) -> tuple[Tensor, Tensor]:
    height, width = (-(-n // stride) for n in x.shape[2:])
    result = x.new_empty((x.shape[0], out_channels, height, width))
    return result.contiguous(memory_format=torch.channels_last), _fake_moments(result, wants)


def _fake_moments(result: Tensor, wants_moments: bool) -> Tensor:
    shape = (2, result.shape[0] if wants_moments else 0, result.shape[1])
    return result.new_empty(shape, dtype=torch.float64)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out_channels, _, stride, wants_moments = rest[7:11]
    return _fake_result(x, out_channels, stride, wants_moments)


def _fake_add(x: Tensor, *rest: Any) -> Tensor:
    *_, total, _, _, wants_moments = rest
    return _fake_moments(total, wants_moments)


def _fake_statistics(moments: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    mean = moments.new_empty((moments.shape[1], num_groups), dtype=torch.float32)
    return mean, torch.empty_like(mean)


register_kernel(
    OP,
    "native",
    "cpu",
    NATIVE_CPU_DTYPES,
    lambda: why_no_norm_convolution(torch.float32),
    unsuitable=why_no_norm_convolution,
)
if extension.CPU.problem is None:
    complete_operator(OP, "native", SIGNATURE, _fake)
    complete_operator(f"{OP}_add_", "native", ADD_SIGNATURE, _fake_add)
    complete_operator("group_statistics", "native", STATISTICS_SIGNATURE, _fake_statistics)
    for _name in (OP, f"{OP}_add_", f"pack_{OP}", "channel_moments", "group_statistics"):
        refuse_derivatives(_name, "native")

__all__ = [
    "SMALLEST_3X3",
    "WIDEST_3X3",
    "WIDEST_3X3_IN_TRAINING",
    "Norm",
    "add_norm_convolution_",
    "has_kernel_for",
    "has_norm_convolution_kernel",
    "may_train",
    "norm_convolution",
    "packed_for",
    "packed_weight",
    "uses_norm_convolution",
    "why_no_norm_convolution",
]
