"""Calls of the entries of csrc/group_norm_act.cu with CPU tensors, in the emulation of a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfast.ops.group_norm_act_cuda import Call
from tests.emulated import at_page_end, call, library

NAN = float("nan")


def kernels() -> ctypes.CDLL:
    return library("csrc/group_norm_act.cu")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@dataclass
class Norm:
    """One forward pass of the kernels.

    Attributes:
        total: x, or its sum with the residual.
        result: The normalized total.
        mean, rstd: Of each image and group; None if they are not kept.
    """

    total: Tensor
    result: Tensor
    mean: Tensor | None
    rstd: Tensor | None


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    activation: str = "relu",
    *,
    eps: float = 1e-5,
    keeps_statistics: bool = True,
    total: Tensor | None = None,
    result: Tensor | None = None,
) -> Norm:
    """Normalize x, which is channels_last, into poisoned memory (or into ``total`` and ``result``)."""
    images, channels, height, width = x.shape
    result = at_page_end(x, NAN) if result is None else result
    if residual is not None and total is None:
        total = at_page_end(x, NAN)
    maps = [t for t in (x, residual, total, result) if t is not None]
    settings: Any = Call.of(
        (images, channels, height, width), x.dtype, groups, eps, activation, weight.dtype, bias.dtype,
        is_aligned=all(t.data_ptr() % 16 == 0 for t in maps),
    )  # fmt: skip
    bytes_needed = ctypes.c_int64()
    call(
        kernels().bitfast_group_norm_act_workspace,
        ctypes.byref(settings),
        ctypes.byref(bytes_needed),
    )
    workspace = (
        at_page_end(torch.empty(bytes_needed.value // 4), NAN) if bytes_needed.value else None
    )
    statistic = torch.empty(images, groups)
    mean, rstd = (at_page_end(statistic, NAN) if keeps_statistics else None for _ in range(2))
    call(
        kernels().bitfast_group_norm_act_forward, ctypes.byref(settings), None, x, residual, weight, bias,
        total, result, mean, rstd, workspace,
    )  # fmt: skip
    return Norm(x if residual is None else total, result, mean, rstd)


def launch_shape(
    images: int, side: int, channels: int, groups: int = 32, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int, int]:
    """Return (slices, cluster, threads), or (0, slices, tiles) of the kernels in two launches."""
    settings = Call.of((images, channels, side, side), dtype, groups, 1e-5, "relu", dtype, dtype)
    shape = (ctypes.c_int64 * 3)()
    call(kernels().bitfast_group_norm_act_shape, ctypes.byref(settings), ctypes.byref(shape))
    return tuple(shape)  # type: ignore[return-value]
