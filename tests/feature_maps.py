"""Inputs for the tests of same_padding; without hypothesis, which machines with a GPU may lack."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    seed: int | None = None,
) -> Tensor:
    """Return numbers with many ties, as ReLU leaves them, between -0.5 and 2."""
    if seed is not None:
        torch.manual_seed(seed)
    x = torch.randint(-4, 9, shape).clamp_min(-2) / 4
    return x.to(dtype).contiguous(memory_format=layout)


def away_from_kinks(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str
) -> Tensor:
    """Return the gradient without what belongs to values so close to 0 that rounding decides their sign.

    There the derivatives of relu and selu jump, and one such pixel outweighs every other error.
    """
    if activation not in ("relu", "selu"):
        return grad
    normalized = torch.group_norm(
        x.detach().double().contiguous(),
        groups,
        weight.detach().double(),
        bias.detach().double(),
        1e-5,
    )
    return grad.clone().masked_fill_(normalized.abs() < 1e-3, 0.0)
