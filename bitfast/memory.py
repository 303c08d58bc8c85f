"""Keeping the C library from giving memory back to the system that the next layer asks for again."""

from __future__ import annotations

from functools import lru_cache

import torch

LARGEST_BLOCK = 2**25 - 2**16
"""Bytes: a little less than the 32 MiB from which on glibc maps each block by itself, whatever was freed."""


def keep_freed_memory() -> None:
    """Let the heap keep up to 64 MiB of freed memory, in this process, from now on.

    Fresh pages cost more time than what a network writes to them. glibc returns freed memory at the end of
    the heap once it is more than twice the largest mapped block that was ever freed (man mallopt,
    M_TRIM_THRESHOLD and M_MMAP_THRESHOLD), at first 128 KiB. So one large block is asked for and freed; it is
    never touched, and costs nothing. Under another C library nothing happens. A compiler calls this when it
    traces.
    """
    _ask_for_a_large_block()


@lru_cache
def _ask_for_a_large_block() -> None:
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


# What torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton.
keep_freed_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]
