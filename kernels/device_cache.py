"""A cache of tensors on a device that is safe with CUDA graphs.

While a call is recorded in a CUDA graph, its allocations lie in memory of the graph, which other tensors use as
soon as the call has ended: what is kept must not lie there. torch.compile's graphs ("reduce-overhead") allocate
there already in the calls before, which cannot be noticed: the allocator gives the calling *thread* the graph's
memory. So what is kept is made in another thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class DeviceCache(Generic[Made]):
    """Keeps what a function returns, by its arguments, for those used last.

    While a CUDA graph is recorded nothing new is made, since that would be a copy from the host. What is found
    then is kept for good, since each replay of the graph reads it.
    """

    def __init__(self, make: Callable[..., Made], most: int) -> None:
        """Keep at most ``most`` results of ``make``, besides those that graphs read."""
        self._make = make
        self._most = most
        self._latest: OrderedDict[Hashable, Made] = OrderedDict()
        self._in_graphs: dict[Hashable, Made] = {}
        self._lock = threading.Lock()

    def get(self, *arguments: Hashable) -> Made | None:
        """Return ``make(*arguments)``; None if it is not kept yet and a graph is being recorded."""
        is_recorded = is_capturing()
        with self._lock:
            found = self._find(arguments)
            if found is not None and is_recorded:
                self._in_graphs[arguments] = found
        if found is not None or is_recorded:
            return found
        with ThreadPoolExecutor(1) as other_thread:
            made = other_thread.submit(self._make, *arguments).result()
        with self._lock:
            self._latest[arguments] = made
            if len(self._latest) > self._most:
                self._latest.popitem(last=False)
        return made

    def _find(self, arguments: Hashable) -> Made | None:
        if arguments not in self._latest:
            return self._in_graphs.get(arguments)
        self._latest.move_to_end(arguments)
        return self._latest[arguments]
