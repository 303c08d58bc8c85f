"""The one rule for layouts: channels_last in, channels_last out; everything else comes back contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfast.torch_state import is_batched


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with channels innermost.

    A tensor that is dense in both layouts (one channel, or 1x1 pixels) counts as contiguous, and so does one
    under ``vmap``, which does not show its layout.
    """
    return (
        not is_batched(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a result whose input is x."""
    return format_for(is_channels_last(x))


def format_for(channels_last: bool) -> torch.memory_format:
    """Return torch.channels_last, or else torch.contiguous_format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return x contiguous in the memory format; under ``vmap``, which knows only one, in that one."""
    return x.contiguous(memory_format=torch.contiguous_format if is_batched(x) else memory_format)


def in_channels_last(x: Tensor) -> Tensor:
    """Return x channels_last."""
    return laid_out(x, torch.channels_last)


def contiguous_nchw(x: Tensor) -> Tensor:
    """Return x contiguous, with the strides of a new tensor even if it has 1x1 pixels."""
    x = x.contiguous()
    return x.view(x.shape[:2])[:, :, None, None] if x.shape[2:] == (1, 1) else x
