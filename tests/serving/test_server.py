"""A real ``bitfast serve``: answers over the wire, several replicas, limits, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bitfast import extras
from tests.cli.common import lines_of_json, picture, save_model
from tests.serving.server import RunningServer, serving

SECONDS = 120
MOST_BYTES = 200_000
MOST_WAITING = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / name for name in ("one.png", "two.jpg", "three.webp")]
    for path in paths:
        picture().save(path)
    return paths


def counted(text: str, name: str, **labels: str) -> dict[str, float]:
    """Return a metric's value in each replica."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        parts = [f'{key}="{label}"' for key, label in labels.items()]
        if series.startswith(name + "{") and all(part in series for part in parts):
            replica = series.partition('replica="')[2].partition('"')[0]
            values[replica] = values.get(replica, 0) + float(value)
    return values


# ---- a server with two replicas ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ["--replicas", "1:2", "--batch-size", 2, "--max-request-bytes", MOST_BYTES]
    options += ["--body-timeout", 1]
    with serving(model, tmp_path_factory.mktemp("log"), *options) as server:
        bring_second_replica(server)
        yield server


def bring_second_replica(server: RunningServer) -> None:
    """Be so many clients that one replica is too few, until there is another one.

    That takes about 20 seconds, since replicas report to Ray every 10.
    """
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"

    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:

            async def keep_place() -> None:
                while True:
                    reader, writer = await asyncio.open_connection(host, int(port))
                    with contextlib.closing(writer):
                        writer.write(head.encode() + b"begin")
                        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")

            clients = [asyncio.create_task(keep_place()) for _ in range(16)]
            deadline = time.monotonic() + SECONDS
            while len(counted((await client.get("/metrics")).text, "bitfast_queue_images")) < 2:
                assert time.monotonic() < deadline, "no second replica comes"
                assert not any(task.done() for task in clients)
                await asyncio.sleep(0.5)
            for task in clients:
                task.cancel()
            await asyncio.wait(clients)

    asyncio.run(main())


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        yield client


def test_the_numbers_of_bitfast_classify(
    client: httpx.Client, model: Path, photos: list[Path]
) -> None:
    command = [sys.executable, "-m", "bitfast", "classify", "--model", str(model), "--json"]
    command += ["--batch-size", "1", *map(str, photos)]
    printed = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout
    for path, line in zip(photos, lines_of_json(printed.decode()), strict=True):
        expected = {one["label"]: one["score"] for one in line["predictions"]}
        answer = client.post("/classify", content=path.read_bytes())
        assert answer.status_code == 200
        scores = {one["label"]: one["score"] for one in answer.json()}
        # The replica may have other threads than the command, and sums be rounded in another way.
        assert scores == pytest.approx(expected, abs=1e-6)
        assert [one["score"] for one in answer.json()] == sorted(scores.values(), reverse=True)


def test_forms_json_and_tensors(client: httpx.Client, photos: list[Path]) -> None:
    files = [("image", (path.name, path.read_bytes(), "image/png")) for path in photos]
    answer = client.post("/classify?top_k=1", files=[*files, ("image", ("bad.png", b"bad"))])
    assert answer.status_code == 200
    assert [len(one) for one in answer.json()] == [1, 1, 1, 1]
    assert set(answer.json()[3]) == {"error"}
    vector = client.post("/embed", content=photos[0].read_bytes()).json()
    assert len(vector) == 32
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [2, 3, 24, 24]}
    body = {"inputs": [{**tensor, "data": [0.5] * 2 * 3 * 24 * 24}]}
    (output,) = client.post("/v2/models/tiny/infer", json=body).json()["outputs"]
    assert output["shape"] == [2, 3]


def test_errors_over_the_wire(client: httpx.Client) -> None:
    for answer, status in (
        (client.get("/classify"), 405),
        (client.get("/nowhere"), 404),
        (client.post("/classify", content=b"bad", headers={"Content-Type": "a/b"}), 415),
        (client.post("/classify", content=b"bad"), 422),
        (client.post("/classify", json={"inputs": "http://127.0.0.1:1/a.png"}), 422),
    ):
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_large_body_over_the_wire(client: httpx.Client, is_announced: bool) -> None:
    content = bytes(20 * MOST_BYTES)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), MOST_BYTES // 4):
            yield content[start : start + MOST_BYTES // 4]

    headers = {"Content-Type": "image/png"}
    answer = client.post(
        "/classify", content=content if is_announced else pieces(), headers=headers
    )
    assert answer.status_code == 413
    assert str(MOST_BYTES) in answer.json()["error"]


def test_a_body_that_does_not_come(server: RunningServer) -> None:
    with connected(server) as connection:
        request = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(request.encode() + b"begin")
        answer = b""
        while received := connection.recv(4096):  # until the server closes the connection
            answer += received
        assert answer.startswith(b"HTTP/1.1 408 ")


@contextlib.contextmanager
def connected(server: RunningServer) -> Iterator[socket.socket]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        yield connection


def test_every_scrape_sees_all_replicas(server: RunningServer, photos: list[Path]) -> None:
    content = photos[0].read_bytes()

    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:

            async def scrape() -> dict[str, float]:
                text = (await client.get("/metrics")).text
                return counted(text, "bitfast_requests_total", route="/embed", status="200")

            before, sent = sum((await scrape()).values()), 0
            deadline = time.monotonic() + SECONDS
            while len([n for n in (await scrape()).values() if n > 0]) < 2:
                assert time.monotonic() < deadline, "one replica gets all requests"
                posts = [client.post("/embed", content=content) for _ in range(8)]
                answers = await asyncio.gather(*posts)
                assert {answer.status_code for answer in answers} == {200}
                sent += len(answers)
            for _ in range(6):  # whichever replica answers
                values = await scrape()
                assert len(values) == 2
                assert sum(values.values()) == before + sent

    asyncio.run(main())


def test_nobody_else_can_use_its_ray(server: RunningServer) -> None:
    """Who reaches a port of Ray's could run code there, without its token."""
    import grpc

    for process in psutil.Process(server.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            address = connection.laddr
            if connection.status != psutil.CONN_LISTEN or address.ip.endswith("127.0.0.1"):
                continue
            # Ray Serve's replicas take pickled calls on a port of all interfaces.
            assert process.cmdline()[0].startswith("ray::ServeReplica")
            with grpc.insecure_channel(f"127.0.0.1:{address.port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as error:
                    call(b"", timeout=SECONDS)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_nothing_is_left_of_a_server_that_is_killed(server: RunningServer) -> None:
    """The last test of this server."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    # Ray's agents ask for a minute after the node that they belong to, and then end as well.
    agents = [process for process in processes if "Agent" in " ".join(process.cmdline())]
    others = [process for process in processes if process not in agents]
    assert len(others) > 3
    folder = ray_folder(processes)
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(others, timeout=SECONDS)
    assert alive == []
    for process in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(agents, timeout=SECONDS)
    shutil.rmtree(folder)  # this is left


# ---- a server whose images wait ----------------------------------------------------------------------


def test_hanging_up_a_full_queue_and_draining(
    model: Path, photos: list[Path], tmp_path: Path
) -> None:
    """An image waits for a batch that is never full, until the server ends: 4 of at most 8."""
    options = ["--batch-size", 8, "--batch-wait", 600, "--max-queue", MOST_WAITING]
    options += ["--request-timeout", 600]
    content = photos[0].read_bytes()

    async def main(server: RunningServer) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:

            async def metric(name: str, **labels: str) -> float:
                text = (await client.get("/metrics")).text
                return sum(counted(text, name, **labels).values())

            async def waiting(count: int) -> None:
                deadline = time.monotonic() + SECONDS
                while await metric("bitfast_queue_images") != count:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)

            def post() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/classify", content=content))

            gone = [post() for _ in range(MOST_WAITING)]
            await waiting(MOST_WAITING)
            refused = await post()
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            for task in gone:
                task.cancel()
            await waiting(0)
            assert await metric("bitfast_batch_images_count") == 0  # the model saw none of them
            assert await metric("bitfast_requests_total", status="499") == MOST_WAITING

            accepted = [post() for _ in range(MOST_WAITING - 1)]
            await waiting(MOST_WAITING - 1)
            server.signal(signal.SIGTERM)
            answers = await asyncio.gather(*accepted)
            assert [answer.status_code for answer in answers] == [200] * (MOST_WAITING - 1)
            await until_refused(client)

    with serving(model, tmp_path, *options) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        folder = ray_folder(processes)
        assert folder.exists()
        asyncio.run(main(server))
        assert server.wait() == 0
        _, alive = psutil.wait_procs(processes, timeout=SECONDS)
        assert alive == []
        assert not folder.exists()
        assert server.log() == "bitfast: answering the accepted requests, then ending\n"


async def until_refused(client: httpx.AsyncClient) -> None:
    """Ask until the server no longer listens; until then it says that it shuts down."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            answer = await client.post("/classify", content=b"image")
        except httpx.TransportError:
            return
        assert answer.status_code == 503
        assert answer.json() == {"error": "the server shuts down"}
    raise AssertionError("the server goes on")


def ray_folder(processes: list[psutil.Process]) -> Path:
    """Return the folder that the command has made for its Ray."""
    for process in processes:
        for argument in process.cmdline():
            parts = Path(argument.rpartition("=")[2]).parts
            for index, part in enumerate(parts):
                if part.startswith("bitfast-") and parts[index + 1 :]:
                    return Path(*parts[: index + 1])
    raise AssertionError("no process names it")


# ---- what keeps it from starting ----------------------------------------------------------------------


Refused = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Refused:
    from bitfast import cli

    def call(*arguments: Any) -> tuple[int, str, str]:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        status: Any
        try:
            status = cli.main(["serve", *map(str, arguments)])
        except SystemExit as exit_:
            status = exit_.code
        assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_no_such_model(run: Refused, tmp_path: Path) -> None:
    status, out, err = run("--model", tmp_path / "nothing")
    assert (status, out) == (2, "")
    assert err.startswith(f"bitfast: error: the model '{tmp_path / 'nothing'}' cannot be loaded: ")
    assert err.count("\n") == 1


def test_more_gpus_than_there_are(run: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, out, err = run("--replicas", "1:2", "--gpus-per-replica", "0.75")
    assert (status, out) == (2, "")
    assert err == (
        "bitfast: error: there is no place for 2 replicas with 0.75 GPUs each; this machine has 1\n"
    )


def test_a_model_that_cannot_take_what_its_processor_makes(run: Refused, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gray", num_channels=1)
    status, out, err = run("--model", folder)
    assert (status, out) == (2, "")
    assert err.startswith(f"bitfast: error: the model '{folder}' cannot be run: pixel_values must ")
    assert err.count("\n") == 1


def test_a_port_that_is_taken(run: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run("--port", port)
    assert (status, out) == (2, "")
    assert err == f"bitfast: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_an_address_of_another_machine(run: Refused) -> None:
    status, _, err = run("--host", "192.0.2.1")
    assert status == 2
    assert err.startswith("bitfast: error: cannot listen on 192.0.2.1:8000: ")


def test_the_extra_is_missing(run: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "EXTRAS", {**extras.EXTRAS, "serve": ("ray_of_nobody",)})
    status, _, err = run()
    assert status == 2
    assert err == (
        "bitfast: error: bitfast serve needs ray_of_nobody, not installed here: "
        "pip install 'bitfast[serve]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "argument --port: must be an integer from 0 to 65535"),
        (["--replicas", "2:1"], "argument --replicas: must be at least 1, or a pair"),
        (["--replicas", "x"], "argument --replicas: must be N or MIN:MAX, got 'x'"),
        (["--batch-size", "0"], "argument --batch-size: must be an integer of at least 1"),
        (["--batch-wait", "-1"], "argument --batch-wait: must be a number of at least 0, got -1"),
        (["--batch-wait", "nan"], "argument --batch-wait: must be a number of at least 0, got nan"),
        (["--request-timeout", "x"], "argument --request-timeout: must be a number, got 'x'"),
        (["--name", "a/b"], "argument --name: must be one part of a URL"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(run: Refused, arguments: list[str], message: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert f"bitfast serve: error: {message}" in err


def test_the_default_is_what_the_help_says(run: Refused) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "(default: 127.0.0.1;" in out
    assert "(default: 32 MiB)" in out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from bitfast.serving import arguments; "
        "print([name for name in ('ray', 'fastapi', 'bitfast.serving.run') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout
    assert json.loads(printed.decode().replace("'", '"')) == []
