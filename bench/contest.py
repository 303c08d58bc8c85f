"""One case about an op, run in this process: checked, then timed, as rows."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from .accuracy import OURS as OUR_FACTOR
from .accuracy import WrongResultError, allowed_error, check, relative_error
from .limits import Limits
from .registry import OURS, PLAIN, Case, Problem, as_list, name_of
from .rows import FAILED, Row
from .timing import summarize, take_turns, timer_of


class Checked(NamedTuple):
    """A contestant's largest error (of several results, measured by what is allowed), what is allowed there,
    and what is wrong; None where there is no such thing."""

    error: float | None
    allowed: float | None
    problem: str | None


def checked_errors(problem: Problem, dtype: torch.dtype) -> dict[str, Checked]:
    """Check every contestant's results against float64; plain PyTorch is the yardstick, and comes first."""
    oracle = [tensor.detach() for tensor in as_list(problem.oracle())]
    found: dict[str, Checked] = {}
    yardsticks: list[float | None] = [None] * len(oracle)
    for name, function in problem.contestants.items():
        try:
            results = [tensor.detach() for tensor in as_list(function())]
            errors = [relative_error(r, o) for r, o in zip(results, oracle, strict=True)]
        except Exception as error:  # one contestant's failure must not cost the others
            found[name] = Checked(None, None, f"{type(error).__name__}: {error}")
            continue
        found[name] = judged(errors, [allowed_error(dtype, y, OUR_FACTOR) for y in yardsticks])
        if name == PLAIN and found[name].problem is None:
            yardsticks = list(errors)
    return found


def judged(errors: list[float], allowed: list[float]) -> Checked:
    """Return what is to be said of a contestant whose results have these errors."""
    # NaN first, then the largest share of what is allowed.
    error, most = max(
        zip(errors, allowed, strict=True), key=lambda pair: (pair[0] != pair[0], pair[0] / pair[1])
    )
    try:
        check(error, most)
    except WrongResultError as wrong:
        return Checked(error, most, f"{wrong}: not timed")
    return Checked(error, most, None)


def run(case: Case, threads: int, limits: Limits | None, rounds: int) -> list[Row]:
    """Check and time one case with this many threads; return a row per contestant."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _rows(case, threads, limits, rounds)
    finally:
        torch.set_num_threads(before)


def _rows(case: Case, threads: int, limits: Limits | None, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    problem = case.make()
    with torch.set_grad_enabled(case.is_training):
        found = checked_errors(problem, case.dtype)
        good = {
            name: timer_of(function)
            for name, function in problem.contestants.items()
            if found[name].problem is None
        }
        samples = take_turns(good, rounds) if good else {}
    rows = []
    for name, checked in found.items():
        row = Row(
            "op",
            case.op,
            case.name,
            threads,
            name,
            name_of(case.dtype),
            is_quick=case.is_quick,
            error=checked.error,
            allowed_error=checked.allowed,
            note=f"backend: {problem.backend}" if name == OURS else "",
        )
        if name not in samples:
            rows.append(dataclasses.replace(row, status=FAILED, note=checked.problem or ""))
            continue
        row = row.timed(summarize(samples[name], samples.get(PLAIN)))
        if limits is not None and problem.bytes and row.seconds is not None:
            fraction = limits.copy_fraction(problem.bytes, row.seconds)
            row = dataclasses.replace(row, fraction=fraction, limit="copy")
        rows.append(row)
    return rows
