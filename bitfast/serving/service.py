"""What a replica does with images, whatever protocol brings them: admits, processes, batches, answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitfast.images.files import ImageTooLargeError, describe_unusable, one_line
from bitfast.serving.batching import Batcher, batch_sizes
from bitfast.serving.engine import Engine, Features
from bitfast.serving.metrics import Metrics
from bitfast.serving.refusals import Refusal, bad_image, overloaded, shutting_down
from bitfast.serving.settings import Settings

T = TypeVar("T")


class Admission:
    """The places of one request's images in the queue."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._images = 0

    def grow_to(self, images: int) -> None:
        """Take places for so many images.

        Raises:
            Refusal: 503: there are not enough now; 413: there never are.
        """
        most = self._service.settings.max_queue
        if images > most:
            raise Refusal(413, f"the request has more than {most} images")
        self._service.reserve(images - self._images)
        self._images = images

    def end(self) -> None:
        """Give the places back."""
        self._service.reserve(-self._images)
        self._images = 0


class Service:
    """A model with its threads: one that runs batches, and as many as there are cores that process images.

    Args:
        settings: Resolved.
        engine: The model; it is warmed up here.
        metrics: Told what happens.
    """

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.is_draining = False
        self._is_broken = False
        self.ongoing_requests = 0
        self._admitted = 0
        cores = settings.cpus_per_replica or 1
        sizes = batch_sizes(settings.batch_size)

        # torch counts threads for each thread that uses it: the model's has all cores, the others one each.
        def prepare() -> None:
            torch.set_num_threads(cores)
            engine.warm_up(sizes)

        self._batcher = Batcher(
            engine.run, sizes, settings.batch_wait, metrics.observe_batch, prepare
        )
        self._pool = ThreadPoolExecutor(
            cores, "bitfast-images", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def is_alive(self) -> bool:
        """Whether the model can still answer."""
        return self._batcher.is_alive() and not self._is_broken

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self.is_alive and not self.is_draining

    @property
    def queue_length(self) -> int:
        """Images that have been admitted and not answered yet."""
        return self._admitted

    async def drain(self) -> None:
        """Refuse new requests, and return when those accepted have been answered."""
        self.is_draining = True
        self._batcher.hurry()
        while self.ongoing_requests:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Answer what has been admitted, and end the threads."""
        self._pool.shutdown()
        self._batcher.close()

    # ---- admission ------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self) -> Iterator[Admission]:
        """Count a request as accepted while the block runs, at first as one image.

        Raises:
            Refusal: 503: the server shuts down, or its queue is full.
        """
        if self.is_draining:
            raise shutting_down()
        admission = Admission(self)
        admission.grow_to(1)
        try:
            yield admission
        finally:
            admission.end()

    def reserve(self, images: int) -> None:
        """Count more images as accepted; fewer, where negative.

        Raises:
            Refusal: 503: the queue has no place for them.
        """
        most = self.settings.max_queue
        if images > 0 and self._admitted + images > most:
            raise overloaded(
                f"the queue is full: {self._admitted} images wait, of at most {most}; try again"
            )
        self._admitted += images
        self.metrics.set_queue(self._admitted)

    # ---- work -----------------------------------------------------------------------------------------

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return ``function(*arguments)``, called in a thread of the pool, unless cancelled before."""
        return await asyncio.wrap_future(self._pool.submit(function, *arguments))

    async def features_of_files(self, files: Sequence[bytes | Refusal]) -> list[Features | Refusal]:
        """Return the features of each image file, or why there are none."""
        return await _all([self._features_of_file(file) for file in files])

    async def features_of_tensors(self, images: Sequence[Tensor]) -> list[Features | Refusal]:
        """Return the features of each image's pixel_values (C, H, W), or why there are none."""
        return await _all([self._features(pixels) for pixels in images])

    async def _features_of_file(self, file: bytes | Refusal) -> Features | Refusal:
        if isinstance(file, Refusal):
            return self._failed(file)
        started = time.perf_counter()
        try:
            pixels = await self.in_pool(self.engine.preprocess, file)
        except ImageTooLargeError as error:
            return self._failed(Refusal(413, one_line(error)))
        except Exception as error:
            return self._failed(bad_image(describe_unusable(error)))
        decoded = time.perf_counter()
        features = await self._features(pixels)
        if isinstance(features, Refusal):
            return features
        ended = time.perf_counter()
        return replace(features, seconds={"decode": decoded - started, "model": ended - decoded})

    async def _features(self, pixels: Tensor) -> Features | Refusal:
        future: Future[Features] = self._batcher.submit(pixels)
        try:
            features = await asyncio.wrap_future(future)
        except ValueError as error:
            return self._failed(bad_image(f"the model cannot take the image: {one_line(error)}"))
        except Exception as error:
            # A GPU that has failed so fails until its process ends.
            self._is_broken |= isinstance(error, torch.AcceleratorError)
            return self._failed(Refusal(500, f"the model fails: {one_line(error)}"))
        if not features.logits.isfinite().all():
            message = f"the model's output in {self.engine.dtype} is not finite"
            return self._failed(Refusal(500, message))
        self.metrics.count_image()
        return features

    def _failed(self, refusal: Refusal) -> Refusal:
        self.metrics.count_failure()
        return refusal


async def _all(coroutines: Sequence[Any]) -> list[Any]:
    """Return their results, in order. If this is cancelled, so are all of them."""
    return list(await asyncio.gather(*coroutines))
