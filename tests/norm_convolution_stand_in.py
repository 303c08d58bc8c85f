"""What can serve as the CUDA kernels of norm_convolution on the CPU, for plans and whatever else calls them.

Plain PyTorch is fast. It reads and writes the memory at the addresses that it is given, and refuses calls that
the kernels must not get. The kernels themselves, compiled for the CPU, are slow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import backends
from bitfast.backends import Kernel
from bitfast.ops import native_cuda
from bitfast.ops.norm_convolution_cuda import (
    DTYPES,
    OP,
    Call,
    FactorsCall,
    PartialsCall,
    Prepared,
    factors_shape,
    partials_shape,
)
from tests.emulated import emulate, library

SOURCES = ("csrc/norm_convolution.cu", "csrc/norm_convolution_statistics.cu")

DTYPE_OF = {number: dtype for dtype, number in native_cuda.DTYPES.items()}

STRIP = 64
"""Pixels of a strip; one more, at the end of each image, has none."""


class StandIn:
    """Has the entries of norm_convolution, as a library that ctypes has loaded has them.

    Attributes:
        calls: The names of the entries that were called, without what they are called before a launch.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getitem__(self, name: str) -> Callable[..., bytes | None]:
        entry = {
            "bitfast_norm_convolution_prepare": _prepare,
            "bitfast_norm_convolution": _convolution,
            "bitfast_norm_convolution_strips": _strips,
            "bitfast_norm_convolution_partials": _partials,
            "bitfast_norm_convolution_factors": _factors,
        }[name]
        is_launch = entry not in (_prepare, _strips)

        def call(told: Any, *arguments: Any) -> bytes | None:
            if is_launch:
                self.calls.append(name.removeprefix("bitfast_"))
            try:
                entry(told._obj, *arguments)
            except AssertionError as error:
                return str(error).encode()
            return None

        return call


class Emulated:
    """The kernels, compiled for the CPU, of which several sources make one library."""

    def __init__(self) -> None:
        self._libraries = [library(source) for source in SOURCES]
        for each in self._libraries:
            emulate(each)

    def __getitem__(self, name: str) -> Any:
        return next(each[name] for each in self._libraries if hasattr(each, name))


KERNELS: list[Any] = [StandIn, Emulated]
"""For tests that call either."""


def serve(monkeypatch: pytest.MonkeyPatch, kernels: Any, is_enabled: bool = True) -> None:
    """Let the op, and the lowering for GPUs, use these kernels for CPU tensors.

    Norms are those of Triton, without a demand; so the interpreter must be on where plans are made.

    Args:
        monkeypatch: Of the test.
        kernels: :class:`StandIn` or :class:`Emulated`.
        is_enabled: Whether the kernels serve without being demanded.
    """
    served = dict(backends._kernels)
    served[OP, "native", "cpu"] = Kernel(DTYPES, lambda: None, not is_enabled, None, None)
    del served["group_norm_act", "native", "cpu"]
    triton = served["group_norm_act", "triton", "cpu"]
    served["group_norm_act", "triton", "cpu"] = replace(triton, on_demand=False)
    monkeypatch.setattr(backends, "_kernels", served)
    monkeypatch.setattr(native_cuda, "library", lambda: kernels)


def use_stand_in(monkeypatch: pytest.MonkeyPatch, is_enabled: bool = True) -> StandIn:
    """Let plain PyTorch serve as the kernels, as :func:`serve` says; return it."""
    kernels = StandIn()
    serve(monkeypatch, kernels, is_enabled)
    return kernels


def at(address: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the memory at an address as a tensor."""
    assert address, "an address is missing"
    assert address % 16 == 0, "an address is no multiple of 16"
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def map_at(
    address: int, dtype: torch.dtype, images: int, height: int, width: int, channels: int
) -> Tensor:
    """Return the feature map at an address: (N, C, H, W), channels_last."""
    return at(address, dtype, (images, height, width, channels)).permute(0, 3, 1, 2)


def strips_of(pixels: int) -> int:
    """How many strips an image is cut into."""
    return -(-pixels // STRIP) + 1


def measure(x: Tensor, cell_channels: int) -> Tensor:
    """Return the partials of a map, by plain PyTorch in float64."""
    images, channels = x.shape[:2]
    pixels = x.flatten(2).transpose(1, 2).double()
    strips = strips_of(pixels.shape[1])
    result = torch.zeros(partials_shape(images, strips, channels, cell_channels))
    for strip, part in enumerate(pixels.split(STRIP, 1)):
        cells = part.unflatten(2, (-1, cell_channels)).transpose(1, 2).flatten(2)
        mean = cells.mean(2)
        squares = (cells - mean[..., None]).square().sum(2)
        result[:, strip, 0, 0] = part.shape[1]
        result[:, strip, 1:] = torch.stack([mean, squares], 2).float()
    return result


def _prepare(call: Call, to_prepare: Any) -> None:
    assert call.channels % 8 == call.result_channels % 8 == call.second_channels % 8 == 0
    prepared = to_prepare._obj
    prepared.strips = strips_of(call.result_height * call.result_width)
    ctypes.memmove(prepared.arguments, ctypes.byref(call), ctypes.sizeof(Call))


def _convolution(
    prepared: Prepared,
    stream: int,
    x: int,
    factors: int,
    packed: int,
    residual: int,
    result: int,
    partials: int,
    second_packed: int,
    second_result: int,
) -> None:
    call = Call.from_buffer_copy(prepared.arguments)
    dtype, size = DTYPE_OF[call.dtype], call.kernel_size
    source = map_at(x, dtype, call.images, call.height, call.width, call.channels).float()
    assert bool(factors) == bool(call.has_norm), "factors and has_norm disagree"
    if factors:
        told = at(factors, torch.float32, factors_shape(call.images, call.channels))
        scale, shift = told[:, :, :, None, None].unbind(1)
        source = source * scale + shift
        source = (F.relu(source) if call.activation else source).to(dtype).float()
    out_size = call.result_height, call.result_width
    ends = [
        (n - 1) * call.stride + size - first - length
        for n, first, length in zip(
            out_size, (call.top, call.left), (call.height, call.width), strict=True
        )
    ]
    source = F.pad(source, (call.left, ends[1], call.top, ends[0]))  # cuts what no window reaches

    def convolve(address: int, channels: int) -> Tensor:
        chunks = -(-call.channels // 64)
        told = at(address, dtype, (chunks, size**2, 8, channels, 8))
        filters = told.permute(3, 0, 2, 4, 1).reshape(channels, chunks * 64, size, size).float()
        assert not filters[:, call.channels :].any(), "the filters are not padded with zeros"
        return F.conv2d(source, filters[:, : call.channels], None, call.stride)

    made = convolve(packed, call.result_channels)
    place = map_at(result, dtype, call.images, *out_size, call.result_channels)
    assert bool(residual) == bool(call.has_residual), "residual and has_residual disagree"
    if residual:
        made = made + map_at(residual, dtype, call.images, *out_size, call.result_channels).float()
    place.copy_(made)
    assert bool(partials) == bool(call.cell_channels), "partials and cell_channels disagree"
    if partials:
        measured = measure(place, call.cell_channels)
        at(partials, torch.float32, measured.shape).copy_(measured)
    assert bool(second_packed) == bool(second_result) == bool(call.second_channels)
    if second_result:
        second = map_at(second_result, dtype, call.images, *out_size, call.second_channels)
        second.copy_(convolve(second_packed, call.second_channels))


def _strips(call: PartialsCall, strips: Any) -> None:
    strips._obj.value = strips_of(call.pixels)


def _partials(call: PartialsCall, stream: int, x: int, partials: int) -> None:
    assert call.strips == strips_of(call.pixels), "another number of strips was told"
    source = map_at(x, DTYPE_OF[call.dtype], call.images, call.pixels, 1, call.channels)
    measured = measure(source, call.cell_channels)
    at(partials, torch.float32, measured.shape).copy_(measured)


def _factors(
    call: FactorsCall, stream: int, partials: int, weight: int, bias: int, factors: int
) -> None:
    assert call.channels // call.groups % call.cell_channels == 0, "a cell straddles groups"
    shape = partials_shape(call.images, call.strips, call.channels, call.cell_channels)
    told = at(partials, torch.float32, shape).double()
    counts = told[:, :, :1, 0] * call.cell_channels  # of a cell in a strip
    mean, squares = (told[:, :, 1:, n].unflatten(2, (call.groups, -1)) for n in (0, 1))
    counts = counts[..., None].expand_as(mean)
    total = counts.sum((1, 3))
    group_mean = (counts * mean).sum((1, 3)) / total
    deviation = (mean - group_mean[:, None, :, None]).square() * counts
    variance = (squares + deviation).sum((1, 3)) / total
    rstd = (variance + call.eps).rsqrt()
    each = call.channels // call.groups
    group_mean, rstd = group_mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
    scale = rstd * at(weight, DTYPE_OF[call.weight_dtype], (call.channels,)).double()
    shift = at(bias, DTYPE_OF[call.bias_dtype], (call.channels,)).double() - group_mean * scale
    place = at(factors, torch.float32, factors_shape(call.images, call.channels))
    place.copy_(torch.stack([scale, shift], 1))
