"""Worker processes that make micro-batches, and the process that gets them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bitfast.finetuning.dataset import Problem
from bitfast.finetuning.errors import FinetuningError
from bitfast.images.files import one_line


class LoadingError(FinetuningError):
    """Images cannot be loaded any more."""


@dataclass(frozen=True)
class MicroBatch:
    """Images that go through the network together.

    Attributes:
        images: uint8, (n, 3, crop, crop), channels_last; in pinned memory if that was asked for.
        labels: int64, (n,).
        indices: int64, (n,): of the images in the data set (in training, of those that stand for them).
        problems: Images that could not be decoded, by index; each once in the life of a loader.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    problems: dict[int, Problem]

    def pin_memory(self) -> MicroBatch:
        """Return it in pinned memory; called by torch's DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Loading:
    """Lets workers make micro-batches, and hands them on in order."""

    def __init__(self, images: TorchDataset, workers: int, pin_memory: bool) -> None:
        self._images, self._workers, self._pin_memory = images, workers, pin_memory
        self.problems: dict[int, Problem] = {}
        self.waited = 0.0

    def run(self, tasks: Iterable[tuple[int, ...]]) -> Generator[MicroBatch]:
        """Yield the micro-batch of each task.

        Raises:
            LoadingError: images cannot be loaded any more.
        """
        began = time.perf_counter()
        loader: Any = DataLoader(
            self._images,
            batch_size=None,
            sampler=tasks,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            worker_init_fn=_begin_worker,
            multiprocessing_context=_worker_context(self._images) if self._workers else None,
            # Workers need no seeds, and without its own generator it would draw them from torch's.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        try:
            while True:
                batch = next(batches, None)
                self.waited += time.perf_counter() - began
                if batch is None:
                    return
                if isinstance(batch, LoadingError):
                    failure = str(batch)
                    break
                new = {i: bad for i, bad in batch.problems.items() if i not in self.problems}
                self.problems.update(new)
                yield replace(batch, problems=new)
                began = time.perf_counter()
        except RuntimeError as error:
            failure = f"loading images: {one_line(error)}"
        except (EOFError, OSError):  # it was about to send an image
            failure = "loading images: a worker process ended unexpectedly"
        finally:
            # Ends the workers. No error may refer to it, which would end them late, and only by force.
            del batches
        raise LoadingError(failure)


def _worker_context(images: TorchDataset) -> Any:
    """Return how workers are started: from a server without threads, which has what they import.

    A copy of this process could wait forever for a lock that one of its threads held.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([type(images).__module__])
    return context


def _begin_worker(number: int) -> None:
    # Control-C goes to all processes of a terminal; whether the work ends is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """End this worker when the main process has ended, however that was.

    torch's workers look whether their parent lives; but that is the server, which lives as long as they do.
    """
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch
