"""Fused convolutions on a GPU: their inputs drawn, the kernels run, and what is right."""

from __future__ import annotations

import random
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.norm_convolutions import LAYERS, Layer
from bitfast.ops.norm_convolution import Norm
from bitfast.ops.norm_convolution_cuda import (
    CAPABILITY,
    Convolution,
    Sides,
    pack_filters,
    why_no_factors,
    why_unsuited,
)
from bitfast.ops.norm_convolution_fused import Fused, cell_moments, fused_convolution
from tests.plain_ops import plain_norm
from tests.tolerances import assert_within_contract

needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != CAPABILITY,
    reason="needs a GPU of compute capability 9.0, for whose wgmma the kernels are written",
)

DEVICE, GROUPS = "cuda", 32
BFLOAT, HALF = torch.bfloat16, torch.float16
NONE: Sides = (0, 0, 0, 0)
FEW = (LAYERS[0], LAYERS[5], LAYERS[10], LAYERS[12], LAYERS[-1])
"""Of a large map with a residual, of many channels, 3x3, 3x3 of stride 2, and with a second result."""


class Problem(NamedTuple):
    """A fused convolution and its inputs; see :func:`fused_convolution`."""

    x: Tensor
    norm: Norm | None
    filters: Tensor
    stride: int = 1
    padding: Sides = NONE
    residual: Tensor | None = None
    next_groups: int | None = GROUPS
    second_filters: Tensor | None = None

    def run(self, partials: Tensor | None = None) -> Fused:
        """Run the kernels, where memory that becomes free holds NaN."""
        second = self.second_filters
        packed, second_packed = (
            None if f is None else pack_filters(f) for f in (self.filters, second)
        )
        assert packed is not None
        poison = [torch.full_like(self.plain_result(self.x), torch.nan) for _ in range(2)]
        del poison
        return fused_convolution(
            self.x, self.norm, packed, stride=self.stride, padding=self.padding, residual=self.residual,
            partials=partials, next_groups=self.next_groups, second_packed=second_packed,
        )  # fmt: skip

    def plain_result(self, x: Tensor, second: bool = False) -> Tensor:
        """Return the (second) result by plain PyTorch, in the dtype of x."""
        if self.norm is not None:
            x = plain_norm(x, *self.norm[:3], self.norm.activation)
        filters = self.second_filters if second else self.filters
        assert filters is not None
        top, bottom, left, right = self.padding
        padded = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
        result = F.conv2d(padded, filters.to(x.dtype), None, self.stride)
        return result if second or self.residual is None else result + self.residual.to(x.dtype)

    def check(self, found: Fused) -> None:
        """Hold everything that the kernels left to the contract."""
        compare = [(found.result, False)]
        if found.second is not None:
            compare.append((found.second, True))
        assert (found.second is None) == (self.second_filters is None)
        for actual, second in compare:
            plain, exact = (self.plain_result(x, second) for x in (self.x, self.x.double()))
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert_within_contract(actual, plain, exact, f"the {'second ' * second}result")
        if self.next_groups is None:
            assert found.partials is None
        else:
            assert found.partials is not None
            assert_measures(found.partials, found.result)


def assert_measures(partials: Tensor, result: Tensor) -> None:
    """Hold partials to what was stored, however far its mean lies from zero."""
    pixels = result.shape[2] * result.shape[3]
    assert (partials[:, :, 0, 0].sum(1) == pixels).all()
    assert not partials[:, :, 0, 1].any()
    assert not partials[partials[:, :, 0, 0] == 0].any(), "a strip without pixels has statistics"
    mean, variance = cell_moments(partials, result.shape[1])
    cells = result.double().permute(0, 2, 3, 1).unflatten(3, (mean.shape[1], -1))
    exact_variance, exact_mean = torch.var_mean(cells, (1, 2, 4), correction=0)
    deviation = exact_variance.sqrt()
    off = (mean - exact_mean).abs()
    assert (off <= 1e-5 * deviation + 2**-20 * exact_mean.abs()).all(), (off / deviation).max()
    variance_off = (variance - exact_variance).abs()
    allowed = 2e-5 * exact_variance + 1e-13 * exact_mean.square()
    assert (variance_off <= allowed).all(), (variance_off / exact_variance).max()


def draw(*shape: int, dtype: torch.dtype = BFLOAT, mean: float = 0.0) -> Tensor:
    drawn = torch.randn(shape, device=DEVICE) + mean
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return drawn.to(dtype).contiguous(memory_format=layout)


def draw_filters(out: int, channels: int, size: int, dtype: torch.dtype = BFLOAT) -> Tensor:
    return draw(out, channels, size, size, dtype=dtype) * (channels * size**2) ** -0.5


def draw_norm(
    channels: int,
    groups: int = GROUPS,
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
) -> Norm:
    weight = torch.rand(channels, device=DEVICE) + 0.5
    return Norm(weight.to(dtype), draw(channels, dtype=dtype), groups, 1e-5, activation)


def problem_of(
    layer: Layer, images: int, dtype: torch.dtype = BFLOAT, mean: float = -2.3
) -> Problem:
    """Draw the inputs of a layer."""
    channels, size, second = layer.channels, layer.result_size, layer.second_channels
    filters = partial(draw_filters, channels=channels, size=layer.kernel_size, dtype=dtype)
    return Problem(
        draw(images, channels, layer.size, layer.size, dtype=dtype, mean=mean),
        draw_norm(channels), filters(layer.out_channels), layer.stride, (layer.padding,) * 4,
        draw(images, layer.out_channels, size, size, dtype=dtype) if layer.adds else None,
        GROUPS if layer.measures else None,
        filters(second) if second else None,
    )  # fmt: skip


def tensors_of(found: Fused) -> list[Tensor]:
    return [tensor for tensor in found if tensor is not None]


def assert_same_bits(found: Fused, expected: Fused) -> None:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


def drawn_problem(dtype: torch.dtype) -> Problem:
    while True:
        images, height, width = (random.randint(1, most) for most in (5, 40, 40))
        channels, out, second = (8 * random.randint(1, most) for most in (40, 40, 20))
        size, stride = random.choice((1, 3)), random.choice((1, 2))
        padding = tuple(random.randint(0, size - 1) for _ in range(4))
        groups, next_groups = (
            random.choice([g for g in (1, 2, 4, 8, 16, 32) if why_no_factors(n, g) is None])
            for n in (channels, out)
        )
        convolution = Convolution(
            (images, channels, height, width), dtype, size, stride, padding, out, activation="relu"
        )  # fmt: skip
        if why_unsuited(convolution) is not None:
            continue
        result_shape = images, out, *convolution.result_size
        if min(result_shape[2] * result_shape[3], height * width) < 2:
            continue  # of a single pixel's few channels the statistics are a matter of rounding
        return Problem(
            draw(images, channels, height, width, dtype=dtype, mean=-2.3),
            draw_norm(channels, groups, random.choice((dtype, torch.float32))),
            draw_filters(out, channels, size, dtype), stride, padding,
            draw(*result_shape, dtype=dtype) if random.random() < 0.5 else None,
            next_groups,
            draw_filters(second, channels, size, dtype) if random.random() < 0.3 else None,
        )  # fmt: skip


def identity_of(channels: int) -> Tensor:
    return torch.eye(channels, device=DEVICE, dtype=BFLOAT)[:, :, None, None]
