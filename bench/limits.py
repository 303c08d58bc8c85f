"""The machine's limits, measured: how fast it multiplies matrices, and how fast it copies.

A limit is the best that any probe reached. ``a @ b`` alone would not do: on some processors its library
reaches half of what the convolutions of oneDNN do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COPY_BYTES = 2**28
"""Bytes of the tensor that is copied: much more than caches hold."""
PROBE_SECONDS = 0.4
"""How long each probe is repeated; the fastest call counts."""
FEWEST_CALLS = 3

CONVOLUTIONS = {
    "convolution 3x3, 8x512x14x14": (512, 3, 14),
    "convolution 3x3, 8x128x56x56": (128, 3, 56),
    "convolution 1x1, 8x1024x14x14": (1024, 1, 14),
}
"""Channels (in and out), kernel size, and height and width at batch 8."""
MATRIX = 1536
"""Rows and columns of the matrices that are multiplied."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do with one thread count.

    Attributes:
        flops: Floating-point operations per second by dtype ("float32", "bfloat16").
        bandwidth: Bytes per second of a copy, read and written ones together.
        probes: What each probe reached, by name: operations or bytes per second.
    """

    flops: dict[str, float]
    bandwidth: float
    probes: dict[str, float] = field(default_factory=dict)

    def arithmetic_fraction(self, flops: float, dtype: str, seconds: float) -> float:
        """Return the share of the arithmetic limit that so many operations in this time are."""
        return flops / seconds / self.flops[dtype]

    def copy_fraction(self, count: float, seconds: float) -> float:
        """Return the share of the copy bandwidth that so many bytes in this time are.

        It may be larger than 1 where everything fits into a cache.
        """
        return count / seconds / self.bandwidth


def measure(threads: int) -> Limits:
    """Measure the limits with this many threads; torch keeps the count that it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        probes = {
            f"{dtype}, {name}": rate
            for dtype in ("float32", "bfloat16")
            for name, rate in arithmetic_rates(getattr(torch, dtype)).items()
        }
        flops = {
            dtype: max(rate for name, rate in probes.items() if name.startswith(f"{dtype},"))
            for dtype in ("float32", "bfloat16")
        }
        bandwidth = copy_rate()
        return Limits(flops, bandwidth, {**probes, f"copy of {COPY_BYTES >> 20} MiB": bandwidth})
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def arithmetic_rates(dtype: torch.dtype) -> dict[str, float]:
    """Return the operations per second that each probe reaches in a dtype."""
    a, b = (torch.randn(MATRIX, MATRIX, dtype=dtype) for _ in range(2))
    rates = {f"{MATRIX}x{MATRIX} matrices": 2 * MATRIX**3 / fastest(lambda: a @ b)}
    for name, (channels, kernel, size) in CONVOLUTIONS.items():
        x, weight = convolution_inputs(channels, kernel, size, dtype)
        flops = 2 * x.numel() * weight[0].numel()
        padding = kernel // 2
        rates[name] = flops / fastest(partial(F.conv2d, x, weight, padding=padding))
    return rates


def convolution_inputs(
    channels: int, kernel: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a batch of feature maps and a weight, channels_last."""
    x = torch.randn(8, channels, size, size, dtype=dtype)
    weight = torch.randn(channels, channels, kernel, kernel, dtype=dtype)
    return (
        x.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
    )


def copy_rate() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / fastest(lambda: target.copy_(source))


def fastest(function: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of some calls."""
    function()
    times: list[float] = []
    while len(times) < FEWEST_CALLS or sum(times) < PROBE_SECONDS:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
