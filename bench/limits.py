"""The limits of a CPU or GPU, measured: how fast it multiplies matrices, and how fast it copies.

A limit is the best that any probe reached. ``a @ b`` alone would not do: on some processors its library
reaches half of what the convolutions of oneDNN do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .timing import host_timer

PROBE_SECONDS = 0.4
"""How long each probe is repeated; the fastest call counts."""
FEWEST_CALLS = 3
CONVOLUTIONS = {
    "convolution 3x3, 8x512x14x14": (512, 3, 14),
    "convolution 3x3, 8x128x56x56": (128, 3, 56),
    "convolution 1x1, 8x1024x14x14": (1024, 1, 14),
}
"""Channels (in and out), kernel size, and height and width at batch 8; for the CPU."""
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "float16", "bfloat16")}
MATRIX = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of what is copied: much more than caches hold."""


@dataclass(frozen=True)
class Limits:
    """What a GPU can do, or a CPU with one thread count."""

    flops: dict[str, float]  # floating-point operations per second by dtype ("float32", "bfloat16")
    bandwidth: float  # bytes per second of a copy, read and written ones together
    probes: dict[str, float] = field(
        default_factory=dict
    )  # what each one reached, in the same units


def measure(device: str, threads: int) -> Limits:
    """Measure the limits of a GPU, or of a CPU with this many threads; torch keeps the count that it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rates = {dtype: arithmetic_rates(device, dtype) for dtype in DTYPES[device]}
        copies = copy_rates(device)
    finally:
        torch.set_num_threads(before)
    probes = {f"{dtype}, {name}": r for dtype, by in rates.items() for name, r in by.items()}
    flops = {dtype: max(by.values()) for dtype, by in rates.items()}
    return Limits(flops, max(copies.values()), {**probes, **copies})


def copy_rates(device: str) -> dict[str, float]:
    """Return the bytes per second, read and written together, that each probe reaches.

    On a GPU the driver's copy, which ``copy_`` asks for, can be slower than a kernel that moves words of 16
    bytes, as torch's element-wise ones do: on an H100 by a fifth.
    """
    size = COPY_BYTES[device]
    source = torch.ones(size // 4, device=device)
    result = torch.empty_like(source)
    functions: dict[str, Callable[[], Any]] = {
        "copy": partial(result.copy_, source),
        "negation": partial(torch.neg, source, out=result),
    }
    names = functions if device == "cuda" else ["copy"]
    return {f"{name} of {size >> 20} MiB": 2 * size / fastest(functions[name]) for name in names}


@torch.inference_mode()
def arithmetic_rates(device: str, dtype: str) -> dict[str, float]:
    """Return the operations per second that each probe reaches in a dtype."""
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    n = MATRIX[device]
    a, b = (torch.randn(n, n, **options) for _ in range(2))
    rates = {f"{n}x{n} matrices": 2 * n**3 / fastest(partial(torch.mm, a, b))}
    if device == "cpu":
        for name, (channels, kernel, size) in CONVOLUTIONS.items():
            shapes = (8, channels, size, size), (channels, channels, kernel, kernel)
            drawn = (torch.randn(shape, **options) for shape in shapes)
            x, weight = (each.contiguous(memory_format=torch.channels_last) for each in drawn)
            seconds = fastest(partial(F.conv2d, x, weight, padding=kernel // 2))
            rates[name] = 2 * x.numel() * weight[0].numel() / seconds
    return rates


def fastest(function: Callable[[], Any]) -> float:
    timer = host_timer(function)
    timer(1)
    times: list[float] = []
    while len(times) < FEWEST_CALLS or sum(times) < PROBE_SECONDS:
        times.append(timer(1))
    return min(times)
