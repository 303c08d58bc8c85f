"""The HTTP interface of a server in this process, without Ray and without sockets."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from PIL import Image

from bitfast.serving.api import build_api
from bitfast.serving.engine import Engine
from bitfast.serving.metrics import Metrics, Snapshot
from bitfast.serving.service import Service
from bitfast.serving.settings import Settings
from tests.cli.common import picture
from tests.threads import torch_threads

T = TypeVar("T")

MOST_BYTES = 60_000
MOST_PIXELS = 5_000
MOST_IMAGES = 4
MOST_WAITING = 6
SECONDS = 60

Use = Callable[[httpx.AsyncClient], Awaitable[T]]


class InProcess:
    """A service and its HTTP interface.

    Args:
        model: Its folder.
        options: Of the settings.
    """

    def __init__(self, model: Path, **options: Any) -> None:
        settings = Settings.of(str(model), gpus_per_replica=0, cpus_per_replica=2, **options)
        with torch_threads(torch.get_num_threads()):  # put back what the service's threads change
            self.service = Service(settings, Engine.load(settings), Metrics("r1"))
        self.api = build_api(lambda: self.service, self._snapshots)

    async def _snapshots(self) -> Sequence[Snapshot]:
        return [self.service.metrics.snapshot()]

    def use(self, use: Use[T]) -> T:
        """Return what a coroutine that is given a client returns."""

        async def main() -> T:
            transport = httpx.ASGITransport(self.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await use(client)

        return asyncio.run(main())

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the answer to one request."""

        async def use(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(method, path, **options)

        return self.use(use)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Return the answer to a POST."""
        return self.request("POST", path, **options)

    def close(self) -> None:
        """End its threads."""
        self.service.close()


def image_file(kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """Return a file of random pixels."""
    return encoded(picture(mode, size), kind)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def several(*contents: bytes) -> list[Any]:
    return [(f"image{n}", (f"{n}.png", content)) for n, content in enumerate(contents)]
