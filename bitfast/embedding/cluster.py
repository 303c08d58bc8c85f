"""Embedding on Ray: Ray Data gives batches to workers, each of which holds a model, and brings results back.

Where a worker dies, Ray Data starts another one and gives it the task again, without end; what kills one after
another ends the run here. A result that comes twice does no harm: the store keeps one for each number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitfast.commands.classify import find_device
from bitfast.embedding import pipeline
from bitfast.embedding.embedder import Embedder
from bitfast.embedding.inputs import Item
from bitfast.embedding.pipeline import Batch
from bitfast.embedding.store import BatchResult
from bitfast.images.files import one_line

if TYPE_CHECKING:
    import pyarrow

BATCHES_OF_A_TASK = 4
"""What a worker gets at once: it decodes the next batch of these while the model computes."""

MOST_TASKS = 10_000
"""More batches make longer tasks instead: Ray's own work for each is some milliseconds."""

MOST_DEATHS = 3
"""How many workers may die at the same task, or while they load the model."""

SECONDS_TO_CONNECT = 10

LOCAL_OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory for a Ray of our own: names go in, vectors come out."""


class ClusterError(Exception):
    """The cluster cannot be reached, or cannot do the work; the message says why."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know.

    Attributes:
        folder: That relative paths start from.
        model: Folder (which every machine must have at this path) or name of the checkpoint.
        device: Of the model.
        dtype: Of the model.
        layer: As :class:`Embedder` takes it.
        threads: That decode images.
        store: "float32" or "float16", of the results.
    """

    folder: str
    model: str
    device: str
    dtype: str
    layer: str
    threads: int
    store: str


@dataclass(frozen=True)
class Workers:
    """How many workers there are to be, and what each of them takes."""

    count: int
    cpus: int
    device: str


# ---- the cluster --------------------------------------------------------------------------------


@contextmanager
def connect(address: str) -> Iterator[None]:
    """Connect to a cluster, and disconnect at the end.

    Args:
        address: host:port; "auto": of the cluster that this machine belongs to; or "local": start Ray here,
            and stop it at the end.

    Raises:
        ClusterError: there is no cluster at this address.
    """
    import ray

    _check_port(address)
    # Of the core of Ray, which writes to standard error itself: a warning for each pool of workers.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE}
    try:
        ray.init(address, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no cluster at {address!r}: {one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Check that somebody listens at host:port: Ray itself would try for two minutes.

    Raises:
        ClusterError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(f"no cluster at {address!r}: {one_line(error)}") from error


def plan_workers(count: int | None, device: str | None) -> Workers:
    """Return how many workers there are to be on the cluster, and what each of them takes.

    Args:
        count: As demanded; None: one for each GPU, or else one for each machine.
        device: As demanded; None: a GPU each, where there are GPUs.

    Raises:
        ClusterError: the cluster has not enough for so many.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if device is None:
        device = "cuda" if gpus else "cpu"
    if device_type(device) == "cuda":
        count = count or max(gpus, 1)
        if count > gpus:
            raise ClusterError(
                f"the cluster has {gpus} GPUs, too few for {count} workers on {device}"
            )
        # Where each machine has as many CPUs for each of its GPUs, all of them are used.
        shares = [int(m.get("CPU", 0)) // int(m["GPU"]) for m in machines if m.get("GPU", 0) >= 1]
        return Workers(count, max(1, min(shares)), device)
    count = count or max(1, sum(number > 0 for number in cpus))
    if count > sum(cpus):
        raise ClusterError(f"the cluster has {sum(cpus)} CPUs, too few for {count} workers")
    share = max(n for n in range(1, max(cpus) + 1) if sum(c // n for c in cpus) >= count)
    return Workers(count, share, device)


def device_type(name: str) -> str:
    """Return "cuda" for "cuda:0", and so on.

    Raises:
        ClusterError: there is no such device anywhere.
    """
    try:
        return torch.device(name).type
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ClusterError(f"the device {name!r} cannot be used: {reason}") from error


# ---- the work -----------------------------------------------------------------------------------


def embed_batches(
    batches: Sequence[Batch], settings: WorkerSettings, workers: Workers
) -> Generator[BatchResult, None, None]:
    """Yield what comes of each batch, in the order in which they are ready.

    Args:
        batches: At least one.
        settings: For each worker.
        workers: How many, and what each takes.

    Raises:
        ClusterError: a worker fails.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It would show an error's tracebacks in several processes; the last line is told below.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    size = max(BATCHES_OF_A_TASK, math.ceil(len(batches) / MOST_TASKS))
    rows = [{"number": number, "items": json.dumps(items)} for number, items in batches]
    dataset = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / size))
    results = dataset.map_batches(
        Worker,
        fn_constructor_args=[settings, _count_of_attempts()],
        batch_size=size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers.count),
        num_cpus=workers.cpus,
        num_gpus=1 if device_type(settings.device) == "cuda" else 0,
    )
    dtype = np.dtype(settings.store)
    missing = {number for number, _ in batches}
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise ClusterError(row["error"])
            missing.discard(row["number"])
            yield _from_row(row, dtype)
    except ray.exceptions.RayError as error:
        reason = _last_line(error)
        # Of a worker's own ClusterError, "bitfast.embedding.cluster.ClusterError: ...", what it says.
        said = reason.partition("ClusterError: ")[2]
        raise ClusterError(said or f"a worker fails: {reason}") from error
    if missing:
        raise ClusterError(f"the results of {len(missing)} batches did not come")


def _count_of_attempts() -> Any:
    """Return an actor of Ray that counts attempts, which outlive the workers that make them."""
    import ray

    # Ray Data has no bound of its own: the arguments that it passes on to workers go with Ray 2.64.
    @ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    class Attempts:
        def __init__(self) -> None:
            self._counts: Counter[str] = Counter()

        def begin(self, what: str) -> int:
            self._counts[what] += 1
            return self._counts[what]

        def succeed(self, what: str) -> None:
            del self._counts[what]

    return Attempts.remote()  # type: ignore[attr-defined]


class Worker:
    """An actor of Ray: a model, and the threads that decode for it.

    Args:
        settings: What it needs to know.
        attempts: Counts how often something was begun that has not succeeded.

    Raises:
        ClusterError: this worker has died at the same too often.
    """

    def __init__(self, settings: WorkerSettings, attempts: Any) -> None:
        import ray

        self._settings = settings
        self._attempts = attempts
        # Where a machine has no such folder, relative names lead to no file, and absolute ones do.
        with contextlib.suppress(OSError):
            os.chdir(settings.folder)
        worker = ray.get_runtime_context().get_actor_id()  # one that is started again keeps it
        if ray.get(attempts.begin.remote(worker)) > MOST_DEATHS:
            raise ClusterError(
                f"a worker died {MOST_DEATHS} times as it loaded the model; is there enough memory for it?"
            )
        device = find_device(settings.device)
        self._embedder = Embedder.load(settings.model, device, settings.dtype, settings.layer)
        ray.get(attempts.succeed.remote(worker))

    def __call__(self, rows: pyarrow.Table) -> Iterator[pyarrow.Table]:
        """Embed the batches of a task; yield a row for each, or one that says why they cannot be."""
        batches: list[Batch] = [
            (row["number"], [Item(*fields) for fields in json.loads(row["items"])])
            for row in rows.to_pylist()
        ]
        dtype = np.dtype(self._settings.store)
        try:
            self._count_attempt(batches)
            for result in pipeline.embed_batches(
                self._embedder, batches, self._settings.threads, dtype
            ):
                yield _as_row(result)
        except ClusterError as error:
            yield _as_error(str(error))
        except Exception as error:
            # Not raised: Ray Data would hide it in advice about settings of its own.
            yield _as_error(f"a worker fails: {type(error).__name__}: {one_line(error)}")

    def _count_attempt(self, batches: Sequence[Batch]) -> None:
        """Count that a task is begun.

        Raises:
            ClusterError: too many workers have died at it.
        """
        import ray

        first, last = batches[0][1][0].name, batches[-1][1][-1].name
        if ray.get(self._attempts.begin.remote(f"batch {batches[0][0]}")) > MOST_DEATHS:
            raise ClusterError(
                f"{MOST_DEATHS} workers died at the images from {first!r} to {last!r}. Where memory is short, "
                "--workers 1 takes less of it; an image that kills what reads it can be replaced by an empty "
                "file, which is listed as failed. The same command goes on from here"
            )


def _as_error(message: str) -> pyarrow.Table:
    return _as_row(BatchResult(-1, [], np.empty(0), []), message)


def _as_row(result: BatchResult, error: str = "") -> pyarrow.Table:
    import pyarrow as pa

    return pa.table(
        {
            "number": [result.number],
            "names": [json.dumps(result.names)],
            "failures": [json.dumps(result.failures)],
            "vectors": pa.array([result.vectors.tobytes()], pa.binary()),
            "error": [error],
        }
    )


def _from_row(row: dict[str, Any], dtype: np.dtype) -> BatchResult:
    names = json.loads(row["names"])
    vectors = np.frombuffer(row["vectors"], dtype)
    return BatchResult(
        row["number"],
        names,
        vectors.reshape(len(names), -1) if names else vectors.reshape(0, 0),
        [(name, error) for name, error in json.loads(row["failures"])],
    )


def _last_line(error: BaseException) -> str:
    """Return the part of Ray's message, with tracebacks of several processes in it, that says what is wrong."""
    lines = str(error).strip().splitlines()
    return one_line(lines[-1]) if lines else type(error).__name__
