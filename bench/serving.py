"""``python -m bench.serving``: ``bitfast serve`` beside transformers' pipeline in the same deployment.

Both run on Ray Serve with as many replicas and threads, the same batches, route and bodies, one after the
other, in turns. A closed loop of clients in one process asks as fast as it is answered. That the answers agree
is checked before anything is timed, and that each is the one of its own image while it is.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image

from .base import ROOT
from .models import R50X1, Network, reference_model
from .photographs import jpeg_files
from .rows import machine
from .tables import table

IMAGES = 5
CLIENTS = (1, 8, 32)
LABELS = 5
ALLOWED = {"float32": 0.03, "bfloat16": 0.2}
"""Of the difference between a server's scores and those of float32 and Pillow's pixels. :func:`check` allows
bitfast less. transformers' fast processor takes 0.01: one byte in 400 is another level, which random weights
magnify."""
REPEATED = {"float32": 1e-3, "bfloat16": 0.03}
"""Of the difference between a server's scores of an image in different batches."""
WAITING = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
"""What threads of both models do while they wait for each other, which ``bitfast serve`` sets itself."""
STARTS_WITHIN = 180.0
"""Seconds."""

Answer = list[dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    name: str
    url: str
    process: subprocess.Popen[bytes]


@dataclass
class Row:
    """What one server did for so many clients at once, in all rounds; seconds."""

    server: str
    clients: int
    requests: int
    per_second: list[float]  # of each round
    p50: float
    p99: float
    client_cpu: float  # cores that the clients' process took


# ---- the model and the images -------------------------------------------------------------------


def save_model(folder: Path) -> None:
    """Write R50x1 with random weights, whose labels differ by image, and the processor of 224x224 images."""
    torch.manual_seed(0)
    model = reference_model(Network(R50X1, batch=1))
    with torch.no_grad():
        model.classifier[1].weight.mul_(20)  # else all labels are nearly as probable
    model.save_pretrained(folder)
    from transformers import BitImageProcessorFast

    BitImageProcessorFast(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder)


# ---- the servers --------------------------------------------------------------------------------


def command_of(name: str, folder: Path, port: int, given: argparse.Namespace) -> list[str]:
    shared = ["--port", port, "--dtype", given.dtype, "--replicas", given.replicas]
    shared += ["--batch-size", given.batch_size]
    if name == "bitfast":
        command = ["bitfast", "serve", "--model", folder, *shared]
        command += ["--cpus-per-replica", given.threads, "--batch-wait", given.batch_wait / 1000]
    else:
        command = ["bench.serving_peer", folder, *shared, "--processor", given.processor]
        command += ["--threads", given.threads, "--batch-wait", given.batch_wait / 1000]
    return [sys.executable, "-m", *map(str, command)]


@contextmanager
def running(name: str, folder: Path, given: argparse.Namespace) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it at last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **WAITING, "PYTHONPATH": str(ROOT)}
    with open(folder.parent / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command_of(name, folder, port, given), stdout=log, stderr=log, env=environment
        )
    try:
        server = Server(name, f"http://127.0.0.1:{port}/classify", process)
        asyncio.run(wait_for(server))
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def wait_for(server: Server) -> None:
    """Wait until a server classifies.

    Raises:
        RuntimeError: it ends, or does not within ``STARTS_WITHIN``.
    """
    body = next(jpeg_files(1))
    end = time.monotonic() + STARTS_WITHIN
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and server.process.poll() is None:
            try:
                async with session.post(server.url, data=body) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    raise RuntimeError(f"{server.name} does not answer (status {server.process.poll()})")


# ---- checking -----------------------------------------------------------------------------------


async def answers_of(server: Server, files: Sequence[bytes], labels: int) -> list[Answer]:
    """Return a server's answer to each file, asked at once, so that they share batches."""
    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(ask(session, server.url, file, labels) for file in files))


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, labels: int) -> Answer:
    headers = {"Content-Type": "image/jpeg"}
    async with session.post(url, params={"top_k": labels}, data=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:200]}")
        answer: Answer = await response.json()
        return answer


def difference(ours: Answer, theirs: Answer) -> float:
    """Return by how much the scores of two answers differ at most; infinite if the labels do."""
    expected = {one["label"]: one["score"] for one in theirs}
    if {one["label"] for one in ours} != set(expected):
        return math.inf
    return max(abs(one["score"] - expected[one["label"]]) for one in ours)


def exact_answers(folder: Path, files: Sequence[bytes]) -> list[Answer]:
    """Return what transformers' model answers in float32, with the pixels of its slow processor."""
    from transformers import BitForImageClassification, BitImageProcessor

    images = [Image.open(BytesIO(file)) for file in files]
    pixels = BitImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    model = BitForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = model(pixels).logits.softmax(-1).tolist()
    names = model.config.id2label
    return [[{"label": names[n], "score": one} for n, one in enumerate(row)] for row in scores]


def check(answers: dict[str, list[Answer]], exact: Sequence[Answer], dtype: str) -> str:
    """Return by how much the servers' scores differ from exact ones.

    Raises:
        RuntimeError: by too much, or those of bitfast by over twice as much as those of transformers.
    """
    errors = {name: max(map(difference, given, exact)) for name, given in answers.items()}
    told = ", ".join(f"{name} by {error:.1e}" for name, error in errors.items())
    told = f"scores differ from those of float32 by at most: {told}"
    allowed = min(ALLOWED[dtype], 2 * errors["transformers"] + 1e-4)
    if not (errors["bitfast"] <= allowed and errors["transformers"] <= ALLOWED[dtype]):
        raise RuntimeError(told)
    return told


# ---- timing -------------------------------------------------------------------------------------


async def measure(
    server: Server,
    files: Sequence[bytes],
    expected: Sequence[Answer],
    allowed: float,
    clients: int,
    seconds: float,
) -> tuple[list[float], float]:
    """Let clients ask for so many seconds; return the time of each request, and the seconds in all.

    Raises:
        RuntimeError: an answer is not that of its image.
    """
    turn = itertools.cycle(range(len(files)))
    times: list[float] = []

    async def client(session: aiohttp.ClientSession, end: float) -> None:
        while time.perf_counter() < end:
            number = next(turn)
            started = time.perf_counter()
            answer = await ask(session, server.url, files[number], LABELS)
            times.append(time.perf_counter() - started)
            if difference(answer[:1], expected[number][:1]) > allowed:
                raise RuntimeError(f"{server.name}: a wrong answer: {answer}")

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(ask(session, server.url, files[0], LABELS) for _ in range(clients)))
        started = time.perf_counter()
        await asyncio.gather(*(client(session, started + seconds) for _ in range(clients)))
        return times, time.perf_counter() - started


def contest(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Check, then time both servers, in turns.

    Raises:
        RuntimeError: an answer is wrong, or a server fails.
    """
    files, repeated = list(jpeg_files(IMAGES)), REPEATED[given.dtype]
    exact = exact_answers(folder, files)
    samples: dict[tuple[str, int], list[tuple[list[float], float, float]]] = {}
    with (
        running("bitfast", folder, given) as ours,
        running("transformers", folder, given) as theirs,
    ):
        answers = {
            server.name: asyncio.run(answers_of(server, files, R50X1["num_labels"]))
            for server in (ours, theirs)
        }
        print(check(answers, exact, given.dtype), file=sys.stderr)
        for number in range(given.rounds):
            for clients in given.clients:
                # Who begins alternates.
                for server in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                    cpu = time.process_time()
                    known = answers[server.name]
                    times, seconds = asyncio.run(
                        measure(server, files, known, repeated, clients, given.seconds)
                    )
                    cpu = (time.process_time() - cpu) / seconds
                    samples.setdefault((server.name, clients), []).append((times, seconds, cpu))
                    told = f"{len(times) / seconds:.1f} a second"
                    print(f"{server.name}, {clients} clients: {told}", file=sys.stderr)
    return [
        row_of(*key, rounds) for key, rounds in sorted(samples.items(), key=lambda item: item[0][1])
    ]


def row_of(server: str, clients: int, rounds: Sequence[tuple[list[float], float, float]]) -> Row:
    times = [each for times, _, _ in rounds for each in times]
    p50, p99 = (float(np.percentile(times, percent)) for percent in (50, 99))
    rates = [len(times) / seconds for times, seconds, _ in rounds]
    client_cpu = float(np.median([cpu for _, _, cpu in rounds]))
    return Row(server, clients, len(times), rates, p50, p99, client_cpu)


# ---- the command --------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the table in Markdown."""
    theirs = {row.clients: row for row in rows if row.server == "transformers"}

    def cells(row: Row) -> list[str]:
        other = theirs[row.clients]
        rate, base = (float(np.median(each.per_second)) for each in (row, other))
        times = (f"{1000 * value:.0f} ms" for value in (row.p50, row.p99))
        return [f"{row.clients}", row.server, f"{rate:.1f}", *times, f"{rate / base:.2f}x"]

    heads = ("clients", "server", "images a second", "p50", "p99", "ratio")
    return table(heads, map(cells, rows), "rlrrrr")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    add = parser.add_argument
    add("--dtype", choices=sorted(REPEATED), default="float32", help="of both (default: float32)")
    add("--clients", type=int, nargs="+", default=CLIENTS, help="at once")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=10.0, help="of each server, clients and round")
    add("--replicas", type=int, default=1)
    add("--threads", type=int, default=os.cpu_count(), help="of each replica")
    add("--batch-size", type=int, default=8)
    add("--batch-wait", type=float, default=5.0, help="in milliseconds")
    add("--processor", choices=("fast", "slow"), default="fast", help="of transformers")
    add("--output", type=Path, metavar="FILE", help="write JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        found = machine()
        try:
            rows = contest(Path(folder) / "model", given)
        except RuntimeError as error:
            print(f"bench.serving: {error}", file=sys.stderr)
            for log in Path(folder).glob("*.log"):
                print(f"---- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            return 1
    print("\n".join(lines(rows)))
    if given.output is not None:
        settings = {name: value for name, value in vars(given).items() if name != "output"}
        settings |= WAITING
        content = {
            "command": " ".join(["python -m bench.serving", *sys.argv[1:]]),
            "settings": settings,
            "machine": found,
            "rows": [asdict(row) for row in rows],
        }
        given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
