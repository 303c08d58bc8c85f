"""What is shown while a run is under way: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bitfast.finetuning.dataset import Problem
from bitfast.images.files import printable

BETWEEN_LINES = 30.0
"""Seconds."""
MOST_PROBLEMS = 10
"""Images that are named when they are left out; the others are counted at the end."""


class Display:
    """Shows how far a run has come, with loss, accuracy, images a second and the time that is left.

    Args:
        steps: Of the whole run.
        done: Steps that are done already.
        is_shown: False: nothing is shown, because another process does.
    """

    def __init__(self, steps: int, done: int, is_shown: bool = True) -> None:
        self._steps, self._done, self._first = steps, done, done
        self._is_shown = is_shown
        self._started = time.monotonic()
        self._told: float | None = None
        self._problems: dict[int, int] = {}
        self._bar = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=done, unit="step", file=sys.stderr, leave=False,
                dynamic_ncols=True,
            )  # fmt: skip

    def step(self, row: dict[str, Any]) -> None:
        """Show a step's row of the metrics."""
        self._done = row["step"]
        if not self._is_shown:
            return
        text = (
            f"loss {row['loss']:.4f}, accuracy {100 * row['accuracy']:.1f} %, "
            f"{row['images_per_second']:.0f} images/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if self._told is None or now - self._told >= BETWEEN_LINES or self._done == self._steps:
            self._told = now
            self.say(f"step {self._done}/{self._steps}: {text}{self._time_left(now)}")

    def tell_problems(self, source: Any) -> None:
        """Name images that could not be decoded, which every process does for its own.

        Args:
            source: Its list ``problems`` has only grown since the last call.
        """
        known = self._problems.get(id(source), 0)
        self._problems[id(source)] = len(source.problems)
        for line in problem_lines(source.problems[known:], known):
            self._print(line)

    def say(self, text: str) -> None:
        """Print a line to standard error, beside the bar."""
        if self._is_shown:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, now: float) -> str:
        left = (now - self._started) / (self._done - self._first) * (self._steps - self._done)
        return f", {duration(left)} left" if left else ""


@contextlib.contextmanager
def scanning(is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how many images have been looked at, before anything else is known; it is told that number.

    Args:
        is_shown: False: nothing is shown, because another process does.
    """
    if is_shown and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc="looking at images", unit=" images", file=sys.stderr, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
        return
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if is_shown and time.monotonic() - told >= BETWEEN_LINES:
            told = time.monotonic()
            print(f"looked at {done:,} of {total:,} images", file=sys.stderr, flush=True)

    yield tell


def problem_lines(problems: Sequence[Problem], known: int = 0) -> list[str]:
    """Return a line for each image that is left out, up to a number.

    Args:
        problems: New ones.
        known: How many there were before.
    """
    named = problems[: max(0, MOST_PROBLEMS - known)]
    lines = [f"bitfast: left out {printable(name)}: {printable(reason)}" for name, reason in named]
    if known <= MOST_PROBLEMS < known + len(problems):
        lines.append("bitfast: more images are left out, which are not named")
    return lines


def duration(seconds: float) -> str:
    """Return a time for people: "2:03:04", or "3:04" below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
