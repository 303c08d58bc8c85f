"""The Ray Serve application: one deployment, whose replicas hold the model and answer HTTP requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

from bitfast.serving.scaling import IMAGES
from bitfast.serving.settings import Settings

if TYPE_CHECKING:
    from bitfast.serving.metrics import Snapshot

DEPLOYMENT = "bitfast"

OTHER_REQUESTS = 64
"""Requests that a replica takes besides those whose images fill its queue: for health, metrics, refusals."""

SNAPSHOT_SECONDS = 5.0


def application(settings: Settings) -> serve.Application:
    """Return the application."""
    settings = settings.resolved()
    fewest, most = settings.replica_range
    scale: dict[str, Any] = (
        {"num_replicas": fewest}
        if fewest == most
        else {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "policy": {
                    "policy_function": "bitfast.serving.scaling:ReplicasByImages",
                    "policy_kwargs": {"images_per_replica": images_per_replica(settings)},
                },
                "look_back_period_s": 15,  # replicas report every 10 seconds
                "upscale_delay_s": 5,
            }
        }
    )
    deployment: Any = serve.deployment(
        serve.ingress(_api)(Replica),
        name=DEPLOYMENT,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
        },
        # The queue is the replica's own, counted in images; it refuses what it has no place for.
        max_ongoing_requests=2 * settings.max_queue + OTHER_REQUESTS,
        # What waits in the proxy, body and all, because no replica takes it.
        max_queued_requests=settings.max_queue + OTHER_REQUESTS,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.request_timeout + 5,
        graceful_shutdown_wait_loop_s=0.5,
        **scale,
    )
    return deployment.bind(settings)


def images_per_replica(settings: Settings) -> float:
    """Return how many images a replica may have accepted, on average, before there is another one."""
    # Enough to fill the batch that comes after the one that runs; always fewer than the queue takes.
    return min(2 * settings.batch_size, settings.max_queue / 2)


def _api() -> Any:
    """Return the HTTP interface. Ray Serve calls this in each replica."""
    from bitfast.serving.api import build_api

    return build_api(lambda: _replica().service, lambda: _replica().snapshots())


def _replica() -> Replica:
    replica: Any = serve.get_replica_context().servable_object
    return replica


class Replica:
    """A process that holds the model."""

    def __init__(self, settings: Settings) -> None:
        from bitfast.serving.engine import Engine
        from bitfast.serving.metrics import Metrics
        from bitfast.serving.service import Service

        name = serve.get_replica_context().replica_tag
        self.service = Service(settings, Engine.load(settings), Metrics(name))

    def check_health(self) -> None:
        """Tell Ray Serve to replace this replica if its model's thread or GPU is gone."""
        if not self.service.is_alive:
            raise RuntimeError("the model can answer no more")

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Tell Ray Serve, and by it :class:`ReplicasByImages`, how much this replica has to do."""
        return {IMAGES: self.service.queue_length}

    # ---- calls to all replicas ------------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """Return this replica's metrics."""
        return self.service.metrics.snapshot()

    async def drain(self) -> None:
        """Refuse new requests, and return when those accepted have been answered."""
        await self.service.drain()

    async def snapshots(self) -> Sequence[Snapshot]:
        """Return the metrics of all replicas, this one's at least."""
        handle = serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)
        response = handle.broadcast("snapshot")
        try:
            found = await response.results_async(timeout_s=SNAPSHOT_SECONDS, return_exceptions=True)
        except (TimeoutError, RuntimeError):
            found = []
        # A replica that has just ended gives an error.
        return [one for one in found if isinstance(one, list)] or [self.service.metrics.snapshot()]
