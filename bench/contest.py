"""One case: its contestants checked, then timed, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from .accuracy import WrongResultError, check
from .cases import Case, Contestant, NotHereError, NotInstalledError, Problem, Running
from .limits import Limits
from .registry import opened
from .rows import EVERYBODY, FAILED, MISSING, SKIPPED, Row
from .timing import summarize, take_turns
from .workers import Base

Progress = Callable[[str], None]
"""Is told what has been done."""


def run(
    case: Case,
    limits: Limits | None,
    rounds: int,
    base: Base | None = None,
    progress: Progress = lambda done: None,
    *,
    is_quick: bool = False,
) -> list[Row]:
    """Check and time one case; return a row per contestant, in order.

    Args:
        case: What is compared.
        limits: What the machine can do; without them rows say nothing of fractions.
        rounds: Samples of each contestant.
        base: Another commit, whose bitfast takes part beside this one's.
        progress: Called after each contestant's check, and after each round.
        is_quick: Leave out what must be compiled.
    """
    try:
        return _rows(
            case, limits, min(rounds, case.most_rounds or rounds), base, progress, is_quick
        )
    except NotHereError as error:
        return [not_run(case, SKIPPED, str(error))]
    except Exception as error:  # nor must one case's failure cost the others
        return [not_run(case, FAILED, f"{type(error).__name__}: {error}")]


def _rows(
    case: Case, limits: Limits | None, rounds: int, base: Base | None, progress: Progress, is_quick: bool
) -> list[Row]:  # fmt: skip
    with ExitStack() as stack:
        problem = stack.enter_context(opened(case))
        rows: dict[str, Row] = {}
        admitted: dict[str, Running] = {}
        if is_quick:
            problem.contestants = [c for c in problem.contestants if not c.is_compiled]
        for contestant in _with_base(case, problem, base):
            rows[contestant.name] = _admit(case, problem, contestant, admitted, stack)
            progress(contestant.name)
        if case.clock == "kernels":
            samples = _kernel_samples(admitted, rows)
        else:
            timers = {name: running.time for name, running in admitted.items()}
            samples = take_turns(timers, rounds, lambda: progress("in turns")) if timers else {}
        baseline = samples.get(problem.contestants[0].name)
        for name, seconds in samples.items():
            row = replace(rows[name], **summarize(seconds, baseline)._asdict())
            rows[name] = row if limits is None else _with_fraction(row, limits)
        return list(rows.values())


def not_run(case: Case, status: str, note: str) -> Row:
    """Return the one row of a case that nobody has a time of."""
    return _row(case, EVERYBODY, case.dtype, status=status, note=note)


def _row(case: Case, contestant: str, dtype: str, **found: Any) -> Row:
    return Row(case.kind, case.op, case.name, case.device, case.threads, contestant, dtype, **found)


def _with_base(case: Case, problem: Problem, base: Base | None) -> Iterator[Contestant]:
    for contestant in problem.contestants:
        if base is not None and contestant.name.startswith("bitfast"):
            yield from base.pair(case, contestant)
        else:
            yield contestant


def _admit(
    case: Case, problem: Problem, contestant: Contestant, admitted: dict[str, Running], stack: ExitStack
) -> Row:  # fmt: skip
    """Start a contestant and check its results; what is missing, fails or is wrong gets a row only."""
    told = {"note": contestant.note, "is_quick": case.is_quick}
    counts = {"bytes": problem.bytes, "flops": problem.flops}
    row = _row(case, contestant.name, contestant.dtype, **told, **counts)
    with ExitStack() as own:
        try:
            running = contestant.begin(own)
            verdict = problem.judge(contestant.name, contestant.dtype, running.results)
            row = replace(row, error=verdict.error, allowed_error=verdict.allowed)
            check(verdict)
        except NotInstalledError as error:
            return replace(row, status=MISSING, note=str(error))
        except WrongResultError as error:
            return replace(row, status=FAILED, note=f"{error}: not timed")
        except Exception as error:  # one contestant's failure must not cost the others
            return replace(row, status=FAILED, note=f"{type(error).__name__}: {error}")
        stack.push(own.pop_all())
    running.results = []  # only their time is wanted from here on
    admitted[contestant.name] = running
    return replace(row, first_result=running.first_result, peak_memory=running.peak_memory)


def _kernel_samples(admitted: dict[str, Running], rows: dict[str, Row]) -> dict[str, list[float]]:
    """Time one contestant after the other; what cannot be captured in a graph fails, in its row."""
    samples = {}
    for name, running in admitted.items():
        try:
            samples[name] = running.kernels()
        except Exception as error:
            note = f"not captured: {type(error).__name__}: {error}"
            rows[name] = replace(rows[name], status=FAILED, note=note)
    return samples


def _with_fraction(row: Row, limits: Limits) -> Row:
    """Return a row with its share of the limit that binds; above 1 where everything fits into a cache."""
    arithmetic = row.flops / limits.flops[row.dtype] if row.flops else 0.0
    copying = row.bytes / limits.bandwidth
    if row.seconds is None or not (arithmetic or copying):
        return row
    limit = "arithmetic" if arithmetic > copying else "copy"
    return replace(row, fraction=max(arithmetic, copying) / row.seconds, limit=limit)
