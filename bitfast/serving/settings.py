"""How a server runs: its model, batches, replicas and limits. One set of defaults for all ways to start it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

MIB = 2**20

DTYPES = ("auto", "float32", "bfloat16", "float16")


class CannotStartError(Exception):
    """What keeps a server from starting, in one line for the user."""


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Attributes:
        model: A checkpoint's folder, or its name on the Hub.
        name: The model's name in URLs of the Open Inference Protocol; None: the last part of ``model``.
        dtype: Of the model; "auto": that of the checkpoint.
        replicas: Processes that hold the model: so many; or a pair, between which Ray Serve chooses by load.
        cpus_per_replica: Cores of a replica. Its model computes with so many threads, and as many threads
            decode images. None: the machine's cores shared out among the (most) replicas, at least 1.
        gpus_per_replica: GPUs of a replica; 0: it computes on the CPU. None: one, or a part of one if there
            are more replicas (at most) than GPUs that torch sees where the application is made; 0 without any.
        batch_size: Images that go through the model together, at most.
        batch_wait: Seconds that an image waits for others to fill its batch, at most.
        max_request_bytes: Bytes of a request's body, at most.
        max_image_pixels: Width times height of an image, at most.
        max_images: Images in a request, at most.
        max_queue: Images that a replica has accepted and not answered yet, at most.
        body_timeout: Seconds in which a request's body has to arrive.
        request_timeout: Seconds in which a request has to be answered, its body's arrival included.
    """

    model: str
    name: str | None = None
    dtype: str = "auto"
    replicas: int | tuple[int, int] = 1
    cpus_per_replica: int | None = None
    gpus_per_replica: float | None = None
    batch_size: int = 8
    batch_wait: float = 0.005
    max_request_bytes: int = 32 * MIB
    max_image_pixels: int = 50_000_000
    max_images: int = 64
    max_queue: int = 256
    body_timeout: float = 20.0
    request_timeout: float = 60.0

    @classmethod
    def of(cls, model: str | None, **options: Any) -> Settings:
        """Return settings, with the default model for None, and names of local folders made absolute.

        Raises:
            TypeError: there is no such option.
            ValueError: an option has a value that is not allowed; the message names it.
        """
        if model is None:
            from bitfast.digits import MODEL_PATH

            model = str(MODEL_PATH)
            options["name"] = options.get("name") or "digits"
        if os.path.isdir(model):
            model = os.path.abspath(model)  # replicas have a working directory of their own
        if isinstance(options.get("replicas"), list):
            options["replicas"] = tuple(options["replicas"])
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(f"no such option: {', '.join(unknown)}; there are {', '.join(names)}")
        return cls(model, **options)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        fewest, most = self.replica_range
        if not 1 <= fewest <= most:
            raise ValueError(
                f"replicas must be at least 1, or a pair of at least 1 that ascends, got {self.replicas!r}"
            )
        for name in (
            "batch_size",
            "max_request_bytes",
            "max_image_pixels",
            "max_images",
            "max_queue",
        ):
            _require(name, getattr(self, name), at_least=1, kind=int)
        if "/" in self.served_name or not self.served_name:
            raise ValueError(f"name must be one part of a URL, got {self.name!r}")
        if self.cpus_per_replica is not None:
            _require("cpus_per_replica", self.cpus_per_replica, at_least=1, kind=int)
        if self.gpus_per_replica is not None:
            _require("gpus_per_replica", self.gpus_per_replica, at_least=0)
            if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
                raise ValueError(
                    f"gpus_per_replica must be an integer if more than 1, got {self.gpus_per_replica}"
                )
        _require("batch_wait", self.batch_wait, at_least=0)
        for name in ("body_timeout", "request_timeout"):
            _require(name, getattr(self, name), at_least=0.001)

    @property
    def served_name(self) -> str:
        """The model's name in URLs."""
        return self.name or PurePath(self.model).name

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        replicas = self.replicas
        return (replicas, replicas) if isinstance(replicas, int) else replicas

    def resolved(self) -> Settings:
        """Return the same with the cores and GPUs of a replica chosen for this machine."""
        import torch

        cpus, gpus = self.cpus_per_replica, self.gpus_per_replica
        if cpus is None:
            cpus = max(1, usable_cpus() // self.replica_range[1])
        if gpus is None:
            gpus = shared_out(torch.cuda.device_count(), self.replica_range[1])
        return dataclasses.replace(self, cpus_per_replica=cpus, gpus_per_replica=gpus)


def shared_out(gpus: int, replicas: int) -> float:
    """Return how many GPUs each of some replicas gets: one at most, and no parts of two."""
    if not gpus:
        return 0.0
    replicas_of_one = math.ceil(replicas / gpus)
    return math.floor(10_000 / replicas_of_one) / 10_000  # Ray takes four decimals


def places_on(gpus: int, gpus_per_replica: float) -> float:
    """Return how many replicas fit on GPUs."""
    if gpus_per_replica == 0:
        return math.inf
    if gpus_per_replica < 1:
        return gpus * math.floor(1 / gpus_per_replica)
    return gpus // gpus_per_replica


def usable_cpus() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _require(name: str, value: Any, at_least: float, kind: Any = (int, float)) -> None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not at_least <= value < float("inf"):
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {noun} of at least {at_least}, got {value!r}")
