"""How times are taken: contestants in turns by the host's clock, kernels by replaying a graph of them."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SHORTEST_SAMPLE = 0.02
"""Seconds. A call that takes less is repeated within one sample, for the clock's sake."""
KERNEL_MILLISECONDS = 10
"""How long one of the ten samples of :func:`kernel_samples` lasts."""

Timer = Callable[[int], float]
"""Makes so many calls and returns the seconds that they took together."""


class Summary(NamedTuple):
    """A contestant's samples beside the baseline's; without one there is no ratio."""

    seconds: float  # per call, the median over the rounds
    quartiles: tuple[float, float]
    ratio: float | None  # of the medians, the baseline's over this one's
    ratio_quartiles: tuple[float, float] | None  # of the single rounds' ratios


def host_timer(function: Callable[[], Any]) -> Timer:
    """Return the timer of a function in this process; on a GPU it waits until all has been computed."""
    from torch.utils.benchmark import timer

    return timeit.Timer("function()", timer=timer, globals={"function": function}).timeit


def kernel_samples(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the seconds of one call, the given ones taking turns, in ten replays of a CUDA graph of them."""
    from triton.testing import do_bench_cudagraph

    def in_turns() -> None:
        for call in calls:
            call()

    samples = do_bench_cudagraph(in_turns, rep=KERNEL_MILLISECONDS, return_mode="all")
    return [milliseconds / 1e3 / len(calls) for milliseconds in samples]


def calls_per_sample(timer: Timer) -> int:
    timer(2)  # to warm up
    return max(1, int(SHORTEST_SAMPLE / timer(1)))


def take_turns(
    timers: Mapping[str, Timer], rounds: int, after_round: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds per call of each contestant in each round.

    They take turns, so that what else the machine does meets all of them alike, in an order that is
    reversed each round. A turn begins with as many calls that do not count: the caches, and the cores, on
    which threads of the one before may still wait for work, become the contestant's own. (With one such call a
    norm of half a millisecond took up to three times as long in one of two processes that did the same.)
    """
    calls = {name: calls_per_sample(timer) for name, timer in timers.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[:: -1 if i % 2 else 1]:
            timers[name](calls[name])
            samples[name].append(timers[name](calls[name]) / calls[name])
        after_round()
    return samples


def summarize(seconds: list[float], baseline: list[float] | None) -> Summary:
    """Return what is said of the samples; those of the baseline are of the same rounds."""
    median, spread = statistics.median(seconds), quartiles(seconds)
    if baseline is None:
        return Summary(median, spread, None, None)
    ratios = [theirs / ours for theirs, ours in zip(baseline, seconds, strict=True)]
    return Summary(median, spread, statistics.median(baseline) / median, quartiles(ratios))


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of a single value, twice that."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
