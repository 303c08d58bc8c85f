"""Eager calls that go past torch's dispatcher: when they may, and what they keep from one call to the next.

An operator call costs a GPU's time to tell the dispatcher, autograd and every tracer what is computed. Where
nobody asks, what a call needs is found by what its arguments are like, and the kernels are launched.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from bitfast.backends import requested_backend

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
"""Subclasses may want to see each operator."""

_current_device = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def may_launch(op: str, x: Tensor) -> bool:
    """Say whether a call of ``op`` may launch Triton kernels by itself.

    It may where x is a plain tensor on a GPU, or on the CPU and the backend "triton" is demanded (a meta tensor
    has nothing to launch a kernel on), and no compiler, tracer, mode, function transform or forward-mode
    differentiation is at work. What else there is to ask has one answer for all calls of like arguments.
    """
    return (
        type(x) in PLAIN_TYPES
        and (x.is_cuda or (x.is_cpu and requested_backend(op) == "triton"))
        and is_unwatched()
    )


def is_unwatched() -> bool:
    """Say whether nobody but the caller and autograd would see an operator that is called now."""
    return not (
        torch.compiler.is_compiling()  # first: a compiler that traces this goes no further
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


Value = TypeVar("Value")


class BoundedCache(dict[Hashable, Value], Generic[Value]):
    """Keeps values by what the arguments of calls are like; when there are too many, it begins anew.

    Threads may share it: of two that make the same value at once, one value is kept.
    """

    def __init__(self, most: int) -> None:
        """Keep at most ``most`` values."""
        super().__init__()
        self.most = most

    def keep(self, key: Hashable, value: Value) -> Value:
        """Keep a value; return it."""
        if len(self) >= self.most:
            self.clear()
        self[key] = value
        return value


def has_unusual_memory(*tensors: Tensor) -> bool:
    """Say whether kernels cannot simply read at the address of a tensor.

    It has no memory of its own, is to be read with its sign changed, or is not aligned to 16 bytes, which takes
    other code.
    """
    together = 0
    for x in tensors:
        if x.is_neg():
            return True
        try:
            together |= x.data_ptr()
        except RuntimeError:
            return True
    return together % 16 != 0


def current_stream(device: torch.device) -> int | None:
    """Return the handle of the current stream of a device; None if another device is the current one."""
    if device.type != "cuda":
        return 0
    assert _current_device is not None
    assert _raw_stream is not None
    return _raw_stream(device.index) if _current_device() == device.index else None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


__all__ = [
    "PLAIN_TYPES",
    "BoundedCache",
    "current_stream",
    "has_unusual_memory",
    "is_unwatched",
    "may_launch",
    "on",
]
