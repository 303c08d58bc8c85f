"""Calls of the entries of csrc/norm_convolution*.cu with CPU tensors, in the emulation of a GPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tests.emulated import DTYPES, at_page_end, call, library

NAN = float("nan")


class PartialsCall(ctypes.Structure):
    """``bitfast::norm_convolution::PartialsCall``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "channels", "cell_channels", "strips")),
        *((name, ctypes.c_int64) for name in ("images", "pixels")),
    )


class FactorsCall(ctypes.Structure):
    """``bitfast::norm_convolution::FactorsCall``."""

    _fields_ = (
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("strips", "channels", "cell_channels", "groups")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "bias_dtype")),
        ("eps", ctypes.c_float),
    )


# ---- statistics -------------------------------------------------------------------------------------


def statistics_kernels() -> ctypes.CDLL:
    return library("csrc/norm_convolution_statistics.cu")


def partials_call(x: Tensor, cell_channels: int, strips: int = 0) -> PartialsCall:
    images, channels, height, width = x.shape
    return PartialsCall(DTYPES[x.dtype], channels, cell_channels, strips, images, height * width)


def strips_of(x: Tensor, cell_channels: int) -> int:
    """As many strips as the kernel wants for the partials of a map."""
    strips = ctypes.c_int32()
    prepared = partials_call(x, cell_channels)
    entry = statistics_kernels().bitfast_norm_convolution_strips
    call(entry, ctypes.byref(prepared), ctypes.byref(strips))
    return strips.value


def partials_of(x: Tensor, cell_channels: int, strips: int | None = None) -> Tensor:
    """The partials of a channels_last map, (images, strips, 1 + cells, 2), in memory that was poisoned."""
    strips = strips_of(x, cell_channels) if strips is None else strips
    shape = x.shape[0], strips, 1 + x.shape[1] // cell_channels, 2
    partials = at_page_end(torch.empty(shape), NAN)
    prepared = partials_call(x, cell_channels, strips)
    entry = statistics_kernels().bitfast_norm_convolution_partials
    call(entry, ctypes.byref(prepared), None, x, partials)
    return partials


def factors_call(
    partials: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> FactorsCall:
    images, strips, cells = partials.shape[0], partials.shape[1], partials.shape[2] - 1
    channels = weight.numel()
    return FactorsCall(
        images, strips, channels, channels // cells, groups, DTYPES[weight.dtype], DTYPES[bias.dtype], eps
    )  # fmt: skip


def factors_of(
    partials: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5
) -> Tensor:
    """The factors of a norm, (images, 2, channels), in memory that was poisoned."""
    factors = at_page_end(torch.empty(partials.shape[0], 2, weight.numel()), NAN)
    prepared = factors_call(partials, weight, bias, groups, eps)
    entry = statistics_kernels().bitfast_norm_convolution_factors
    call(entry, ctypes.byref(prepared), None, partials, weight, bias, factors)
    return factors


def merged(partials: Tensor, cell_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """All strips together, in float64: pixels of each image; mean and squares of each cell of it."""
    exact = partials.double()
    pixels, mean, squares = exact[:, :, 0, 0], exact[:, :, 1:, 0], exact[:, :, 1:, 1]
    share = (pixels / pixels.sum(1, keepdim=True))[..., None]
    means = (mean * share).sum(1)
    apart = (mean - means[:, None]).square() * pixels[..., None] * cell_channels
    return pixels.sum(1), means, (squares + apart).sum(1)
