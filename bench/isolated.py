"""Work for kernels that no card has proved yet, in another process: what dies or hangs loses nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import contest, registry
from .cases import Case
from .limits import Limits
from .rows import FAILED, SKIPPED, Row

START_LIMIT = 120.0
"""Seconds for the process to begin."""
MOST_HANGS = 2
"""After so many cases that had to be ended, the others are not begun: each costs its whole time."""

Find = Callable[[str, Sequence[int]], Iterable[Case]]
"""Returns all cases of a device, as :func:`bench.registry.cases` does."""


class LostError(RuntimeError):
    """The other process died, or did not answer in time and was ended; the message says which."""


class OtherProcess:
    """A process that answers questions, begun when the first one comes, and anew where one has ended it.

    Attributes:
        hangs: How often it did not answer in time.
    """

    def __init__(self, answer: Callable[..., Any], *arguments: Any) -> None:
        """Let ``answer``, called with the arguments and then a question, say what is to be sent back.

        All of them must be picklable. What is to be kept between questions can be an argument, of which the
        process has a copy.
        """
        self._answers = answer, arguments
        self._process: Any = None
        self._connection: Connection | None = None
        self.hangs = 0

    def ask(self, question: Any, seconds: float | None) -> Any:
        """Return the answer to a question, which may take so many seconds; LostError says why there is none."""
        try:
            connection = self._begin()
            connection.send(question)
            answer, is_usable = self._received(connection, seconds)
        except (EOFError, OSError, TimeoutError) as error:
            raise LostError(self._end(error)) from None
        if not is_usable:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, if there is one, and what it holds of the GPU's memory with it."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _begin(self) -> Connection:
        if self._connection is None:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            spawn = multiprocessing.get_context("spawn")
            self._connection, theirs = spawn.Pipe()
            arguments = (theirs, *self._answers)
            self._process = spawn.Process(target=serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
            self._received(self._connection, START_LIMIT)
        return self._connection

    def _received(self, connection: Connection, seconds: float | None) -> Any:
        if not connection.poll(seconds):
            self.hangs += 1
            raise TimeoutError(f"no answer after {seconds:g} s")
        return connection.recv()

    def _end(self, error: Exception) -> str:
        """End a process that does not answer, and return how it ended."""
        if isinstance(error, TimeoutError):
            self.close()
            return str(error)
        self._process.join(10)
        code = self._process.exitcode
        self.close()
        return f"the process died, exit status {code}"


def serve(connection: Connection, answer: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Answer until nobody asks any more or the GPU can no longer be used."""
    if torch.cuda.is_available():
        torch.cuda.init()
    connection.send("ready")
    is_usable = True
    while is_usable:
        try:
            question = connection.recv()
        except EOFError:
            return
        found = answer(*arguments, question)
        is_usable = has_usable_gpu()
        connection.send((found, is_usable))


def has_usable_gpu() -> bool:
    """Give back the GPU's memory that nobody uses; return whether no kernel has spoilt it for this process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# ---- cases ------------------------------------------------------------------------------------------------


class IsolatedCases:
    """Runs cases in another process."""

    def __init__(self, find: Find = registry.cases) -> None:
        self._process = OtherProcess(rows_of, find)

    def __enter__(self) -> IsolatedCases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, case: Case, limits: Limits | None, rounds: int, *, is_quick: bool = False
    ) -> list[Row]:
        """Check and time one case, as :func:`bench.contest.run` does; it has ``case.time_limit`` seconds."""
        if self._process.hangs >= MOST_HANGS:
            return [contest.not_run(case, SKIPPED, f"{MOST_HANGS} cases before did not end")]
        question = case.title, case.device, case.threads, limits, rounds, is_quick
        try:
            rows: list[Row] = self._process.ask(question, case.time_limit)
        except LostError as error:
            return [contest.not_run(case, FAILED, str(error))]
        return rows

    def close(self) -> None:
        """End the process."""
        self._process.close()


def rows_of(find: Find, question: tuple[str, str, int, Limits | None, int, bool]) -> list[Row]:
    """Run the case that has a title; return its rows."""
    title, device, threads, limits, rounds, is_quick = question
    (case,) = (case for case in find(device, [threads]) if case.title == title)
    return contest.run(case, limits, rounds, is_quick=is_quick)
