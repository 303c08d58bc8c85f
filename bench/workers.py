"""The processes of contestants, seen from the one that compares them; and another commit's, for ``--base``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .base import ROOT, environment_of, worktree_of
from .cases import Case, Contestant, Running

Work = dict[str, Any]
"""What a contestant is to do; ``contestant.py`` says what its keys mean."""

START = "import runpy, sys; runpy.run_path(sys.argv.pop(), run_name='__main__')"
"""As a script, but without its folder in the module path, where its neighbours' names would hide others'."""

CONTESTANT = Path(__file__).with_name("contestant.py")
START_TIMEOUT = 900.0
"""Seconds after which a contestant without a first result is given up; to compile takes minutes."""
CALL_TIMEOUT = 300.0


class WorkerError(RuntimeError):
    """The contestant failed; the message says how."""


def begin_process(work: Work, checkout: Path | None, stack: ExitStack) -> Running:
    """Start a contestant's process, which ends with the stack; return its first results or raise WorkerError.

    Args:
        work: What it is to do, without the place of its results.
        checkout: Of the bitfast that it imports; None: what this process has imported.
    """
    folder = Path(stack.enter_context(TemporaryDirectory()))
    output = folder / "output.npz"
    worker = Worker(work | {"output": str(output)}, folder, checkout)
    stack.callback(worker.close)
    first = worker.answer(START_TIMEOUT)
    with np.load(output) as arrays:
        results = [torch.from_numpy(array) for array in arrays.values()]
    output.unlink()
    return Running(results, worker.time, partial(worker.time, "kernels"), **first)


class Worker:
    def __init__(self, work: Work, folder: Path, checkout: Path | None) -> None:
        # The path on which this process found what it imported.
        here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = here if checkout is None else environment_of(checkout)
        self._log = folder / "messages.txt"
        self._connection, theirs = Pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), str(CONTESTANT)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=checkout, env={**environment, **needed_by(work, folder)},
            )  # fmt: skip
        theirs.close()
        self._connection.send(work)

    def time(self, wanted: Any) -> Any:
        """Return the seconds that so many calls take, or samples for "kernels"; or raise WorkerError."""
        try:
            self._connection.send(wanted)
        except OSError as error:
            raise WorkerError(self._last_message()) from error
        return self.answer(CALL_TIMEOUT)["seconds"]

    def close(self) -> None:
        """End the process, unless it has ended."""
        try:
            self._connection.send(None)
            self._process.wait(10)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def answer(self, timeout: float) -> dict[str, Any]:
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


def needed_by(work: Work, folder: Path) -> dict[str, str]:
    """Return the variables that a contestant's process gets; ``folder`` is its own."""
    needed = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # or nothing would be compiled
        "HF_HUB_OFFLINE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    if work["threads"]:
        needed["OMP_NUM_THREADS"] = str(work["threads"])
    if work["package"] == "openvino":
        # When imported it reports home, unless its consent file says no or there is no place for one.
        needed["HOME"] = str(folder / "nowhere")
    return needed


# ---- another commit -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The bitfast of another commit: as it was asked for, and the folder of its checkout."""

    revision: str
    folder: Path

    def pair(self, case: Case, ours: Contestant) -> Iterator[Contestant]:
        """Yield our contestant and that of the other commit, alike in processes of their own."""
        work = ours.work or {
            "package": "case", "device": case.device, "threads": case.threads, "case": case.title,
            "contestant": ours.name, "root": str(ROOT),
        }  # fmt: skip
        yield replace(ours, begin=partial(begin_process, work, None))
        theirs = partial(begin_process, work, self.folder)
        yield replace(ours, name=f"{ours.name} at {self.revision}", begin=theirs)


@contextmanager
def base_at(revision: str) -> Iterator[Base]:
    """Check another commit out for as long as the block lasts; errors are those of ``worktree_of``."""
    with worktree_of(revision) as folder:
        yield Base(revision, folder)
