"""Eager calls without torch's dispatcher: when they are possible, and what they keep between calls.

An operator call takes the host so long, for the dispatcher, autograd and tracers, that a GPU has to wait. Where
nobody has to see the operator, a call finds prepared launches by the metadata of its arguments.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from bitfast.backends import requested_backend

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
"""The types of tensors that eager calls take. Subclasses may want to see each operator."""

_current_device = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def may_launch(op: str, x: Tensor) -> bool:
    """Whether a call of ``op`` may launch Triton kernels without calling an operator.

    It may where x is a plain tensor on a GPU, or on the CPU with the backend "triton" demanded, and where no
    compiler, tracer, mode, function transform or forward-mode differentiation is at work. All other conditions
    depend on the metadata of the arguments only, and are looked at once.
    """
    return (
        type(x) in PLAIN_TYPES
        and (x.is_cuda or (x.is_cpu and requested_backend(op) == "triton"))
        and is_unwatched()
    )


def is_unwatched() -> bool:
    """Whether nobody but the caller and autograd would see an operator call."""
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
    """A dictionary that is cleared when it holds too many values.

    Threads may share it. Where two make a value for one key at once, one of the values is kept.
    """

    def __init__(self, most: int) -> None:
        """Make a cache of at most ``most`` values."""
        super().__init__()
        self.most = most

    def keep(self, key: Hashable, value: Value) -> Value:
        """Keep a value; return it."""
        if len(self) >= self.most:
            self.clear()
        self[key] = value
        return value


def has_unusual_memory(*tensors: Tensor) -> bool:
    """Whether prepared kernels cannot read some tensor at its address.

    It has no memory, is to be read with its sign changed (``is_neg``), or is not aligned to 16 bytes.
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
    """Return the handle of a device's current stream; None if another device is the current one."""
    if device.type != "cuda":
        return 0
    assert _current_device is not None
    assert _raw_stream is not None
    return _raw_stream(device.index) if _current_device() == device.index else None


__all__ = [
    "PLAIN_TYPES",
    "BoundedCache",
    "current_stream",
    "has_unusual_memory",
    "is_unwatched",
    "may_launch",
]
