"""How many replicas Ray Serve runs, where it may choose."""

from __future__ import annotations

from typing import Any

IMAGES = "images"


class ReplicasByImages:
    """A policy of Ray Serve: as many replicas as the images that are accepted and not answered need.

    Ray's own counts requests, of which one may have as many images as fill a queue. It is called in Ray's
    controller, with what ``record_autoscaling_stats`` of the replicas gave. Ray rounds what it returns up,
    keeps it within the bounds, and waits for its delays.

    Args:
        images_per_replica: That a replica may have on average before there is another one.
    """

    def __init__(self, images_per_replica: float) -> None:
        self._images_per_replica = images_per_replica

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return how many replicas there should be, and nothing to remember."""
        images = sum(context.aggregated_metrics.get(IMAGES, {}).values())
        return images / self._images_per_replica, {}
