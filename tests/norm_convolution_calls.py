"""Calls of the entries of csrc/norm_convolution*.cu with CPU tensors, in the emulation of a GPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.ops.norm_convolution_cuda import (
    Call,
    Convolution,
    FactorsCall,
    PartialsCall,
    Prepared,
    Tiling,
)
from bitfast.ops.same_padding import same_padding
from tests.emulated import DTYPES, H100, at_page_end, call, library
from tests.tolerances import assert_draws_within_contract

NAN = float("nan")
ZEROS = (1, 1, 1, 1)
DEVICES = [H100, *((90, multiprocessors, 227 * 1024) for multiprocessors in (1, 2, 3))]


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


# ---- convolutions -----------------------------------------------------------------------------------


def convolution_kernels() -> ctypes.CDLL:
    return library("csrc/norm_convolution.cu")


@dataclass(frozen=True)
class Case:
    """A convolution, with what is fused to it.

    Attributes:
        padding: (top, bottom, left, right).
        activation: Of the norm of x: "relu" or "none"; None: x has no norm.
        cell_channels: Of the partials; 0: there are none.
    """

    images: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel_size: int = 1
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str | None = "relu"
    adds: bool = False
    second_channels: int = 0
    cell_channels: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def result_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        height, width = self.size[0] + top + bottom, self.size[1] + left + right
        return (
            (height - self.kernel_size) // self.stride + 1,
            (width - self.kernel_size) // self.stride + 1,
        )

    @property
    def products(self) -> int:
        """How many multiplications it is, of 64 channels on both sides at least."""
        sides = max(self.channels, 64) * max(self.out_channels, 64)
        return self.images * math.prod(self.result_size) * sides * self.kernel_size**2

    @property
    def convolution(self) -> Convolution:
        return Convolution(
            shape=(self.images, self.channels, *self.size),
            dtype=self.dtype,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            out_channels=self.out_channels,
            second_channels=self.second_channels,
            activation=self.activation,
            adds=self.adds,
            cell_channels=self.cell_channels,
        )

    def prepared(self, tiling: Tiling | None = None) -> Prepared:
        """How it is launched on the device that is emulated, cut as the kernels choose or as is wanted."""
        prepared = Prepared()
        entry = convolution_kernels().bitfast_norm_convolution_prepare
        call(entry, ctypes.byref(Call.of(self.convolution, tiling)), ctypes.byref(prepared))
        return prepared


def feature_map(
    images: int, channels: int, size: Sequence[int], dtype: torch.dtype, fill: float | None = None
) -> Tensor:
    """A channels_last map that ends where its memory does: random numbers, or all the same."""
    x = (
        torch.randn(images, channels, *size)
        if fill is None
        else torch.empty(images, channels, *size)
    )
    return at_page_end(x.to(dtype).contiguous(memory_format=torch.channels_last), fill)


class Inputs(NamedTuple):
    x: Tensor
    factors: Tensor | None
    weight: Tensor
    residual: Tensor | None
    second_weight: Tensor | None

    @classmethod
    def of(cls, case: Case, mean: float = 0.0) -> Inputs:
        """Random ones; ``mean``: of the residual."""
        x = feature_map(case.images, case.channels, case.size, case.dtype)
        factors = residual = second = None
        if case.activation is not None:
            factors = torch.randn(case.images, 2, case.channels)
            factors[:, 0] = factors[:, 0].abs() + 0.5
            factors = at_page_end(factors)
        if case.adds:
            residual = feature_map(case.images, case.out_channels, case.result_size, case.dtype)
            residual += mean
        if case.second_channels:
            second = _weight(case, case.second_channels)
        return cls(x, factors, _weight(case, case.out_channels), residual, second)


def _weight(case: Case, out_channels: int) -> Tensor:
    weight = torch.randn(out_channels, case.channels, case.kernel_size, case.kernel_size)
    return (weight / (case.channels * case.kernel_size**2) ** 0.5).to(case.dtype)


def pack_filters(weight: Tensor) -> Tensor:
    """(out, in, k, k) as (ceil(in / 64), k * k, 8, out, 8), with zeros for channels that the input lacks."""
    out, channels, size, _ = weight.shape
    chunks = -(-channels // 64)
    packed = torch.zeros(chunks * 64, size * size, out, dtype=weight.dtype)
    packed[:channels] = weight.reshape(out, channels, -1).permute(1, 2, 0)
    packed = packed.view(chunks, 8, 8, size * size, out).permute(0, 3, 1, 4, 2)
    return at_page_end(packed.contiguous())


class Results(NamedTuple):
    result: Tensor
    second: Tensor | None
    partials: Tensor | None


def convolve(
    case: Case, inputs: Inputs, in_place: bool = False, tiling: Tiling | None = None
) -> Results:
    """Call the entry; results lie in memory that was poisoned, or the first one in that of the residual."""
    size, dtype, prepared = case.result_size, case.dtype, case.prepared(tiling)
    result = feature_map(case.images, case.out_channels, size, dtype, NAN)
    residual, second, partials = inputs.residual, None, None
    if in_place and residual is not None:
        residual = result.copy_(residual)
    if case.second_channels:
        second = feature_map(case.images, case.second_channels, size, dtype, NAN)
    if case.cell_channels:
        cells = case.out_channels // case.cell_channels
        partials = at_page_end(torch.empty(case.images, prepared.strips, 1 + cells, 2), NAN)
    call(
        convolution_kernels().bitfast_norm_convolution, ctypes.byref(prepared), None,
        inputs.x, inputs.factors, pack_filters(inputs.weight), residual, result, partials,
        None if inputs.second_weight is None else pack_filters(inputs.second_weight), second,
    )  # fmt: skip
    return Results(result, second, partials)


def expected(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch's results: in float64, or in the dtype of x, multiplied in float32 as GPUs do."""
    x, computes = inputs.x, torch.promote_types(dtype, torch.float32)
    if inputs.factors is not None:
        scale, shift = inputs.factors.to(computes)[..., None, None].unbind(1)
        x = ACTIVATIONS[case.activation or "none"](x.to(computes) * scale + shift).to(dtype)
    top, bottom, left, right = case.padding
    x = F.pad(x.to(computes), (left, right, top, bottom))

    def convolved(weight: Tensor) -> Tensor:
        return F.conv2d(x, weight.to(computes), stride=case.stride).to(dtype)

    result = convolved(inputs.weight)
    if inputs.residual is not None:
        result = result + inputs.residual.to(dtype)
    second = inputs.second_weight
    return result, None if second is None else convolved(second)


def check_statistics(result: Tensor, partials: Tensor, cell_channels: int) -> None:
    """Hold the partials of all strips of each image together to the numbers that were stored."""
    pixels, mean, squares = merged(partials, cell_channels)
    assert (pixels == result[0, 0].numel()).all()
    values = result.double().unflatten(1, (-1, cell_channels)).flatten(3)
    count = values.shape[2] * values.shape[3]
    exact_mean = values.mean((2, 3))
    exact_squares = (values - exact_mean[..., None, None]).square().sum((2, 3))
    std = (exact_squares / count).sqrt()
    assert ((mean - exact_mean).abs() <= 3e-7 * std + 1.2e-7 * exact_mean.abs()).all()
    # Each strip's mean is rounded to float32.
    rounding = count**0.5 * 1.2e-7 * exact_mean.abs()
    allowed = 1e-5 * exact_squares + 2 * rounding * exact_squares.sqrt() + rounding.square()
    assert ((squares - exact_squares).abs() <= allowed).all()


def check(
    case: Case,
    mean: float = 0.0,
    in_place: bool = False,
    draws: int = 1,
    tiling: Tiling | None = None,
) -> None:
    """Hold the results of several draws together to the contract, and their statistics to float64."""

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        inputs = Inputs.of(case, mean)
        actual = convolve(case, inputs, in_place, tiling)
        plain, exact = (expected(case, inputs, dtype) for dtype in (case.dtype, torch.float64))
        compared = {"result": (actual.result, plain[0], exact[0])}
        if actual.second is not None and plain[1] is not None and exact[1] is not None:
            compared["second"] = (actual.second, plain[1], exact[1])
        if actual.partials is not None:
            check_statistics(actual.result, actual.partials, case.cell_channels)
        return compared

    assert_draws_within_contract(draw, draws)


# ---- the convolutions of the model --------------------------------------------------------------------


def of_model(
    channels: int,
    out_channels: int,
    side: int,
    kernel_size: int = 1,
    stride: int = 1,
    **options: Any,
) -> Case:
    """One of R50x1, with "same" padding; groups of its norms have as many channels as a 32nd."""
    size = (side, side)
    padding = same_padding(size, (kernel_size,) * 2, (stride,) * 2, (1, 1))
    top, bottom, left, right = padding if kernel_size == 3 else (0, 0, 0, 0)
    cell_channels = min(out_channels // 32, 8)
    return Case(
        options.pop("images", 1), channels, size, out_channels, kernel_size, stride,
        (top, bottom, left, right), cell_channels=cell_channels, **options,
    )  # fmt: skip


MODEL = [
    of_model(64, 256, 56, adds=True), of_model(256, 64, 56), of_model(64, 64, 56),
    of_model(64, 64, 56, second_channels=256), of_model(256, 128, 56),
    of_model(128, 512, 28, adds=True), of_model(512, 128, 28), of_model(512, 256, 28),
    of_model(256, 1024, 14, adds=True, images=2), of_model(1024, 256, 14, images=3),
    of_model(512, 2048, 7, adds=True, images=3), of_model(2048, 512, 7, images=2),
    of_model(64, 64, 56, 3), of_model(128, 128, 28, 3), of_model(256, 256, 14, 3, images=2),
    of_model(512, 512, 7, 3),
    of_model(128, 128, 56, 3, 2), of_model(256, 256, 28, 3, 2), of_model(512, 512, 14, 3, 2),
    of_model(256, 512, 56, 1, 2), of_model(512, 1024, 28, 1, 2), of_model(1024, 2048, 14, 1, 2),
]  # fmt: skip


def name_of(case: Case) -> str:
    sides = f"{case.channels}-{case.out_channels}@{case.size[0]}x{case.size[1]}"
    return f"{case.kernel_size}x{case.kernel_size}/{case.stride}-{sides}-{case.images}"
