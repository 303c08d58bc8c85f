"""What a server counts, for Prometheus. Each replica counts for itself; ``/metrics`` shows all of them.

Every series has the label ``replica``, so that Prometheus sums them (``sum without (replica) (...)``) and sees
a new replica as a new series, not as a counter that jumps back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

Sample: TypeAlias = tuple[str, dict[str, str], float]
Snapshot: TypeAlias = list[tuple[str, str, str, list[Sample]]]
"""Of each metric: its name, help, type and samples. Plain values, which travel between replicas."""


class Metrics:
    """The counts of one replica.

    Args:
        replica: Its name, the label of all its series.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "bitfast_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "bitfast_request_seconds",
            "From a request's arrival at the replica to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._images = Counter("bitfast_images", "Images answered.", registry=registry)
        self._failures = Counter(
            "bitfast_image_failures", "Images that could not be used.", registry=registry
        )
        self._queue = Gauge(
            "bitfast_queue_images", "Images accepted and not answered yet.", registry=registry
        )
        self._batches = Histogram(
            "bitfast_batch_images",
            "Images in a batch, without padding.",
            buckets=[2**n for n in range(9)],
            registry=registry,
        )
        self._model_seconds = Histogram(
            "bitfast_model_seconds",
            "Time of a batch in the model.",
            buckets=SECONDS,
            registry=registry,
        )

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_batch(self, images: int, seconds: float) -> None:
        """Count a batch that the model ran."""
        self._batches.observe(images)
        self._model_seconds.observe(seconds)

    def count_image(self) -> None:
        """Count an image that was answered."""
        self._images.inc()

    def count_failure(self) -> None:
        """Count an image that could not be used."""
        self._failures.inc()

    def set_queue(self, images: int) -> None:
        """Set how many images have been accepted and not answered yet."""
        self._queue.set(images)

    def snapshot(self) -> Snapshot:
        """Return all values, with the replica's label."""
        return [
            (
                metric.name,
                metric.documentation,
                metric.type,
                [
                    (sample.name, {**sample.labels, "replica": self._replica}, sample.value)
                    for sample in metric.samples
                    if not sample.name.endswith("_created")
                ],
            )
            for metric in self._registry.collect()
        ]


def exposition(snapshots: Sequence[Snapshot]) -> bytes:
    """Return several replicas' values in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(snapshots))
    return generate_latest(registry)


class _Snapshots(Collector):
    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Any]:
        metrics: dict[str, Metric] = {}
        for snapshot in self._snapshots:
            for name, documentation, kind, samples in snapshot:
                metric = metrics.setdefault(name, Metric(name, documentation, kind))
                for sample in samples:
                    metric.add_sample(*sample)
        yield from metrics.values()
