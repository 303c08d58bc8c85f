"""From images to vectors, batch by batch: threads decode ahead, the model takes what is ready."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast.embedding.embedder import Embedder
from bitfast.embedding.inputs import Item, read_item
from bitfast.embedding.store import BatchResult
from bitfast.images.files import describe_unusable, one_line

Batch = tuple[int, Sequence[Item]]
"""A number and the items that go through the model together."""

BATCHES_AHEAD = 2
"""How many batches are decoded, or being decoded, while the model computes."""


DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What is no fault of an image's, and would befall the others as well."""


def embed_batches(
    embedder: Embedder, batches: Iterable[Batch], workers: int, dtype: np.dtype
) -> Generator[BatchResult, None, None]:
    """Yield what comes of each batch, in their order. A result depends on its batch alone.

    Args:
        embedder: The model.
        batches: Taken as they are needed.
        workers: Threads that read and preprocess images.
        dtype: Of the results' vectors: float32 or float16.

    Raises:
        torch.OutOfMemoryError: a batch does not fit the device's memory.
        torch.AcceleratorError: the device does not go on.
    """

    def prepare(item: Item) -> Tensor | str:
        """Return the pixel_values (C, H, W), or what is wrong."""
        try:
            return embedder.preprocess(read_item(item))
        except Exception as error:  # broken files make Pillow's decoders raise nearly anything
            return describe_unusable(error)

    # Pillow loads its rarer formats when it first needs them, and not safely for threads.
    Image.init()
    with _threads(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of files that it can read all the same
        ahead: deque[tuple[Batch, list[Future[Tensor | str]]]] = deque()
        for batch in batches:
            ahead.append((batch, [pool.submit(prepare, item) for item in batch[1]]))
            if len(ahead) > BATCHES_AHEAD:
                yield _finish(embedder, *ahead.popleft(), dtype)
        while ahead:
            yield _finish(embedder, *ahead.popleft(), dtype)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch computes with one thread: there are enough of them."""
    # torch keeps a number for each thread, and what was set last for new threads.
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        count, thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _finish(
    embedder: Embedder, batch: Batch, prepared: Sequence[Future[Tensor | str]], dtype: np.dtype
) -> BatchResult:
    number, items = batch
    pixels = [future.result() for future in prepared]
    outcomes: list[np.ndarray | str] = [p if isinstance(p, str) else "" for p in pixels]
    # Without a center crop the sizes may differ, and only equal ones go together.
    by_shape: dict[torch.Size, dict[int, Tensor]] = {}
    for index, image in enumerate(pixels):
        if isinstance(image, Tensor):
            by_shape.setdefault(image.shape, {})[index] = image
    for images in by_shape.values():
        found = _vectors(embedder, torch.stack(list(images.values())), dtype)
        for index, outcome in zip(images, found, strict=True):
            outcomes[index] = outcome

    names, vectors, failures = [], [], []
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, str):
            failures.append((item.name, outcome))
        else:
            names.append(item.name)
            vectors.append(outcome)
    none = np.empty((0, embedder.dimension), dtype)
    return BatchResult(number, names, np.stack(vectors) if vectors else none, failures)


def _vectors(embedder: Embedder, images: Tensor, dtype: np.dtype) -> list[np.ndarray | str]:
    """Return each image's vector, or what is wrong."""
    try:
        vectors = embedder.vectors(images)
    except DEVICE_ERRORS:
        raise
    except (RuntimeError, ValueError) as error:
        return [f"the model fails: {one_line(error)}"] * len(images)
    computed = vectors.numpy()
    with np.errstate(over="ignore"):
        stored = computed.astype(dtype)
    outcomes: list[np.ndarray | str] = []
    for vector, as_stored in zip(computed, stored, strict=True):
        if not np.isfinite(vector).all():
            dtype_name = str(embedder.model.dtype).removeprefix("torch.")
            outcomes.append(f"the model's output in {dtype_name} is not finite")
        elif not np.isfinite(as_stored).all():
            largest = np.abs(vector).max()
            outcomes.append(f"{dtype.name} cannot hold its vector, of numbers up to {largest:.4g}")
        else:
            outcomes.append(as_stored)
    return outcomes
