"""A server's limits, its queue and its end, and what runs beside its event loop, in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from bitfast import BitForImageClassification
from tests.cli.common import save_model
from tests.serving.in_process import (
    MOST_BYTES,
    MOST_IMAGES,
    MOST_WAITING,
    SECONDS,
    InProcess,
    image_file,
    several,
)

# ---- limits -----------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_unread(server: InProcess) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    answer = server.post("/classify", content=endless(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 413
    assert answer.json()["error"] == f"the request's body is larger than {MOST_BYTES} bytes"
    assert sent <= MOST_BYTES + 20_000
    sent = 0
    announced = {"Content-Length": str(MOST_BYTES + 1), "Content-Type": "image/png"}
    answer = server.post("/classify", content=endless(), headers=announced)
    assert answer.status_code == 413
    assert sent <= 10_000


@pytest.mark.parametrize("length", ["x", "-1", "1" * 5000])
def test_a_bad_content_length(server: InProcess, length: str) -> None:
    answer = server.post("/classify", content=b"abc", headers={"Content-Length": length})
    assert answer.status_code in (400, 413)


def test_too_many_images(server: InProcess) -> None:
    for answer in (
        server.post("/classify", files=several(*[b"x"] * (MOST_IMAGES + 1))),
        server.post("/classify", json={"inputs": [""] * (MOST_IMAGES + 1)}),
    ):
        assert answer.status_code == 413
        assert answer.json()["error"] == f"the request has more than {MOST_IMAGES} images"


def test_a_slow_body(server: InProcess) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield image_file()
        await asyncio.sleep(SECONDS)

    answer = server.post("/classify", content=slow())
    assert answer.status_code == 408
    assert answer.json()["error"] == "the request's body did not arrive within 0.3 seconds"
    assert server.service.queue_length == 0


class Held:
    """Holds the model: batches wait until the block ends."""

    def __init__(self, server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        run = server.service._batcher._run

        def wait(batch: torch.Tensor) -> Any:
            self.batches.append(len(batch))
            assert self.gate.wait(SECONDS)
            return run(batch)

        monkeypatch.setattr(server.service._batcher, "_run", wait)


@pytest.fixture
def held(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(server, monkeypatch)
    yield held
    held.gate.set()


async def until(condition: Any) -> None:
    for _ in range(100 * SECONDS):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come to this")


def test_a_body_that_breaks_off(server: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise LookupError("what Ray Serve raises when a client hangs up")

    async def send(message: Any) -> None:
        sent.append(message)

    path = {"path": "/embed", "raw_path": b"/embed", "query_string": b"", "root_path": ""}
    scope = {"type": "http", "method": "POST", "headers": [], **path}
    asyncio.run(server.api(scope, receive, send))
    assert sent[0]["status"] == 400
    assert caplog.text == ""  # a client cannot fill the log
    assert server.service.queue_length == 0


def test_a_full_queue_refuses_and_recovers(server: InProcess, held: Held) -> None:
    content = image_file()

    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        accepted = [
            asyncio.create_task(client.post("/embed", content=content))
            for _ in range(MOST_WAITING - 1)
        ]
        await until(lambda: server.service.queue_length == MOST_WAITING - 1)
        too_many = await client.post("/embed", files=several(content, content))
        accepted.append(asyncio.create_task(client.post("/embed", content=content)))
        await until(lambda: server.service.queue_length == MOST_WAITING)
        refused = await client.post("/embed", content=content)
        alive = await client.get("/v2/health/ready")
        held.gate.set()
        answers = await asyncio.gather(*accepted)
        return [too_many, refused, alive, await client.post("/embed", content=content), *answers]

    too_many, refused, *answered = server.use(use)
    for answer in (too_many, refused):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert f"of at most {MOST_WAITING}" in answer.json()["error"]
    assert [answer.status_code for answer in answered] == [200] * (MOST_WAITING + 2)
    assert server.service.queue_length == 0


def test_more_images_than_the_queue_ever_takes(model: Path) -> None:
    server = InProcess(model, max_queue=1, batch_size=1)
    answer = server.post("/embed", files=several(image_file(), image_file()))
    assert answer.status_code == 413
    server.close()


def test_a_client_that_hangs_up_costs_nothing(server: InProcess, held: Held) -> None:
    content = image_file()

    async def use(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post("/embed", content=content))
        await until(lambda: held.batches == [1])
        gone = asyncio.create_task(client.post("/embed", files=several(content, content)))
        await until(lambda: server.service._batcher._queues)
        gone.cancel()
        await until(lambda: server.service.queue_length == 1)
        held.gate.set()
        assert (await first).status_code == 200

    server.use(use)
    assert server.post("/embed", content=content).status_code == 200
    assert held.batches == [1, 1]  # none of the two images that nobody waits for


def test_the_deadline_of_a_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = InProcess(model, request_timeout=0.2, batch_size=1, batch_wait=0)
    held = Held(server, monkeypatch)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 504
    assert answer.json()["error"] == "the request was not answered within 0.2 seconds"
    assert server.service.queue_length == 0
    held.gate.set()
    server.close()


def test_a_failure_of_the_model_is_not_the_clients(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: torch.Tensor) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(server.service._batcher, "_run", fail)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model fails: out of memory"}


def test_a_gpu_that_has_failed_ends_its_replica(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure(error: Exception) -> Any:
        def fail(batch: torch.Tensor) -> Any:
            raise error

        return fail

    server = InProcess(model)
    for error, is_ready in (
        (TypeError("a surprise"), True),
        (torch.OutOfMemoryError("too large"), True),
        (torch.AcceleratorError("an illegal memory access"), False),
    ):
        monkeypatch.setattr(server.service._batcher, "_run", failure(error))
        assert server.post("/classify", content=image_file()).status_code == 500
        assert server.service.is_alive == is_ready
        answer = server.request("GET", "/v2/health/ready")
        assert answer.status_code == (200 if is_ready else 503)
    server.close()


def test_output_that_is_not_finite(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    network = BitForImageClassification.from_pretrained(folder)
    torch.nn.init.constant_(network.classifier[1].weight, float("inf"))
    network.save_pretrained(folder)
    server = InProcess(folder, batch_size=1)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model's output in float32 is not finite"}
    server.close()


def test_draining(server: InProcess, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "is_draining", False)  # put back at the end
    content = image_file()

    async def use(client: httpx.AsyncClient) -> None:
        accepted = asyncio.create_task(client.post("/embed", content=content))
        await until(lambda: held.batches == [1])
        draining = asyncio.create_task(server.service.drain())
        await until(lambda: server.service.is_draining)
        refused = await client.post("/embed", content=content)
        assert refused.status_code == 503
        assert refused.json() == {"error": "the server shuts down"}
        assert refused.headers["connection"] == "close"
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200
        assert not draining.done()
        held.gate.set()
        assert (await accepted).status_code == 200
        await draining

    server.use(use)


# ---- preprocessing apart from the event loop, threads ------------------------------------------------


def test_a_slow_decode_delays_no_health_check(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()
    preprocess = server.service.engine.preprocess

    def slow(content: bytes) -> torch.Tensor:
        entered.set()
        assert gate.wait(SECONDS)
        return preprocess(content)

    monkeypatch.setattr(server.service.engine, "preprocess", slow)

    async def use(client: httpx.AsyncClient) -> None:
        waiting = asyncio.create_task(client.post("/embed", content=image_file()))
        await until(entered.is_set)
        assert (await client.get("/v2/health/ready")).status_code == 200
        gate.set()
        assert (await waiting).status_code == 200

    server.use(use)


def test_threads(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}
    preprocess, run = server.service.engine.preprocess, server.service._batcher._run

    def seen_preprocess(content: bytes) -> torch.Tensor:
        threads["images"] = torch.get_num_threads()
        return preprocess(content)

    def seen_run(batch: torch.Tensor) -> Any:
        threads["model"] = torch.get_num_threads()
        return run(batch)

    monkeypatch.setattr(server.service.engine, "preprocess", seen_preprocess)
    monkeypatch.setattr(server.service._batcher, "_run", seen_run)
    server.post("/embed", content=image_file())
    assert threads == {"images": 1, "model": 2}
