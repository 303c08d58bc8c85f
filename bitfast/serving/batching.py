"""Dynamic batches: images of many requests that go through the model together, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST_SIZES = 8
"""Sizes of batches, at most: as many CUDA graphs as a network keeps."""


def batch_sizes(largest: int) -> list[int]:
    """Return the sizes that batches are rounded up to, ascending, ``largest`` last, at most eight.

    All sizes up to 8; beyond, powers of two. If these are too many, the smallest but 1 are left out.
    """
    if largest <= MOST_SIZES:
        return list(range(1, largest + 1))
    powers = [2**exponent for exponent in range(1, largest.bit_length()) if 2**exponent < largest]
    return [1, *[*powers, largest][1 - MOST_SIZES :]]


@dataclass
class _Waiting:
    pixels: Tensor
    result: Future[Any]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects images and runs them through a model, batch after batch, in one thread.

    A batch starts when ``batch_size`` images of one shape wait, or the oldest has waited for ``batch_wait``
    seconds. An image whose future is cancelled before that never reaches the model.

    Args:
        run: Takes a batch (size, C, H, W), returns one result for each image. Called in the thread only.
        sizes: The sizes that a batch is rounded up to, ascending; the last is the most images in one. Rows that
            fill it up are zeros; their results are dropped.
        batch_wait: In seconds.
        observe: Told the images and the seconds of each batch.
        prepare: Called in the thread first, and waited for; what it raises is raised here.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Sequence[Any]],
        sizes: Sequence[int],
        batch_wait: float,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._sizes = list(sizes)
        self._batch_wait = batch_wait
        self._observe = observe
        self._prepare = prepare
        self._queues: dict[torch.Size, deque[_Waiting]] = {}
        self._prepared: Future[None] = Future()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bitfast-model", daemon=True)
        self._thread.start()
        self._prepared.result()

    def submit(self, pixels: Tensor) -> Future[Any]:
        """Let an image (C, H, W) wait for its batch, and return its future result.

        Raises:
            RuntimeError: the batcher is closed.
        """
        waiting = _Waiting(pixels, Future())
        with self._changed:
            if self._closed:
                raise RuntimeError("the server shuts down")
            self._queues.setdefault(pixels.shape, deque()).append(waiting)
            self._changed.notify()
        return waiting.result

    def hurry(self) -> None:
        """From now on let no image wait for others."""
        with self._changed:
            self._batch_wait = 0.0
            self._changed.notify()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Run the batches that wait, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._prepare()
        except BaseException as error:
            self._prepared.set_exception(error)
            return
        self._prepared.set_result(None)
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            # Once running, a future can no longer be cancelled.
            batch = [waiting for waiting in batch if waiting.result.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        try:
            results = self._run(self._padded([waiting.pixels for waiting in batch]))
        except BaseException as error:  # whatever it is, others still need the thread
            failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            for waiting in batch:
                waiting.result.set_exception(failure)
            return
        self._observe(len(batch), time.perf_counter() - started)
        for waiting, result in zip(batch, results, strict=False):  # padding has results too
            waiting.result.set_result(result)

    def _padded(self, images: list[Tensor]) -> Tensor:
        size = next(size for size in self._sizes if size >= len(images))
        batch = images[0].new_zeros(size, *images[0].shape)
        torch.stack(images, out=batch[: len(images)])
        return batch

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for a batch and take it; None when closed and nothing waits."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if not self._queues:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                now = time.monotonic()
                due, shape = min((self._due(queue), shape) for shape, queue in self._queues.items())
                if due <= now or self._closed:
                    queue = self._queues[shape]
                    return [queue.popleft() for _ in range(min(len(queue), self._sizes[-1]))]
                self._changed.wait(due - now)

    def _due(self, queue: deque[_Waiting]) -> float:
        """Return when a queue's next batch may start: at once if it is full."""
        is_full = len(queue) >= self._sizes[-1]
        return queue[0].since + (0 if is_full else self._batch_wait)

    def _forget_cancelled(self) -> None:
        for shape, queue in list(self._queues.items()):
            kept = deque(waiting for waiting in queue if not waiting.result.cancelled())
            if kept:
                self._queues[shape] = kept
            else:
                del self._queues[shape]
