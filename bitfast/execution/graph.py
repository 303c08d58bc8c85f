"""A plan recorded as a CUDA graph, for settings in which the host takes longer than the device.

Images are copied in and results are copied out, so that a caller never holds memory of the graph. A graph
belongs to one plan: when weights or modules change, the plan is replaced, and the graph with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from bitfast.kernels.device_cache import is_capturing

Results = tuple[list[Tensor], Tensor]
"""The wanted outputs of a plan, and its result."""

WARM_UPS = 2
"""Executions before the recording: at the first of a shape, libraries choose algorithms and load kernels, which
cannot be recorded."""


class Recording(Protocol):
    """Recorded work of a device, together with the tensors that it reads and writes."""

    results: Results

    def replay(self) -> None:
        """Repeat the work, on the current stream."""

    @contextmanager
    def after_others(self) -> Iterator[None]:
        """Let the current stream wait for other streams' use of the tensors, and later ones for the block's."""


Recorder = Callable[[Callable[[], Results]], Recording]
"""Records the work of a function."""


class CudaRecording:
    """A CUDA graph."""

    def __init__(self, function: Callable[[], Results]) -> None:
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.results = function()
        self._done = torch.cuda.Event()
        self._done.record()

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    @contextmanager
    def after_others(self) -> Iterator[None]:
        """Let the current stream wait for other streams' use of the tensors, and later ones for the block's."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        yield
        self._done.record(stream)


class GraphedPlan:
    """Executes a plan by replaying a recording of it.

    Args:
        execute: The method of the plan. It reads weights that stay at their addresses.
        images: Example images, of the shape, dtype and device that the plan is for.
        recorder: Records the work on the device.
    """

    def __init__(
        self, execute: Callable[[Tensor], Results], images: Tensor, recorder: Recorder
    ) -> None:
        self._lock = threading.Lock()
        with torch.inference_mode(False), torch.no_grad():
            self._images = images.clone(memory_format=torch.channels_last)
            _thread_state.is_recording = True
            try:
                self._recording = recorder(lambda: execute(self._images))
            finally:
                _thread_state.is_recording = False

    def execute(self, images: Tensor) -> Results:
        """Compute the network; return the wanted outputs and the result, in new memory."""
        with self._lock, self._recording.after_others():
            self._images.copy_(images)
            self._recording.replay()
            outputs, result = self._recording.results
            copies = {id(x): x.clone() for x in (*outputs, result)}
            return [copies[id(x)] for x in outputs], copies[id(result)]


class _ThreadState(threading.local):
    """Whether this thread records a plan."""

    is_recording = False


_thread_state = _ThreadState()


def is_recorded_by_others() -> bool:
    """Whether a user or ``torch.compile``, not a :class:`GraphedPlan`, records the current stream."""
    return is_capturing() and not _thread_state.is_recording


def may_replay() -> bool:
    """Whether a graph may be replayed now: not while another is recorded, which could not contain it."""
    return not is_capturing()


__all__ = [
    "CudaRecording",
    "GraphedPlan",
    "Recorder",
    "Recording",
    "Results",
    "is_recorded_by_others",
    "may_replay",
]
