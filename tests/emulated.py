"""Kernels of csrc/*.cu, compiled for the CPU: tests/host/gpu_emulation.h stands in for the hardware."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas",
]  # fmt: skip

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of ``bitfast::gpu::Dtype``."""

H100 = (90, 132, 227 * 1024)
A100 = (80, 108, 163 * 1024)
"""Compute capability, multiprocessors, and bytes of shared memory for a block."""


@lru_cache
def library(source: str) -> ctypes.CDLL:
    """Compile a source and load it. It is kept in build/, for other processes too, until a source changes.

    Args:
        source: Its path in the repository: "csrc/<op>.cu" or "tests/host/<name>.cpp".
    """
    path = ROOT / source
    read = [path, *sorted(ROOT.glob("csrc/*.h")), *sorted(ROOT.glob("tests/host/*.h"))]
    contents = hashlib.sha256(" ".join(FLAGS).encode() + b"".join(p.read_bytes() for p in read))
    built = ROOT / "build" / "emulated" / f"{path.stem}-{contents.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        folders = [
            f"-I{folder}" for folder in (ROOT / "csrc", ROOT / "tests/host", *include_paths())
        ]
        mine = built.with_suffix(f".{os.getpid()}")
        command = [
            os.environ.get("CXX", "c++"),
            *FLAGS,
            *folders,
            "-x",
            "c++",
            str(path),
            "-o",
            str(mine),
        ]
        subprocess.run(command, check=True)
        mine.rename(built)
    return ctypes.CDLL(str(built))


def emulate(kernels: ctypes.CDLL, device: tuple[int, int, int] = H100, seed: int = 0) -> None:
    """Let the next launches be those of a device, with the scheduling that a seed gives."""
    kernels.emulate_device(*device, seed)


def emulate_last_cluster_only(kernels: ctypes.CDLL) -> None:
    """Let only the last cluster of each launch run, until the next ``emulate``, as where offsets are large."""
    kernels.emulate_last_cluster_only()


def call(function: Any, *arguments: Any) -> None:
    """Call an entry of a library.

    Args:
        function: Returns null, or an error's text.
        arguments: Tensors stand for their addresses, None for null.

    Raises:
        RuntimeError: what the entry returned.
    """
    function.restype = ctypes.c_char_p
    problem = function(*(_as_c(argument) for argument in arguments))
    if problem is not None:
        raise RuntimeError(problem.decode())


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(0) if argument is None else argument


def at_page_end(like: Tensor, fill: float | None = None) -> Tensor:
    """Return a copy of a dense tensor that ends where its memory does: the kernel faults that reads on.

    The address is a multiple of 16 if the number of bytes is.

    Args:
        like: Of any strides, without gaps.
        fill: Written to each element instead of the copy; NaN where a kernel is to write.
    """
    if like.numel() == 0:
        return torch.empty_like(like)
    count = like.numel() * like.element_size()
    if count == 0:
        return torch.empty_like(like)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, (count + page - 1) // page * page + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    end = address + len(memory) - page
    if libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    first = (len(memory) - page - count) // like.element_size()
    flat = torch.frombuffer(memory, dtype=like.dtype, count=first + like.numel())
    result = flat[first:].as_strided(like.shape, like.stride())
    return result.copy_(like) if fill is None else result.fill_(fill)


def untouched_memory(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that may be larger than the machine's memory: only what is written takes any."""
    count = math.prod(shape)
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names only from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
