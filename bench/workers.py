"""The processes of the contestants, seen from the one that compares them."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

START = "import runpy, sys; runpy.run_path(sys.argv.pop(), run_name='__main__')"
"""As a script, but without its folder in the module path, where its neighbours' names would hide others'."""

CONTESTANT = Path(__file__).with_name("contestant.py")
START_TIMEOUT = 900.0
"""Seconds after which a contestant without a first result is given up; to compile takes minutes."""
CALL_TIMEOUT = 300.0


class Work(TypedDict):
    """What a contestant is to do; paths are text.

    ``package`` is "transformers", "timm", "bitfast", "onnxruntime" or "openvino"; ``dtype`` is "float32" or
    "bfloat16"; ``form`` is "eager", "compiled", "autocast" or "accelerated"; ``folder`` holds the checkpoint,
    ``onnx`` the same network for other runtimes, ``input`` the images and ``grad`` the gradient of the output,
    for training; ``output`` is where all numbers of the results go.
    """

    package: str
    dtype: str
    form: str
    architecture: str
    threads: int
    is_training: bool
    folder: str
    onnx: str
    input: str
    grad: str
    output: str


def environment_of(work: Work, folder: Path) -> dict[str, str]:
    """Return the environment of a contestant's process, whose own folder is ``folder``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # it must find what this process found
        "OMP_NUM_THREADS": str(work["threads"]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # or nothing would be compiled
        "HF_HUB_OFFLINE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    if work["package"] == "openvino":
        # When imported it reports home, unless its consent file says no or there is no place for one.
        environment["HOME"] = str(folder / "nowhere")
    return environment


class WorkerError(RuntimeError):
    """The contestant failed; the message says how."""


class Worker:
    """A contestant's process. A context manager; it ends with the block.

    Attributes:
        first_result: Seconds from constructing to the first result.
        peak_memory: Bytes, after the second result.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        """Start the process and wait for its first results.

        Args:
            work: What it is to do.
            folder: For its messages and what it compiles; nobody else's.

        Raises:
            WorkerError: there are none.
        """
        folder.mkdir(parents=True)
        self._log = folder / "messages.txt"
        self._connection, theirs = Pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), str(CONTESTANT)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment_of(work, folder),
            )
        theirs.close()
        try:
            self._connection.send(dict(work))
            answer = self._answer(START_TIMEOUT)
        except BaseException:
            self.close()
            raise
        self.first_result: float = answer["first_result"]
        self.peak_memory: int = answer["peak_memory"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def time(self, calls: int) -> float:
        """Return the seconds that so many calls take.

        Raises:
            WorkerError: a call failed, or took too long.
        """
        try:
            self._connection.send(calls)
        except OSError as error:
            raise WorkerError(self._last_message()) from error
        return self._answer(CALL_TIMEOUT)["seconds"]

    def close(self) -> None:
        """End the process, unless it has ended."""
        if self._connection.closed:
            return
        try:
            self._connection.send(None)
            self._process.wait(10)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            if not self._connection.poll(timeout):
                raise WorkerError(f"no answer after {timeout:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(f"the process died: {self._last_message()}") from error
        if "error" in answer:
            raise WorkerError(" ".join(answer["error"].split())[:300])
        return answer

    def _last_message(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.poll()}"
