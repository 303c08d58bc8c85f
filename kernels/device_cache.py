"""Tensors that are kept on a device for later calls, and CUDA graphs.

A call may be recorded in a CUDA graph. Its allocations then lie in memory that belongs to the graph and is used
for other tensors as soon as the call has ended; nothing that is kept may lie there. torch.compile's graphs
("reduce-overhead") allocate there already in the calls before, and nothing says so: the allocator is told to
serve the calling *thread* from the graph's memory. So what is kept is made in a thread of its own.
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
    """Keeps what a function makes on a device, by its arguments, as long as they are among the latest.

    While a CUDA graph is recorded nothing is made, for it would be copied from the host; and what is found then
    stays for good, for each replay of the graph reads it again.
    """

    def __init__(self, make: Callable[..., Made], most: int) -> None:
        """Keep at most ``most`` of what ``make`` returns, besides what graphs read."""
        self._make = make
        self._most = most
        self._latest: OrderedDict[Hashable, Made] = OrderedDict()
        self._in_graphs: dict[Hashable, Made] = {}
        self._lock = threading.Lock()

    def get(self, *arguments: Hashable) -> Made | None:
        """Return ``make(*arguments)``; None if it is not there yet and a graph is being recorded."""
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
