"""What ``bitfast embed`` does: find the images, embed what is left to do, write the output."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitfast
from bitfast.commands.classify import default_model, find_device
from bitfast.embedding import output
from bitfast.embedding.embedder import Embedder
from bitfast.embedding.inputs import Item, find_items, fingerprint, read_list
from bitfast.embedding.pipeline import Batch, embed_batches
from bitfast.embedding.store import BatchResult, Store, StoreError
from bitfast.extras import MissingExtraError, require_extra
from bitfast.images.files import one_line

SUCCESS, SOME_FAILED, USAGE_ERROR = 0, 1, 2
MOST_THREADS = 32

SECONDS_BETWEEN_LINES = 60.0
"""Of progress, where there is no bar."""


class UsageError(Exception):
    """The command cannot do what the arguments say; the message says why."""


@dataclass(frozen=True)
class Work:
    """What is to be done, and with what.

    Attributes:
        items: The images.
        model: Folder or name of the checkpoint.
        embedder: The model, loaded. Workers of a cluster load their own.
        arguments: The rest.
    """

    items: Sequence[Item]
    model: str
    embedder: Embedder
    arguments: argparse.Namespace

    @property
    def dtype(self) -> np.dtype:
        """Of the vectors in the output."""
        return np.dtype(self.arguments.store)

    def batches(self, done: set[int]) -> Iterator[Batch]:
        """Yield the batches that are not done yet."""
        size = self.arguments.batch_size
        for number, begin in enumerate(range(0, len(self.items), size)):
            if number not in done:
                yield number, self.items[begin : begin + size]

    def settings(self, device: str) -> dict[str, str]:
        """Return what the vectors depend on. Those of one run are all of the same."""
        arguments = self.arguments
        return {
            "the images:": f"{len(self.items)} ({fingerprint(self.items)[:16]})",
            "--layer": arguments.layer,
            "--store": arguments.store,
            "--batch-size": str(arguments.batch_size),
            "--dtype": arguments.dtype,
            "--device": device,
            "the weights of --model:": fingerprint_of_model(self.embedder),
        }


def run(arguments: argparse.Namespace) -> int:
    """Embed the images and return the exit status."""
    started = time.perf_counter()
    try:
        check_environment(arguments)
        if arguments.ray is None:
            return _run_here(arguments, started)
        return _run_on_ray(arguments, started)
    except (MissingExtraError, StoreError, UsageError) as error:
        print(f"bitfast: error: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except torch.OutOfMemoryError as error:
        message = f"{one_line(error).partition('. ')[0]}; a smaller --batch-size needs less"
        print(f"bitfast: error: {message}", file=sys.stderr)
        return USAGE_ERROR
    except torch.AcceleratorError as error:
        print(f"bitfast: error: the device fails: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        if partial_path(arguments.output).exists():
            print("bitfast: the same command again goes on from here", file=sys.stderr)
        raise
    except OSError as error:
        # Each image's error is in the table; this is of the output, or of what has been done so far.
        path = str(arguments.output)
        print(f"bitfast: error: {path!r} cannot be written: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR


def check_environment(arguments: argparse.Namespace) -> None:
    """Check that the packages are there and the output is free, before anything takes time.

    Raises:
        MissingExtraError, UsageError: they are not.
    """
    if arguments.output.suffix == ".parquet":
        require_extra("bitfast embed --output FILE.parquet", "embed")
    if arguments.ray is not None:
        require_extra("bitfast embed --ray", "ray")
    if not partial_path(arguments.output).exists():
        _check_free(arguments)


def _check_free(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise UsageError(f"{str(arguments.output)!r} exists; --overwrite replaces it")


def partial_path(path: Path) -> Path:
    """Return where the work that is done so far is kept."""
    return path.with_name(f"{path.name}.partial")


# ---- where it runs ------------------------------------------------------------------------------


def _run_here(arguments: argparse.Namespace, started: float) -> int:
    try:
        device = find_device(arguments.device)
    except ValueError as error:
        arguments.refuse(f"argument --device: {one_line(error)}")
    work = _prepare(arguments, device)
    workers = arguments.workers or default_threads()
    with Store(
        partial_path(arguments.output), work.settings(device.type), arguments.overwrite
    ) as store:
        batches = work.batches(_done(store, work))
        _collect(store, work, embed_batches(work.embedder, batches, workers, work.dtype))
        return _finish(store, work, started)


def _run_on_ray(arguments: argparse.Namespace, started: float) -> int:
    from bitfast.embedding import cluster

    work = _prepare(arguments, torch.device("cpu"))
    try:
        with cluster.connect(arguments.ray):
            return _run_on_cluster(work, started)
    except cluster.ClusterError as error:
        raise UsageError(f"--ray: {error}") from error


def _run_on_cluster(work: Work, started: float) -> int:
    from bitfast.embedding import cluster

    arguments = work.arguments
    plan = cluster.plan_workers(arguments.ray_workers, arguments.device)
    worker = cluster.WorkerSettings(
        os.getcwd(),
        work.model,
        plan.device,
        arguments.dtype,
        arguments.layer,
        arguments.workers or plan.cpus,
        arguments.store,
    )
    device = cluster.device_type(plan.device)
    with Store(partial_path(arguments.output), work.settings(device), arguments.overwrite) as store:
        batches = list(work.batches(_done(store, work)))
        if batches:
            _collect(store, work, cluster.embed_batches(batches, worker, plan))
        return _finish(store, work, started)


def _prepare(arguments: argparse.Namespace, device: torch.device) -> Work:
    model = str(default_model()) if arguments.model is None else arguments.model
    try:
        embedder = Embedder.load(model, device, arguments.dtype, arguments.layer)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith("layer must"):
            raise UsageError(f"--{error}") from error
        raise UsageError(f"the model {model!r} cannot be loaded: {one_line(error)}") from error
    try:
        listed = read_list(arguments.list) if arguments.list is not None else []
    except OSError as error:
        raise UsageError(f"--list: {arguments.list!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--list: {arguments.list!r} cannot be read: {error}") from error
    try:
        items = find_items([*arguments.images, *listed])
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    if not items:
        raise UsageError(f"--list: {arguments.list!r} is empty")
    return Work(items, model, embedder, arguments)


def default_threads() -> int:
    """Return how many threads decode images unless the user says so."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, MOST_THREADS)


def fingerprint_of_model(embedder: Embedder) -> str:
    """Return a hash of everything in a checkpoint that vectors depend on; not of where it lies."""
    digest = hashlib.sha256()
    for part in (embedder.model.config, embedder.processor):
        settings = {key: value for key, value in part.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    # Where the checkpoint has no classifier, there is a random one, which other layers do not depend on.
    network = embedder.model if embedder.layer == "logits" else embedder.model.bit
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- what it does -------------------------------------------------------------------------------


def _done(store: Store, work: Work) -> set[int]:
    """Return the batches that an earlier run of the same command has done, and tell of them."""
    done = store.numbers()
    if len(done) * work.arguments.batch_size < len(work.items):
        _check_free(work.arguments)
    if done:
        count = sum(store.counts())
        print(f"bitfast: going on: {count} of {len(work.items)} images were done", file=sys.stderr)
    return done


def _collect(store: Store, work: Work, results: Generator[BatchResult, None, None]) -> None:
    """Keep the results as they come, and show how far it is."""
    embedded, failed = store.counts()
    with _Progress(len(work.items), embedded + failed, failed) as progress, closing(results):
        for result in results:
            store.add(result)
            failed += len(result.failures)
            progress.show(len(result.names) + len(result.failures), failed)


def _finish(store: Store, work: Work, started: float) -> int:
    about = {"model": work.model, "layer": work.arguments.layer, "bitfast": bitfast.__version__}
    path = work.arguments.output
    output.write(output.Table(store, work.embedder.dimension, work.dtype, about), path)
    embedded, failed = store.counts()
    store.remove()
    seconds = time.perf_counter() - started
    listed = f" (listed in {output.failed_path(path)})" if failed else ""
    print(f"{embedded} embedded, {failed} failed{listed}, in {seconds:.1f} s", file=sys.stderr)
    return SOME_FAILED if failed else SUCCESS


class _Progress:
    """A bar on standard error, if that is a terminal and tqdm is installed; else a line every minute."""

    def __init__(self, total: int, done: int, failed: int) -> None:
        self._total, self._done = total, done
        self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total,
                initial=done,
                postfix={"failed": failed},
                unit="image",
                file=sys.stderr,
                leave=False,
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, count: int, failed: int) -> None:
        """Add images, and show how many failed so far."""
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(
                f"bitfast: {self._done} of {self._total} images, {failed} failed", file=sys.stderr
            )
