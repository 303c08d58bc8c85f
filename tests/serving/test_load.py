"""Many clients at once, good and bad; replicas that are killed; a server that ends under load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image

from bitfast.commands.classify import Classifier, default_model
from bitfast.digits.sheet import read_sheet

from .server import RunningServer, serving

CLIENTS = 64
REQUESTS = 4
"""Of each client."""
MOST_BYTES = 40_000
MOST_PIXELS = 100_000
BODY_TIMEOUT = 2.0
DEADLINE = 120.0
"""Seconds that anything may take on a busy machine."""
LIMITS = (
    "--max-request-bytes", MOST_BYTES, "--max-image-pixels", MOST_PIXELS, "--body-timeout", BODY_TIMEOUT,
)  # fmt: skip

Answer = dict[str, float]


# ---- images and their answers -------------------------------------------------------------------


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def known() -> list[tuple[bytes, Answer]]:
    """Image files, and the score of each label as ``bitfast classify`` computes it."""
    classifier = Classifier.load(str(default_model()), torch.device("cpu"), "float32")
    pairs = []
    for image, _ in read_sheet(default_model())[:12]:
        scores = classifier.probabilities(classifier.preprocess(image)[None])[0].tolist()
        answer = {classifier.label(index): score for index, score in enumerate(scores)}
        pairs.append((encoded(image), answer))
    answers = [answer for _, answer in pairs]
    # Else an answer to another image would not be noticed.
    assert not any(same(a, b) for n, a in enumerate(answers) for b in answers[:n])
    return pairs


def same(answer: Answer, expected: Answer) -> bool:
    """Whether an answer is the expected one, but for rounding."""
    return answer == pytest.approx(expected, rel=1e-3, abs=1e-9)


def scores(content: Any) -> Answer:
    return {one["label"]: one["score"] for one in content}


# ---- what clients do ----------------------------------------------------------------------------


class Client:
    """One client, which knows what each of its requests has to be answered.

    Args:
        http: What it asks with.
        url: The server's.
        known: Images and their answers.
        seed: Of its choices.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: str, known: list[tuple[bytes, Answer]], seed: int
    ) -> None:
        self.http = http
        self.url = url
        self.known = known
        self.random = random.Random(seed)

    async def post(self, content: Any, kind: str = "image/png", **more: Any) -> httpx.Response:
        url = f"{self.url}/classify?top_k=10"
        return await self.http.post(url, content=content, headers={"Content-Type": kind}, **more)

    async def good(self) -> None:
        file, expected = self.random.choice(self.known)
        response = await self.post(file)
        assert response.status_code == 200, response.text
        assert same(scores(response.json()), expected)

    async def slow(self) -> None:
        """Send the body piece by piece."""
        file, expected = self.random.choice(self.known)
        response = await self.post(trickled(file))
        assert response.status_code == 200, response.text
        assert same(scores(response.json()), expected)

    async def several(self) -> None:
        """Send a form of three files, of which the second is broken."""
        chosen = self.random.sample(self.known, 2)
        files = [chosen[0][0], b"no image", chosen[1][0]]
        url = f"{self.url}/classify?top_k=10"
        parts = [("images", (f"{number}.png", file)) for number, file in enumerate(files)]
        response = await self.http.post(url, files=parts)
        assert response.status_code == 200, response.text
        first, second, third = response.json()
        assert same(scores(first), chosen[0][1])
        assert same(scores(third), chosen[1][1])
        assert list(second) == ["error"]

    async def json(self) -> None:
        file, expected = self.random.choice(self.known)
        body = {"inputs": base64.b64encode(file).decode(), "parameters": {"top_k": 10}}
        response = await self.http.post(f"{self.url}/classify", json=body)
        assert response.status_code == 200, response.text
        assert same(scores(response.json()), expected)

    async def broken(self) -> None:
        file, _ = self.random.choice(self.known)
        response = await self.post(file[: len(file) // 2])
        assert (response.status_code, list(response.json())) == (422, ["error"])

    async def many_bytes(self) -> None:
        response = await self.post(bytes(2 * MOST_BYTES))
        assert (response.status_code, list(response.json())) == (413, ["error"])

    async def many_pixels(self) -> None:
        bomb = encoded(Image.new("L", (1000, MOST_PIXELS // 1000 + 1)))
        assert len(bomb) < MOST_BYTES
        response = await self.post(bomb)
        assert (response.status_code, list(response.json())) == (413, ["error"])

    async def never_ending(self) -> None:
        """Send a part of the body, and no more, but listen."""
        reader, writer = await self.connect(bytes(100), announced=200)
        status = (await asyncio.wait_for(reader.readline(), DEADLINE)).split()[1]
        assert status == b"408"
        writer.close()

    async def gone(self) -> None:
        """Hang up in the middle of the body, or while the answer is awaited."""
        file, _ = self.random.choice(self.known)
        sent = len(file) if self.random.random() < 0.5 else len(file) // 2
        _, writer = await self.connect(file[:sent], announced=len(file))
        writer.transport.abort()

    async def connect(
        self, body: bytes, announced: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a body that may be shorter than announced, which httpx does not."""
        address = httpx.URL(self.url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        head = "POST /classify HTTP/1.1\r\nHost: server\r\nContent-Type: image/png\r\n"
        writer.write(f"{head}Content-Length: {announced}\r\n\r\n".encode() + body)
        await writer.drain()
        return reader, writer


async def trickled(file: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(file), 100):
        await asyncio.sleep(0.02)
        yield file[start : start + 100]


KINDS: dict[Callable[[Client], Awaitable[None]], int] = {
    Client.good: 8, Client.several: 2, Client.json: 2, Client.slow: 2, Client.broken: 2,
    Client.many_bytes: 1, Client.many_pixels: 1, Client.never_ending: 1, Client.gone: 2,
}  # fmt: skip
"""What clients do, and how often."""


def http_client(**settings: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(timeout=DEADLINE, limits=limits, trust_env=False, **settings)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    end = asyncio.get_running_loop().time() + DEADLINE
    while not await condition():
        assert asyncio.get_running_loop().time() < end, f"in vain: {what}"
        await asyncio.sleep(0.05)


async def metric(http: httpx.AsyncClient, url: str, name: str) -> float:
    """Return the sum of a metric over replicas."""
    lines = (await http.get(f"{url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


# ---- a server with two replicas -----------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("load")
    with serving(None, folder, "--replicas", 2, *LIMITS) as running:
        yield running


def test_64_clients_get_the_answer_of_their_own_image_whatever_the_others_do(
    server: RunningServer, known: list[tuple[bytes, Answer]]
) -> None:
    asyncio.run(mixed_load(server.url, known))


async def mixed_load(url: str, known: list[tuple[bytes, Answer]]) -> None:
    done: Counter[str] = Counter()
    is_over = asyncio.Event()
    async with http_client() as http:

        async def client(number: int) -> None:
            one = Client(http, url, known, seed=number)
            kinds = one.random.choices(list(KINDS), list(KINDS.values()), k=REQUESTS)
            for kind in kinds:
                await kind(one)
                done[kind.__name__] += 1

        async def health() -> int:
            asked = 0
            while not is_over.is_set():
                response = await http.get(f"{url}/v2/health/ready", timeout=10)
                assert response.status_code == 200
                asked += 1
                await asyncio.sleep(0.05)
            return asked

        asking = asyncio.create_task(health())
        try:
            await asyncio.gather(*(client(number) for number in range(CLIENTS)))
        finally:
            is_over.set()
        assert await asking > 5
        assert done.total() == CLIENTS * REQUESTS
        assert set(done) == {kind.__name__ for kind in KINDS}

        async def is_idle() -> bool:
            return await metric(http, url, "bitfast_queue_images") == 0

        await until(is_idle, "clients that hung up leave the queue")
        await Client(http, url, known, seed=0).good()


def replicas_of(server: RunningServer) -> set[int]:
    """Return the processes of a server that hold the model."""
    return {
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if any("ServeReplica" in word for word in command_line(process))
    }


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_the_threads_of_replicas_sleep_while_they_wait(server: RunningServer) -> None:
    policies = {psutil.Process(pid).environ().get("OMP_WAIT_POLICY") for pid in replicas_of(server)}
    assert policies == {"passive"}


def test_a_replica_that_is_killed_costs_no_wrong_answer_and_is_replaced(
    server: RunningServer, known: list[tuple[bytes, Answer]]
) -> None:
    asyncio.run(kill_a_replica(server, known))


async def kill_a_replica(server: RunningServer, known: list[tuple[bytes, Answer]]) -> None:
    before = replicas_of(server)
    assert len(before) == 2
    victim = min(before)
    statuses: Counter[int] = Counter()
    is_over = asyncio.Event()
    async with http_client() as http:

        async def client(number: int) -> None:
            one = Client(http, server.url, known, seed=number)
            while not is_over.is_set():
                file, expected = one.random.choice(known)
                response = await one.post(file)
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    assert same(scores(response.json()), expected)
                else:
                    assert 500 <= response.status_code < 600
                    await asyncio.sleep(0.05)

        async def has_answered(count: int) -> bool:
            return statuses[200] >= count

        async def is_replaced() -> bool:
            return len(replicas_of(server) - {victim}) == 2

        clients = asyncio.gather(*(client(number) for number in range(16)))
        try:
            await until(lambda: has_answered(50), "answers before")
            psutil.Process(victim).kill()
            await until(is_replaced, "a new replica")
            answered = statuses[200]
            await until(lambda: has_answered(answered + 50), "answers after")
        finally:
            is_over.set()
            await clients
        for _ in range(10):
            await Client(http, server.url, known, seed=0).good()


# ---- bytes that are no request ------------------------------------------------------------------

HEAD = b"POST /classify?top_k=10 HTTP/1.1\r\nHost: server\r\nContent-Type: image/png\r\n"

MALFORMED = {
    "two lengths": (HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
    "length and chunks": (
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        400,
    ),
    "negative length": (HEAD + b"Content-Length: -4\r\n\r\nabcd", 400),
    "length beyond 64 bits": (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
    "large length": (HEAD + b"Content-Length: 9999999999\r\n\r\n", 413),
    "chunk of no size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "chunks without end": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + bytes(4096) + b"\r\n") * 20,
        413,
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "unknown method": (b"FOO / HTTP/1.1\r\nHost: server\r\n\r\n", 400),
    "other method": (b"TRACE /classify HTTP/1.1\r\nHost: server\r\n\r\n", 405),
    "path upwards": (b"GET /docs/../../etc/passwd HTTP/1.1\r\nHost: server\r\n\r\n", 404),
    "encoded path upwards": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: server\r\n\r\n", 404),
}  # fmt: skip


def test_malformed_requests_are_refused_and_pipelined_ones_answered_in_order(
    server: RunningServer, known: list[tuple[bytes, Answer]]
) -> None:
    asyncio.run(talk_raw(server.url, known))


async def talk_raw(url: str, known: list[tuple[bytes, Answer]]) -> None:
    statuses = {}
    for name, (content, _) in MALFORMED.items():
        [(statuses[name], _)] = await exchange(url, content, answers=1)
    assert statuses == {name: status for name, (_, status) in MALFORMED.items()}
    pipelined = (HEAD + b"Content-Length: %d\r\n\r\n" % len(file) + file for file, _ in known)
    answers = await exchange(url, b"".join(pipelined), answers=len(known))
    for (status, content), (_, expected) in zip(answers, known, strict=True):
        assert status == 200
        assert same(scores(json.loads(content)), expected)


async def exchange(url: str, content: bytes, answers: int) -> list[tuple[int, bytes]]:
    """Send bytes, and return the status and body of so many answers."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(content)
    received = []
    for _ in range(answers):
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)).decode()
        found = re.search(r"(?i)\r\ncontent-length: (\d+)", head)
        assert found, head
        received.append((int(head.split()[1]), await reader.readexactly(int(found[1]))))
    writer.close()
    return received


# ---- the end of a server ------------------------------------------------------------------------


def test_sigterm_under_load_answers_what_was_accepted_and_leaves_nothing_behind(
    tmp_path: Path, known: list[tuple[bytes, Answer]]
) -> None:
    # Accepted images wait for their batch until the server drains.
    with serving(None, tmp_path, "--batch-wait", 1000, "--batch-size", 64) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        asyncio.run(end_under_load(server, known))
        assert server.wait() == 0
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
        assert alive == []
        port = httpx.URL(server.url).port
    with serving(None, tmp_path, "--port", port) as again:
        assert again.url == server.url
        asyncio.run(ask_once(again.url, known))


async def end_under_load(server: RunningServer, known: list[tuple[bytes, Answer]]) -> None:
    refused = 0
    # Each request has a connection of its own: one that is kept may be closed as the next is sent.
    async with http_client(headers={"Connection": "close"}) as http:
        clients = [Client(http, server.url, known, seed=number) for number in range(24)]

        async def are_accepted() -> bool:
            return await metric(http, server.url, "bitfast_queue_images") == len(clients)

        async def come_late(client: Client) -> None:
            """Ask until nobody listens any more."""
            nonlocal refused
            with contextlib.suppress(httpx.TransportError):
                while server.process.poll() is None:
                    response = await client.post(known[0][0])
                    if response.status_code != 200:
                        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                        refused += 1

        accepted = asyncio.gather(*(client.good() for client in clients))
        await until(are_accepted, "all requests are accepted")
        server.signal()
        await asyncio.gather(accepted, *(come_late(client) for client in clients[:8]))
        assert refused


async def ask_once(url: str, known: list[tuple[bytes, Answer]]) -> None:
    async with http_client() as http:
        await Client(http, url, known, seed=0).good()
