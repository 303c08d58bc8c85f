"""``python -m bench.norm_convolution_tilings``: each way to cut a fused convolution, beside the chosen one.

The kernels choose by a model of what a tile costs (``plan_for`` in ``csrc/norm_convolution_plan.h``). Here
every way to cut that a shape allows is checked, and timed on the GPU like the other cases. A line per shape
tells the chosen and the fastest way, and of each what the model predicted: where times do not follow it, it is
wrong. All of it goes on in another process: a way that hangs or dies loses its row, and is not tried again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from bitfast.ops.norm_convolution_fused import TILINGS

from . import contest, peers, rows
from .accuracy import Float64Judge
from .cases import OURS, PLAIN, Case, Contestant, NotHereError, Problem, name_of
from .isolated import LostError, OtherProcess
from .norm_convolution_problems import (
    Cut,
    Given,
    Layer,
    begin_fused,
    drawn_sets,
    plain,
    prepared_for,
)
from .norm_convolutions import LAYERS, TELLING, require_kernels
from .op_problems import BFLOAT
from .report import cell, cell_text, time_cell
from .rows import Report, Row
from .tables import table

BATCHES = (128, 8, 1)
TIME_LIMIT = 20.0
"""Seconds for one way to cut. Most take a fifth of a second; the first one of a shape draws the inputs, too."""
OP = "norm_convolution tilings"
CHOSEN = "chosen"
"""The note of the row of what the kernels choose. It comes first in its case, and ratios are to its time."""


class Shape(NamedTuple):
    """A layer at a batch size."""

    layer: Layer
    images: int

    def case(self, open: Callable[[], Any] = nullcontext) -> Case:
        words = f"{self.layer.words(self.images)} {name_of(BFLOAT)}"
        return Case("op", OP, words, name_of(BFLOAT), open, "cuda", 0, "kernels")


class Question(NamedTuple):
    """What the other process is asked: to time a shape cut one way, or, without one, for its :class:`Ways`."""

    shape: Shape
    tiling: Cut | None = None


class Ways(NamedTuple):
    """How a shape can be cut: the cycles that the kernels' model predicts for each way, and the chosen one."""

    cycles: dict[Cut, float]
    chosen: Cut

    def in_order(self) -> list[Cut]:
        """Return them, the chosen one first, then those that should be fast."""
        return sorted(self.cycles, key=lambda cut: (cut != self.chosen, self.cycles[cut]))


class Asks(Protocol):
    """Something that answers a question within some seconds, or raises LostError."""

    def ask(self, question: Question, seconds: float | None) -> Any: ...


def words_of(tiling: Cut) -> str:
    """Return how something is cut, for people."""
    columns, takes_turns, keeps_weights, cluster, units = tiling
    tiles = "in turns" if takes_turns else "shared"  # by the two groups of warps that multiply
    weights = "kept" if keeps_weights else "by pairs" if cluster == 2 else "loaded"
    return f"{columns} channels, {64 * units} pixels, {tiles}, weights {weights}"


def contestant_name(tiling: Cut) -> str:
    return f"{OURS}, {words_of(tiling)}"


# ---- in the other process -----------------------------------------------------------------------------------


class Answers:
    """Answers questions; keeps the inputs of the shape that was asked for last."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._shape: Shape | None = None
        self._given: list[Given] = []
        self._judge = Float64Judge([])

    def __call__(self, question: Question) -> Ways | Row:
        shape, tiling = question
        if tiling is None:
            return ways_of(shape)
        (row,) = contest.run(shape.case(lambda: nullcontext(self._problem(shape, tiling))), None, 1)
        return row

    def _problem(self, shape: Shape, tiling: Cut) -> Problem:
        if shape != self._shape:
            self._draw(shape)
        layer, images = shape
        begin = partial(begin_fused, layer, self._given, False, tiling=tiling)
        contestant = Contestant(contestant_name(tiling), name_of(BFLOAT), begin)
        moved = layer.bytes(images, BFLOAT)
        return Problem([contestant], self._judge, moved, layer.flops(images))

    def _draw(self, shape: Shape) -> None:
        """Draw inputs. Float32, quick on a GPU, stands for float64: what is judged is far less exact."""
        layer, images = shape
        self._shape, self._given = None, []  # else both would be in memory
        given = drawn_sets(layer, images, BFLOAT, self._device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self._judge = Float64Judge(plain(layer, given[0].to(torch.float32)))
        self._judge(PLAIN, name_of(BFLOAT), plain(layer, given[0]))  # whose error is the yardstick
        self._shape, self._given = shape, given


def ways_of(shape: Shape) -> Ways:
    """Ask the kernels in which ways they can cut a shape."""
    layer, images = shape
    prepared = prepared_for(layer, images, BFLOAT).launch.tiling
    chosen = tuple(getattr(prepared, name) for name, _ in prepared._fields_)
    cycles = {}
    for tiling in TILINGS:
        try:
            cycles[tiling] = prepared_for(layer, images, BFLOAT, tiling).launch.cost
        except RuntimeError:  # this shape cannot be cut so; that it can be cut was asked before
            continue
    return Ways(cycles, chosen)


# ---- here ---------------------------------------------------------------------------------------------------


@dataclass
class Limited:
    """Asks until time is over, and not again about ways that are lost.

    Attributes:
        process: Answers questions.
        end: When nothing is begun any more, by the clock.
        clock: In seconds.
        lost: How each way was lost that hung or died.
    """

    process: Asks
    end: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    lost: dict[Cut, str] = field(default_factory=dict)

    def ask(self, shape: Shape, tiling: Cut | None = None) -> Any:
        """Return the answer, or a row of everybody that says why there is none."""
        case = shape.case()
        if tiling in self.lost:
            return contest.not_run(case, rows.SKIPPED, f"in a case before: {self.lost[tiling]}")
        if self.clock() > self.end:
            return contest.not_run(case, rows.SKIPPED, "out of time")
        try:
            return self.process.ask(Question(shape, tiling), TIME_LIMIT)
        except LostError as error:
            if tiling is not None:
                self.lost[tiling] = str(error)
            return contest.not_run(case, rows.FAILED, str(error))


def measured(shapes: Iterable[Shape], limited: Limited) -> Iterator[list[Row]]:
    """Yield the rows of each shape, in order; that of the chosen way comes first."""
    for shape in shapes:
        ways = limited.ask(shape)
        if not isinstance(ways, Ways):
            yield [ways]
            continue
        found: list[Row] = []
        for tiling in ways.in_order():
            row: Row = limited.ask(shape, tiling)
            note = row.note if tiling != ways.chosen else f"{CHOSEN}; {row.note}".removesuffix("; ")
            name, cycles = contestant_name(tiling), ways.cycles[tiling]
            row = replace(row, contestant=name, note=note, predicted_cycles=cycles)
            found.append(with_ratio(row, found))
        yield found


def with_ratio(row: Row, before: Sequence[Row]) -> Row:
    """Return a row with the ratio of the chosen way's time, which is the first's, to its own."""
    first = before[0] if before else row
    if row.seconds is None or first.seconds is None:
        return row
    return replace(row, ratio=first.seconds / row.seconds, ratio_quartiles=None)


def fastest(timed: Sequence[Row]) -> Row:
    return min(timed, key=lambda row: row.seconds or float("inf"))


def markdown(report: Report) -> str:
    """Return a table with a line per shape."""
    heads = ["case", "chosen", "time", "predicted", "fastest", "time", "chosen / fastest",
             "the others: time over the chosen one's (predicted)"]  # fmt: skip
    lines = [line_of(found) for found in rows.cases_of(report.rows).values()]
    return "\n".join(table(heads, lines, "llrrlrrl")) + "\n"


def line_of(found: Sequence[Row]) -> list[str]:
    chosen, timed = found[0], [row for row in found if row.seconds is not None]
    if not timed:
        return [chosen.case, short(chosen), chosen.status, "", "", "", "", cell_text(chosen.note)]
    best = fastest(timed)
    others = "; ".join(other(row, chosen) for row in found[1:])
    cycles = cell("{:.0f} kcycles", chosen.predicted_cycles, 1e-3)
    time_of_chosen = chosen.status if chosen.seconds is None else time_cell(chosen)
    ratio = cell("{:.2f}x", best.ratio)
    return [chosen.case, short(chosen), time_of_chosen, cycles, short(best), time_cell(best), ratio,
            others]  # fmt: skip


def other(row: Row, chosen: Row) -> str:
    if row.seconds is None:
        return f"{short(row)}: {row.status}, {cell_text(row.note)}"
    predicted = cell("{:.2f}", (row.predicted_cycles or 0) / (chosen.predicted_cycles or 1))
    return f"{short(row)}: {cell('{:.2f}', row.ratio and 1 / row.ratio)} ({predicted})"


def short(row: Row) -> str:
    return row.contestant.removeprefix(f"{OURS}, ")


def summary(report: Report) -> str:
    """Return in a line how well the kernels choose."""
    ratios = {}
    for found in rows.cases_of(report.rows).values():
        timed = [row for row in found if row.seconds is not None]
        if timed and found[0].seconds is not None:
            ratios[found[0].case] = fastest(timed).ratio or 1.0
    if not ratios:
        return "nothing was timed"
    worst = max(ratios, key=lambda case: ratios[case])
    mean = statistics.geometric_mean(ratios.values())
    return (
        f"in {len(ratios)} shapes the chosen way takes {mean:.2f} times as long as the fastest, at worst"
        f" {ratios[worst]:.2f} times: {worst}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a way was wrong, failed or hung."""
    description = (__doc__ or "").splitlines()[0].partition("``: ")[2]
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--quick", action="store_true", help="three shapes at each batch size")
    add("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="default: 128 8 1")
    add("--seconds", type=int, metavar="N", help="begin nothing after these")
    add("--output", type=Path, metavar="FILE", help="write everything as JSON, as bench.run does")
    add("--markdown", type=Path, metavar="FILE", help="write the table here too")
    arguments = parser.parse_args(argv)
    try:
        require_kernels()
    except NotHereError as error:
        print(f"nothing is timed: {error}")
        return 0
    end = time.monotonic() + (arguments.seconds or float("inf"))
    report = Report(rows.machine("cuda"), peers=peers.installed())
    layers = TELLING if arguments.quick else sorted(LAYERS, key=lambda layer: layer not in TELLING)
    shapes = [Shape(layer, images) for images, layer in product(arguments.batches, layers)]
    process = OtherProcess(Answers())
    try:
        for found in measured(shapes, Limited(process, end)):
            report.rows += found
            print(f"{found[0].case}: {len(found)} ways", file=sys.stderr)
            if arguments.output is not None:
                report.write(arguments.output)
    finally:
        process.close()
    text = markdown(report)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    failures = [row for row in report.rows if row.status == rows.FAILED]
    for row in failures:
        print(f"{row.title}: {row.contestant} failed: {row.note}", file=sys.stderr)
    print(summary(report))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
