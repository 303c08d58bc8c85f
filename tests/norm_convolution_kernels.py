"""The CUDA kernels of norm_convolution, compiled for the CPU, where the library and its plans call them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import backends
from bitfast.backends import Kernel
from bitfast.ops import native_cuda
from bitfast.ops.norm_convolution_cuda import DTYPES, OP
from tests.emulated import H100, emulate, library

SOURCES = ("csrc/norm_convolution.cu", "csrc/norm_convolution_statistics.cu")

LAUNCHES = ("norm_convolution", "norm_convolution_partials", "norm_convolution_factors")


class Kernels:
    """The entries of both sources, as one library that ctypes has loaded.

    Attributes:
        calls: The launches that were made.
        after: Functions of a launch's stream and addresses, called after each launch of that name.
    """

    def __init__(self) -> None:
        # These keep Python's lock meanwhile: the emulation can do one launch at a time.
        self._libraries = [ctypes.PyDLL(library(source)._name) for source in SOURCES]
        self.calls: list[str] = []
        self.after: dict[str, Callable[..., object]] = {}
        self.emulate(0)

    def emulate(self, seed: int) -> None:
        """Let warps take turns in the order that a seed gives."""
        for each in self._libraries:
            emulate(each, H100, seed)

    def __getitem__(self, name: str) -> Any:
        entry = next(each[name] for each in self._libraries if hasattr(each, name))
        launch = name.removeprefix("bitfast_")
        if launch in LAUNCHES:
            entry.errcheck = partial(self._note, launch)
        return entry

    def _note(self, launch: str, problem: Any, _: Any, arguments: Sequence[Any]) -> Any:
        self.calls.append(launch)
        if launch in self.after:
            self.after[launch](*arguments[1:])
        return problem


def serve(monkeypatch: pytest.MonkeyPatch, is_enabled: bool = True) -> Kernels:
    """Let the op, and the lowering for GPUs, use the kernels for CPU tensors; return them.

    Norms are those of Triton, without a demand; so the interpreter must be on where plans are made.

    Args:
        monkeypatch: Of the test.
        is_enabled: Whether the kernels serve without being demanded.
    """
    kernels = Kernels()
    served = dict(backends._kernels)
    served[OP, "native", "cpu"] = Kernel(DTYPES, lambda: None, not is_enabled, None, None)
    del served["group_norm_act", "native", "cpu"]
    triton = served["group_norm_act", "triton", "cpu"]
    served["group_norm_act", "triton", "cpu"] = replace(triton, on_demand=False)
    monkeypatch.setattr(backends, "_kernels", served)
    monkeypatch.setattr(native_cuda, "library", lambda: kernels)
    return kernels


def at(address: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the memory at an address as a tensor."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
