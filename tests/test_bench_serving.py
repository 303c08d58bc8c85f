"""The benchmark of servers: what it starts, what it holds for equal, what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import serving
from bitfast.cli import build_parser

GIVEN = argparse.Namespace(
    dtype="float32", replicas=2, threads=1, batch_size=4, batch_wait=5.0, processor="fast"
)


def test_the_command_line_takes_what_the_benchmark_gives(tmp_path: Path) -> None:
    command = serving.command_of("bitfast", tmp_path, 4711, GIVEN)
    arguments = build_parser().parse_args(command[command.index("serve") :])
    assert (arguments.model, arguments.port, arguments.dtype) == (str(tmp_path), 4711, "float32")
    assert (arguments.replicas, arguments.cpus_per_replica) == (2, 1)
    assert (arguments.batch_size, arguments.batch_wait) == (4, 0.005)


def answer(**scores: float) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in scores.items()]


def test_answers_differ_by_their_scores_whatever_their_order() -> None:
    assert serving.difference(answer(a=0.6, b=0.4), answer(b=0.4, a=0.6)) == 0
    assert serving.difference(answer(a=0.6, b=0.4), answer(a=0.5, b=0.4)) == pytest.approx(0.1)
    assert serving.difference(answer(a=0.6), answer(b=0.6)) == math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "is_right"),
    [(0.5, 0.5, True), (0.518, 0.51, True), (0.53, 0.51, False), (0.5, 0.54, False)],
)
def test_both_servers_are_held_against_exact_scores(
    ours: float, theirs: float, is_right: bool
) -> None:
    answers = {"bitfast": [answer(a=ours)], "transformers": [answer(a=theirs)]}
    exact = [answer(a=0.5)]
    if is_right:
        assert "bitfast by" in serving.check(answers, exact, "float32")
    else:
        with pytest.raises(RuntimeError, match="differ from those of float32"):
            serving.check(answers, exact, "float32")


@pytest.fixture
def stub() -> Iterator[serving.Server]:
    """A server that gives a body's first byte as score, as it was sent or, at /wrong, another."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            score = body[0] / 100 + self.path.startswith("/wrong")
            content = json.dumps(answer(a=score)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process: subprocess.Popen[bytes] = subprocess.Popen(["true"])
    yield serving.Server("stub", f"http://127.0.0.1:{server.server_port}/classify", process)
    server.shutdown()
    server.server_close()
    process.wait()


def test_every_answer_is_checked_while_it_is_timed(stub: serving.Server) -> None:
    files = [bytes([10]), bytes([60])]
    expected = asyncio.run(serving.answers_of(stub, files, 1))
    times, seconds = asyncio.run(serving.measure(stub, files, expected, 1e-3, 2, 0.2))
    assert 0 < max(times) <= seconds
    wrong = serving.Server("stub", stub.url.replace("classify", "wrong"), stub.process)
    with pytest.raises(RuntimeError, match="a wrong answer"):
        asyncio.run(serving.measure(wrong, files, expected, 1e-3, 2, 0.2))


def test_a_server_that_ends_is_not_waited_for() -> None:
    process: subprocess.Popen[bytes] = subprocess.Popen(["false"])
    process.wait()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serving.Server("gone", f"http://127.0.0.1:{port}/classify", process)
    with pytest.raises(RuntimeError, match=r"gone does not answer \(status 1\)"):
        asyncio.run(serving.wait_for(server))


def test_the_table_compares_at_the_same_number_of_clients() -> None:
    rows = [
        serving.row_of("bitfast", 8, [([0.1, 0.2, 0.3], 1.0, 0.1), ([0.2], 0.25, 0.1)]),
        serving.row_of("transformers", 8, [([0.5], 0.5, 0.1)]),
    ]
    assert serving.lines(rows) == [
        "| clients | server | images a second | p50 | p99 | ratio |",
        "|--:|---|--:|--:|--:|--:|",
        "| 8 | bitfast | 3.5 | 200 ms | 297 ms | 1.75x |",
        "| 8 | transformers | 2.0 | 500 ms | 500 ms | 1.00x |",
    ]
