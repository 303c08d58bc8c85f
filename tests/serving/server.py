"""A real ``bitfast serve`` in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 180
STOP_SECONDS = 90


class RunningServer:
    """A running ``bitfast serve``.

    Attributes:
        process: The command.
        url: Such as "http://127.0.0.1:4711".
        errors: The file that its standard error goes to.
    """

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        self.process = process
        self.errors = errors
        self.url = ""

    def log(self) -> str:
        """Return what it has written to standard error."""
        return self.errors.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Wait for the line with the address."""
        deadline = time.monotonic() + START_SECONDS
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        printed = b""
        while not (found := re.search(rb" on (http://\S+)\n", printed)):
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"the server is not ready in time:\n{self.log()}"
            if select.select([descriptor], [], [], remaining)[0]:
                some = os.read(descriptor, 4096)
                assert some, f"the server ends at the start:\n{self.log()}"
                printed += some
        self.url = found[1].decode()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """Wait for its end, and return the exit status."""
        return self.process.wait(timeout)

    def stop(self) -> None:
        """End it by SIGTERM, or else by SIGKILL."""
        if self.process.poll() is None:
            self.signal()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def serving(model: Path | None, folder: Path, *arguments: Any) -> Iterator[RunningServer]:
    """Run ``bitfast serve`` on a free port, and end it after the block.

    Args:
        model: Of ``--model``; None: the default, digits.
        folder: Where its log goes.
        arguments: More of the command, besides ``--port``.
    """
    errors = folder / "server.log"
    command = [sys.executable, "-m", "bitfast", "serve", "--port", "0", *map(str, arguments)]
    if model is not None:
        command += ["--model", str(model)]
    # What the command sets by itself.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    with errors.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
        )
    server = RunningServer(process, errors)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
