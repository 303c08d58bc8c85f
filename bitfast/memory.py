"""Keeping the C library from giving memory back to the system that the next layer asks for again."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from bitfast.torch_state import constant_when_compiled

LARGEST_BLOCK = 2**25 - 2**16
"""Bytes: a little less than the 32 MiB from which on glibc maps each block by itself, whatever was freed."""

SWITCH = "BITFAST_KEEP_FREED_MEMORY"
"""The environment variable that turns it off, by "0"."""


@constant_when_compiled
def keep_freed_memory() -> None:
    """Let the heap keep up to 64 MiB of freed memory, in this process, from the first call on.

    Fresh pages cost more time than what a network writes to them (bench/README.md has the figures). glibc
    returns freed memory at the end of the heap once it is more than twice the largest mapped block that was
    ever freed (man mallopt, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD), at first 128 KiB. So one large block is
    asked for and freed; it is never touched, and costs nothing. Under another C library, or where the process
    was started with thresholds of its own (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), nothing happens.

    ``BITFAST_KEEP_FREED_MEMORY=0`` in the environment leaves the heap as it is.
    """
    _ask_for_a_large_block()


@lru_cache
def _ask_for_a_large_block() -> None:
    if os.environ.get(SWITCH) != "0":
        torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")
