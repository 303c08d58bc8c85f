"""``python -m bench.serving_peer``: transformers' pipeline behind Ray Serve, which ``bench.serving`` starts.

What somebody writes who follows both manuals: one deployment, ``serve.batch``, and the pipeline's call on the
batch in a thread beside the event loop. SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from io import BytesIO
from typing import Any

import ray
import torch
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from .torchvision_import import import_torchvision


@serve.deployment
class PipelineServer:
    """Answers ``POST /classify?top_k=``: the body is an image, the answer that of the pipeline.

    Args:
        folder: The checkpoint's.
        dtype: The name of torch's.
        processor: "fast" or "slow".
        threads: Of the model.
        batch_size, batch_wait: Of ``serve.batch``; the wait in seconds.
    """

    def __init__(
        self,
        folder: str,
        dtype: str,
        processor: str,
        threads: int,
        batch_size: int,
        batch_wait: float,
    ) -> None:
        torch.set_num_threads(threads)
        import_torchvision()
        from transformers import AutoImageProcessor, pipeline

        self._pipeline = pipeline(
            "image-classification",
            model=folder,
            image_processor=AutoImageProcessor.from_pretrained(
                folder, use_fast=processor == "fast"
            ),
            torch_dtype=getattr(torch, dtype),
            device="cpu",
        )
        batched: Any = serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=batch_wait)
        self._classify = batched(self._run_beside)

    async def __call__(self, request: Request) -> JSONResponse:
        if request.method == "GET":
            return JSONResponse({})
        top_k = int(request.query_params.get("top_k", 5))
        return JSONResponse(await self._classify(await request.body(), top_k))

    async def _run_beside(self, bodies: list[bytes], top_k: list[int]) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(None, self._run, bodies, top_k)

    def _run(self, bodies: list[bytes], top_k: list[int]) -> list[Any]:
        images = [Image.open(BytesIO(body)) for body in bodies]
        answers = self._pipeline(images, batch_size=len(images), top_k=max(top_k))
        return [labels[:count] for labels, count in zip(answers, top_k, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--processor", required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--batch-wait", type=float, required=True)
    given = parser.parse_args()

    ray.init(address="local", include_dashboard=False, num_cpus=given.replicas * given.threads)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # ray.init has set handlers of its own
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment = PipelineServer.options(  # type: ignore[attr-defined]
        num_replicas=given.replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": given.threads},
        logging_config={"enable_access_log": False},
    )
    serve.run(
        deployment.bind(
            given.folder,
            given.dtype,
            given.processor,
            given.threads,
            given.batch_size,
            given.batch_wait,
        ),
        route_prefix="/classify",
    )
    print("ready", flush=True)
    stopped.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
