"""Threads of Python that work at the same time, and how many torch works with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call work(0), work(1), ... each in its own thread, all at once; raise the first error."""
    all_are_there = threading.Barrier(count)

    def start(number: int) -> None:
        all_are_there.wait(60)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(start, number) for number in range(count)]:
            future.result()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
