"""One buffer for the standardized weights of several convolutions, or for their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.memory_format import is_channels_last

ALIGNMENT = 64
"""Each weight begins at a multiple of so many elements: in 16-bit types at a cache line of 128 bytes."""


def starts_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where weights of these sizes begin in the buffer, and the buffer's size; in elements."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def unpack(packed: Tensor, weights: Sequence[Tensor], channels_last: bool) -> list[Tensor]:
    """Return views of the buffer in the shapes of the weights, differentiable.

    Each is channels_last if its weight is, or if ``channels_last``; else contiguous.
    """
    starts, end = starts_of([weight.numel() for weight in weights])
    lengths = [b - a for a, b in zip(starts, [*starts[1:], end], strict=True)]
    views = []
    for piece, weight in zip(packed.split(lengths), weights, strict=True):
        out, channels, height, width = weight.shape
        flat = piece if piece.shape[0] == weight.numel() else piece[: weight.numel()]
        if channels_last or is_channels_last(weight):
            views.append(flat.view(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            views.append(flat.view(weight.shape))
    return views


def pack(tensors: Sequence[Tensor], channels_last: bool, like: Sequence[Tensor]) -> Tensor:
    """Return a buffer from which :func:`unpack` returns these tensors, which have the shapes of ``like``."""
    pieces = []
    for tensor, weight in zip(tensors, like, strict=True):
        if channels_last or is_channels_last(weight):
            tensor = tensor.permute(0, 2, 3, 1)
        pieces.append(F.pad(tensor.flatten(), (0, -tensor.numel() % ALIGNMENT)))
    return torch.cat(pieces)
