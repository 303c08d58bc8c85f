"""What a benchmark is: a case, who takes part in it, and what its results are held against.

``ops.py``, ``images.py`` and ``models.py`` hold the cases; ``contest.py`` checks and times any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accuracy import Judge
from .timing import Timer, host_timer, kernel_samples

PLAIN, OURS = "plain PyTorch", "bitfast"

Results = Tensor | Sequence[Tensor]


def as_list(results: Results) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NotInstalledError(RuntimeError):
    """A contestant needs what is not installed; the message says how to get it."""


class NotHereError(RuntimeError):
    """A case cannot be run on this machine; the message says why."""


@dataclass
class Running:
    """A contestant that has given its first results, and can be timed.

    Attributes:
        results: Of its first call.
        time: The seconds that so many calls take, the host's share included.
        kernels: The seconds of one call in each of some samples, without the host's share (GPU only).
        first_result: Seconds from constructing to the first result, compilation included.
        peak_memory: Bytes.
    """

    results: list[Tensor]
    time: Timer
    kernels: Callable[[], list[float]]
    first_result: float | None = None
    peak_memory: int | None = None


Begin = Callable[[ExitStack], Running]
"""Starts a contestant and returns its first results. What it holds goes with the stack."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part in a case.

    Attributes:
        name: For people; ours begins with "bitfast".
        dtype: In which it computes.
        begin: Raises NotInstalledError, or whatever is wrong with it.
        note: What else is to be known.
        is_compiled: Whether torch.compile has to work first, which takes long.
        work: For a process of its own, what it is told (see ``contestant.py``).
    """

    name: str
    dtype: str
    begin: Begin
    note: str = ""
    is_compiled: bool = False
    work: dict[str, Any] | None = None


def called(function: Callable[[int], Results], sets: int = 1) -> Begin:
    """Return what begins a function of an input set's number; so many take turns, for the cache's sake."""

    def begin(_: ExitStack) -> Running:
        function(0)
        # The results that count are written over NaN, so that what a kernel leaves out is seen.
        drawn_over = (result for result in as_list(function(0)) if result.is_floating_point())
        poison = [torch.full_like(result, torch.nan) for result in drawn_over]
        del poison
        results = [result.detach() for result in as_list(function(0))]
        in_turns = [partial(function, number) for number in range(sets)]
        return Running(results, host_timer(in_turns[0]), partial(kernel_samples, in_turns))

    return begin


def calling(function: Callable[[], Results]) -> Begin:
    """Return what begins a function that holds its input."""
    return called(lambda _: function())


@dataclass
class Problem:
    """A case whose inputs have been drawn.

    Attributes:
        contestants: In order; the first one's time is what ratios are to.
        judge: Says of each contestant's results whether they are right.
        bytes: The least that must be read and written, each tensor once. 0: it is not about bytes.
        flops: Of convolutions and matrix products. 0: it is not about arithmetic.
    """

    contestants: list[Contestant]
    judge: Judge
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One comparison: what is computed, on which inputs, on which device.

    Attributes:
        kind: "op", "images" or "model".
        op: The word of the op, "dispatch" for the cost of a call as such, "preprocessing", "inference" or
            "training".
        name: Inputs, dtype and layout, for people.
        dtype: Of the inputs.
        open: Draws the inputs. What it holds is given back when its block ends.
        device: "cpu" or "cuda".
        threads: Of the CPU; 0 on a GPU.
        clock: "host" for the time until results are there, "kernels" for the GPU's share of it alone.
        is_training: Whether autograd records what the contestants do.
        is_quick: Whether it stands for its like, in ``--quick`` and in the documentation.
        most_rounds: Of samples; None: as many as are asked for.
        time_limit: Seconds, for kernels that no card has proved yet: the case runs in another process, which is
            ended after them. None: it runs like the others.
    """

    kind: str
    op: str
    name: str
    dtype: str
    open: Callable[[], AbstractContextManager[Problem]] = field(repr=False)
    device: str = "cpu"
    threads: int = 1
    clock: str = "host"
    is_training: bool = False
    is_quick: bool = False
    most_rounds: int | None = None
    time_limit: float | None = None

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op}: {self.name}, {place_of(self.threads)}"


def place_of(threads: int) -> str:
    """Return where a case runs, for people: with so many threads, or on a GPU (0)."""
    return f"{threads} thread{'s' if threads > 1 else ''}" if threads else "GPU"
