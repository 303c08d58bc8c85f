"""The entries of the extension's CUDA half (``csrc/*.cu``), called past torch's dispatcher.

An entry launches kernels on a stream. Its first argument points to a structure that is prepared once; from
call to call only addresses and the stream change. ``csrc/gpu.h`` says how entries are written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from bitfast import extension
from bitfast.kernels.launch import as_current

ADDRESS = ctypes.c_void_p

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of ``bitfast::gpu::Dtype``."""


@lru_cache
def library() -> ctypes.CDLL:
    """Return the CUDA half. Tests put kernels that are compiled for the CPU in its place.

    Raises:
        RuntimeError: it cannot be used here; the message says why.
    """
    if extension.CUDA.path is None or extension.CUDA.problem is not None:
        raise RuntimeError(f"there are no CUDA kernels: {extension.CUDA.problem}")
    return ctypes.CDLL(extension.CUDA.path)


def entry(name: str, *argument_types: Any) -> Callable[..., None]:
    """Return a function that calls an entry with such arguments (types of ctypes).

    The function raises RuntimeError, with the entry's own words, if the launch fails.
    """
    # A new object of the function for each caller: its types belong to the object.
    function = library()[name]
    function.argtypes = argument_types
    function.restype = ctypes.c_char_p

    def call(*arguments: Any) -> None:
        problem = function(*arguments)
        if problem is not None:
            raise RuntimeError(f"{name}: {problem.decode()}")

    return call


def workspace_size(name: str, call: object, device: torch.device) -> int:
    """Return how many float32 numbers of memory the launches of a call need besides its arguments.

    Args:
        name: Of the entry that tells the bytes.
        call: Points to the prepared structure.
        device: Where it will be launched.
    """
    wanted = ctypes.c_int64()
    ask = entry(name, ADDRESS, ADDRESS)
    with as_current(device):
        ask(call, ctypes.byref(wanted))
    return wanted.value // 4


__all__ = ["ADDRESS", "DTYPES", "entry", "library", "workspace_size"]
