"""One case about a whole model: its contestants, each in its own process, checked, then timed in turns."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from . import peers
from .accuracy import (
    GRADIENT_LIMIT,
    OURS,
    PEERS,
    WrongResultError,
    allowed_error,
    check,
    overall_error,
)
from .limits import Limits
from .models import BASELINE, YARDSTICKS, Contestant, ModelCase, Prepared, prepare
from .rows import FAILED, MISSING, Row
from .timing import summarize, take_turns
from .workers import Worker, WorkerError

Progress = Callable[[str], None]
"""Is told what has been done."""


def steps(case: ModelCase, rounds: int) -> int:
    """Return how often :func:`run` reports progress."""
    return 1 + len(case.contestants) + rounds


def run(
    case: ModelCase, limits: Limits | None, rounds: int, progress: Progress = lambda done: None
) -> list[Row]:
    """Check and time one case; return a row per contestant, in the case's order."""
    versions = peers.installed()
    if versions["transformers"] is None:
        note = f"transformers, whose model is the reference, is missing: {install('transformers')}"
        return [
            dataclasses.replace(row_of(case, c), status=MISSING, note=note)
            for c in case.contestants
        ]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        prepared = prepare(case, Path(temporary))
        progress("float64")
        contest = Contest(prepared, versions, stack)
        for contestant in case.contestants:
            contest.admit(contestant)
            progress(contestant.name)
        return contest.timed_rows(rounds, limits, progress)


def install(name: str) -> str:
    """Say how to get a peer."""
    return peers.how_to_install(name)


def row_of(case: ModelCase, contestant: Contestant) -> Row:
    """Return a contestant's row, without what is measured."""
    return Row(
        "model",
        case.op,
        case.name,
        case.threads,
        contestant.name,
        contestant.dtype,
        is_quick=case.is_quick,
    )


class Contest:
    """The contestants of a case that have been admitted so far.

    Args:
        prepared: What they are given.
        versions: Of the peers, None where one is not installed.
        stack: Ends their processes.
    """

    def __init__(
        self, prepared: Prepared, versions: dict[str, str | None], stack: ExitStack
    ) -> None:
        self.prepared = prepared
        self.versions = versions
        self.stack = stack
        self.rows: dict[str, Row] = {}
        self.workers: dict[str, Worker] = {}
        self.yardsticks: dict[str, float] = {}

    def admit(self, contestant: Contestant) -> None:
        """Start a contestant and check its results; what is missing, fails or is wrong gets a row only."""
        row = row_of(self.prepared.case, contestant)
        if contestant.package != "bitfast" and self.versions[contestant.package] is None:
            note = install(contestant.package)
            self.rows[row.contestant] = dataclasses.replace(row, status=MISSING, note=note)
            return
        try:
            self.rows[row.contestant] = self.start(contestant, row)
        except (WorkerError, WrongResultError) as error:
            failed = dataclasses.replace(row, status=FAILED, note=f"{error}: not timed")
            self.rows[row.contestant] = failed

    def start(self, contestant: Contestant, row: Row) -> Row:
        """Start a contestant, keep its process if its results are right, and return its row.

        Raises:
            WorkerError: it failed.
            WrongResultError: its results are of another size.
        """
        needs_onnx = contestant.package in ("onnxruntime", "openvino")
        if needs_onnx and self.prepared.onnx_problem is not None:
            raise WorkerError(self.prepared.onnx_problem)
        folder = self.prepared.folder / f"contestant-{len(self.rows)}"
        output = self.prepared.folder / f"output-{len(self.rows)}.npy"
        worker = Worker(self.prepared.work(contestant, output), folder)
        self.stack.enter_context(worker)
        row = self.judge(contestant, row, output)
        if row.status == FAILED:
            worker.close()
            return row
        self.workers[contestant.name] = worker
        return dataclasses.replace(
            row, first_result=worker.first_result, peak_memory=worker.peak_memory
        )

    def judge(self, contestant: Contestant, row: Row, output: Path) -> Row:
        """Return a contestant's row with its results' error, and what is allowed."""
        dtype = contestant.dtype
        factor = OURS if contestant.is_ours else PEERS
        limit = GRADIENT_LIMIT if self.prepared.case.is_training else None
        allowed = allowed_error(getattr(torch, dtype), self.yardsticks.get(dtype), factor, limit)
        error = overall_error(torch.from_numpy(np.load(output)), self.prepared.oracle)
        output.unlink()
        row = dataclasses.replace(row, error=error, allowed_error=allowed)
        try:
            check(error, allowed)
        except WrongResultError as wrong:
            return dataclasses.replace(row, status=FAILED, note=f"{wrong}: not timed")
        if contestant == YARDSTICKS[dtype]:
            self.yardsticks[dtype] = error
        return row

    def timed_rows(self, rounds: int, limits: Limits | None, progress: Progress) -> list[Row]:
        """Time all that were admitted and return all rows."""
        timers = {name: worker.time for name, worker in self.workers.items()}
        samples = take_turns(timers, rounds, lambda: progress("in turns")) if timers else {}
        for name, seconds in samples.items():
            row = self.rows[name].timed(summarize(seconds, samples.get(BASELINE.name)))
            if limits is not None and row.seconds is not None:
                share = limits.arithmetic_fraction(self.prepared.flops, row.dtype, row.seconds)
                row = dataclasses.replace(row, fraction=share, limit="arithmetic")
            self.rows[name] = row
        return list(self.rows.values())
