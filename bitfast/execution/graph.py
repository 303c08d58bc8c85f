"""A plan recorded as a CUDA graph, for settings in which the host takes longer than the device.

Images are copied in and results are copied out, so that a caller never holds memory of the graph. A graph is of
one plan: where that is replaced, because weights or modules have changed, so is the graph.
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
"""Runs before the recording: libraries choose their algorithms, and load their kernels, when they first meet a
shape, which cannot be recorded."""


class Recording(Protocol):
    """Work of a device that was recorded with the tensors that it reads and writes."""

    results: Results

    def replay(self) -> None:
        """Do the work again, on the current stream."""

    @contextmanager
    def after_others(self) -> Iterator[None]:
        """Within the block, let the current stream wait for what other streams do with the tensors."""


Recorder = Callable[[Callable[[], Results]], Recording]
"""Records what a function does."""


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
        # Other threads may go on to use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.results = function()
        self._done = torch.cuda.Event()
        self._done.record()

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    @contextmanager
    def after_others(self) -> Iterator[None]:
        """Within the block, let the current stream wait for what other streams do with the tensors."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        yield
        self._done.record(stream)


class GraphedPlan:
    """Runs a plan by replaying what it did once.

    Args:
        run: Of the plan: computes the network for channels_last images, with weights that stay where they are.
        images: Of the shape, dtype and device that the plan is for.
        recorder: Records on the device.
    """

    def __init__(
        self, run: Callable[[Tensor], Results], images: Tensor, recorder: Recorder
    ) -> None:
        self._lock = threading.Lock()
        with torch.inference_mode(False), torch.no_grad():
            self._images = images.clone(memory_format=torch.channels_last)
            _thread_state.is_recording = True
            try:
                self._recording = recorder(lambda: run(self._images))
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
    """What this thread is at."""

    is_recording = False


_thread_state = _ThreadState()


def is_recorded_by_others() -> bool:
    """Whether somebody else records the current stream: a user, or ``torch.compile``."""
    return is_capturing() and not _thread_state.is_recording


def may_replay() -> bool:
    """Whether a graph may be replayed now: nobody records one, which could not hold another."""
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
