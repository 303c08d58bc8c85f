"""group_norm_act by the CUDA kernels of csrc/group_norm_act.cu."""

from __future__ import annotations

import ctypes

import torch

from bitfast.activations import ACTIVATIONS
from bitfast.ops.native_cuda import DTYPES


class ForwardCall(ctypes.Structure):
    """``GroupNormActCall`` of csrc/group_norm_act_cuda.h."""

    _fields_ = [
        ("images", ctypes.c_int64), ("pixels", ctypes.c_int64), ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64), ("eps", ctypes.c_float), ("activation", ctypes.c_int32),
        ("dtype", ctypes.c_int32), ("weight_dtype", ctypes.c_int32), ("bias_dtype", ctypes.c_int32),
        ("is_aligned", ctypes.c_int32),
    ]  # fmt: skip


def forward_call(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    groups: int,
    eps: float,
    activation: str,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    is_aligned: bool = True,
) -> ForwardCall:
    """Return what the entries take; see the op for the arguments."""
    images, channels, height, width = shape
    return ForwardCall(
        images, height * width, channels, groups, eps, list(ACTIVATIONS).index(activation),
        DTYPES[dtype], DTYPES[weight_dtype], DTYPES[bias_dtype], is_aligned,
    )  # fmt: skip
