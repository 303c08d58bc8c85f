"""Memory that shows what a kernel writes and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, or of 255, until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills new memory then
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Guarded:
    """A tensor full of NaN amid sentinels."""

    SENTINEL = 77.0

    def __init__(self, like: Tensor, margin: int = 64) -> None:
        self.margin = margin
        self.buffer = torch.full(
            (like.numel() + 2 * margin,), self.SENTINEL, dtype=like.dtype, device=like.device
        )
        inside = self.buffer[margin : margin + like.numel()]
        self.tensor = inside.as_strided(like.shape, like.stride(), margin).fill_(float("nan"))

    def check(self) -> None:
        assert not self.tensor.isnan().any(), "an element was not written"
        ends = torch.cat([self.buffer[: self.margin], self.buffer[self.margin :][-self.margin :]])
        assert (ends == self.SENTINEL).all(), "written past an end"
