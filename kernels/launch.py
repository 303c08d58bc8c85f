"""What a kernel launch is, as data: it can be run, compiled ahead of time, counted and looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """What launch shapes depend on: the number of multiprocessors and the bytes of the L2 cache."""

    multiprocessors: int
    l2_bytes: int


H100 = Device(multiprocessors=132, l2_bytes=50 * 2**20)
"""Stands in where a launch is planned without a GPU: in the interpreter and for ahead-of-time builds."""


def device_of(device: torch.device) -> Device:
    """Return the limits of the GPU that a tensor lies on."""
    return _cuda_device(device.index) if device.type == "cuda" else H100


@lru_cache
def _cuda_device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: The Triton function.
        programs: How many instances of it run.
        arguments: Tensors and numbers, in the order of the kernel's parameters.
        constants: What the kernel is compiled for.
        warps: Of 32 threads each, per program.
        reads: Bytes that must come from device memory.
        writes: Bytes that must go there.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    reads: int
    writes: int

    def run(self, kernel: Any = None) -> None:
        """Launch on the current stream of the current device; ``kernel`` may stand in for the own one."""
        kernel = self.kernel if kernel is None else kernel
        kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
