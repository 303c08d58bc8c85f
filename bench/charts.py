"""Bar charts of a report, as PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import OURS, PLAIN, place_of
from .report import duration
from .rows import TIMED, Report, Row, cases_of

THEIR_COLOR = "#30638e"
COLORS = ((THEIR_COLOR, "#9db8d2"), ("#d1495b", "#e9a6ae"))
"""Theirs, and ours: dark in float32, light in bfloat16."""
WIDTH, BAR_HEIGHT, MARGIN = 10.0, 0.34, 1.5
"""Inches."""
DPI = 120


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw one chart per case about a model or image processors, and one per op; return the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for title, rows in cases_of(report.of_kind("model", "images")).items():
        if any(row.status == TIMED for row in rows):
            figures[file_name(title)] = times_of(title, rows)
    by_op: dict[str, list[tuple[Row, Row]]] = {}
    for rows in cases_of(report.of_kind("op")).values():
        timed = {row.contestant: row for row in rows if row.status == TIMED}
        if PLAIN in timed and OURS in timed:
            by_op.setdefault(timed[OURS].op, []).append((timed[PLAIN], timed[OURS]))
    figures |= {f"op-{file_name(op)}": ratios_of(op, pairs) for op, pairs in by_op.items()}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    return [folder / f"{name}.png" for name in figures]


def file_name(title: str) -> str:
    """Return a title in the characters that every file system has."""
    return re.sub(r"[^a-z0-9_]+", "-", title.lower()).strip("-")


def color_of(row: Row) -> str:
    return COLORS[row.is_ours][row.dtype != "float32"]


def times_of(title: str, rows: Sequence[Row]) -> Any:
    """Draw the times of a case's contestants; shorter is better."""
    largest = max(row.seconds or 0.0 for row in rows)
    scale, unit = (1e3, "ms") if largest < 1 else (1.0, "s")
    names = [row.contestant for row in rows]
    figure, axes = new_figure(title, names, [row.is_ours for row in rows])
    farthest = largest
    for place, row in enumerate(rows):
        if row.seconds is None:
            axes.text(0.01 * largest * scale, place, row.status, va="center", color="gray")
            continue
        first, third = row.quartiles or (row.seconds, row.seconds)
        farthest = max(farthest, third)
        spread = [[scale * max(0.0, row.seconds - first)], [scale * max(0.0, third - row.seconds)]]
        bar = {"color": color_of(row), "height": 0.72, "xerr": spread, "ecolor": "#444444"}
        axes.barh(place, scale * row.seconds, **bar)
        ratio = "" if row.ratio is None else f"  {row.ratio:.2f}x"
        label = f"  {duration(row.seconds)}{ratio}"
        weight = "bold" if row.is_ours else "normal"
        axes.text(scale * max(row.seconds, third), place, label, va="center", fontweight=weight)
    axes.set_xlim(0, 1.2 * farthest * scale)
    meaning = "(median, and quartiles): shorter is better; ratio to transformers"
    axes.set_xlabel(f"time in {unit} {meaning}")
    return figure


def ratios_of(op: str, pairs: Sequence[tuple[Row, Row]]) -> Any:
    """Draw how many times as fast as plain PyTorch an op is in each case; longer is better."""
    title = f"{op}, {place_of(pairs[0][1].threads)}"
    figure, axes = new_figure(title, [ours.case for _, ours in pairs], [False] * len(pairs))
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # over the line
    for place, (plain, ours) in enumerate(pairs):
        if ours.ratio is None or plain.seconds is None or ours.seconds is None:
            continue
        axes.barh(place, ours.ratio, color=color_of(ours), height=0.72)
        label = f"  {ours.ratio:.2f}x   {duration(plain.seconds)} to {duration(ours.seconds)}"
        axes.text(ours.ratio, place, label, va="center", bbox=ground)
    axes.axvline(1, color=THEIR_COLOR, linewidth=1.5)
    axes.set_xlim(0, 1.45 * max(1.0, *(ours.ratio or 0.0 for _, ours in pairs)))
    axes.set_xlabel("plain PyTorch's time over bitfast's: longer is better; the line: equally fast")
    return figure


def new_figure(title: str, names: Sequence[str], are_bold: Sequence[bool]) -> tuple[Any, Any]:
    """Return a figure of so many bars, named from the top, and its axes; pyplot's state is not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, BAR_HEIGHT * len(names) + MARGIN), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_yticks(range(len(names)), names)
    for label, is_bold in zip(axes.get_yticklabels(), are_bold, strict=True):
        label.set_fontweight("bold" if is_bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    return figure, axes
