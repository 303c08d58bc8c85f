"""Bar charts of a report, as PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import OURS, PLAIN, place_of
from .report import duration
from .rows import TIMED, Report, Row, cases_of

OUR_COLOR, OUR_LIGHT_COLOR = "#d1495b", "#e9a6ae"
THEIR_COLOR, THEIR_LIGHT_COLOR = "#30638e", "#9db8d2"
"""Dark in float32, light in bfloat16."""
WIDTH, BAR_HEIGHT, MARGIN = 10.0, 0.34, 1.5
"""Inches."""
DPI = 120


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw one chart per case about a model or image processors, and one per op; return the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    models = [row for row in report.rows if row.kind in ("model", "images")]
    for title, rows in cases_of(models).items():
        if any(row.status == TIMED for row in rows):
            paths.append(folder / f"{file_name(title)}.png")
            draw_model(title, rows, paths[-1])
    ops = [row for row in report.rows if row.kind == "op"]
    for op in dict.fromkeys(row.op for row in ops):
        pairs = [p for p in pairs_of(ops) if p[0].op == op]
        if pairs:
            paths.append(folder / f"op-{file_name(op)}.png")
            draw_op(op, pairs, paths[-1])
    return paths


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return plain PyTorch's row and bitfast's of each case where both were timed."""
    groups = [{row.contestant: row for row in g} for g in cases_of(list(rows)).values()]
    pairs = [(group[PLAIN], group[OURS]) for group in groups]
    return [pair for pair in pairs if all(row.status == TIMED for row in pair)]


def file_name(title: str) -> str:
    """Return a title in the characters that every file system has."""
    return re.sub(r"[^a-z0-9_]+", "-", title.lower()).strip("-")


def color_of(row: Row) -> str:
    """Return a contestant's color."""
    if row.is_ours:
        return OUR_COLOR if row.dtype == "float32" else OUR_LIGHT_COLOR
    return THEIR_COLOR if row.dtype == "float32" else THEIR_LIGHT_COLOR


def draw_model(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw the times of a case's contestants; shorter is better."""
    largest = max(row.seconds or 0.0 for row in rows)
    scale, unit = (1e3, "ms") if largest < 1 else (1.0, "s")
    figure, axes = new_figure(len(rows))
    for place, row in enumerate(rows):
        if row.seconds is None or row.quartiles is None:
            axes.text(0.01 * largest * scale, place, row.status, va="center", color="gray")
            continue
        first, third = (scale * quartile for quartile in row.quartiles)
        value = scale * row.seconds
        spread = [[max(0.0, value - first)], [max(0.0, third - value)]]
        axes.barh(place, value, color=color_of(row), height=0.72, xerr=spread, ecolor="#444444")
        ratio = "" if row.ratio is None else f"  {row.ratio:.2f}x"
        label = f"  {duration(row.seconds)}{ratio}"
        weight = "bold" if row.is_ours else "normal"
        axes.text(max(value, third), place, label, va="center", fontweight=weight)
    label_bars(axes, [row.contestant for row in rows], [row.is_ours for row in rows])
    farthest = max(row.quartiles[1] for row in rows if row.quartiles is not None)
    axes.set_xlim(0, 1.2 * max(largest, farthest) * scale)
    axes.set_xlabel(
        f"time in {unit} (median, and quartiles): shorter is better; ratio to transformers"
    )
    axes.set_title(title, loc="left", fontweight="bold")
    finish(figure, path)


def draw_op(op: str, pairs: Sequence[tuple[Row, Row]], path: Path) -> None:
    """Draw how many times as fast as plain PyTorch an op is in each case; longer is better."""
    largest = max(ours.ratio or 0.0 for _, ours in pairs)
    figure, axes = new_figure(len(pairs))
    for place, (plain, ours) in enumerate(pairs):
        if ours.ratio is None or plain.seconds is None or ours.seconds is None:
            continue
        axes.barh(place, ours.ratio, color=color_of(ours), height=0.72)
        label = f"  {ours.ratio:.2f}x   {duration(plain.seconds)} to {duration(ours.seconds)}"
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # over the line
        axes.text(ours.ratio, place, label, va="center", bbox=ground)
    axes.axvline(1, color=THEIR_COLOR, linewidth=1.5)
    label_bars(axes, [ours.case for _, ours in pairs], [False] * len(pairs))
    axes.set_xlim(0, 1.45 * max(largest, 1.0))
    axes.set_xlabel("plain PyTorch's time over bitfast's: longer is better; the line: equally fast")
    axes.set_title(f"{op}, {place_of(pairs[0][1].threads)}", loc="left", fontweight="bold")
    finish(figure, path)


# ---- matplotlib ---------------------------------------------------------------------------------


def new_figure(bars: int) -> tuple[Any, Any]:
    """Return a figure high enough for so many bars, and its axes. Nothing of pyplot's state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, BAR_HEIGHT * bars + MARGIN), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    return figure, axes


def label_bars(axes: Any, names: Sequence[str], are_bold: Sequence[bool]) -> None:
    """Name the bars, from the top."""
    axes.set_yticks(range(len(names)), names)
    for label, is_bold in zip(axes.get_yticklabels(), are_bold, strict=True):
        label.set_fontweight("bold" if is_bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def finish(figure: Any, path: Path) -> None:
    """Write the figure."""
    figure.savefig(path, bbox_inches="tight")
