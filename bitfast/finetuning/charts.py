"""The charts of a run: its curves, and which classes are taken for which."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bitfast.finetuning.evaluation import Evaluation

MOST_NUMBERS = 20
"""Classes up to which the cells of a confusion matrix have numbers."""
MOST_NAMES = 60
"""Classes up to which each is named."""
MOST_CELLS = 1000
"""Rows and columns of a confusion matrix; more classes share them."""
LONGEST_NAME = 24
DPI = 110


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw loss, accuracy and learning rate over the steps.

    Args:
        rows: Of ``metrics.jsonl``.
    """
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "validation_loss" in row]
    figure, axes = _figure(8, 7, 3)
    for axis, name, title in ((axes[0], "loss", "loss"), (axes[1], "accuracy", "accuracy, %")):
        scale = 100 if name == "accuracy" else 1
        axis.plot(
            _column(steps, "step"), scale * _column(steps, name), linewidth=1, label="training"
        )
        if evaluations:
            axis.plot(
                _column(evaluations, "step"), scale * _column(evaluations, f"validation_{name}"),
                marker="o", markersize=4, label="validation",
            )  # fmt: skip
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].plot(_column(steps, "step"), _column(steps, "learning_rate"), linewidth=1)
    axes[2].set_yscale("log")
    axes[2].set_ylabel("learning rate")
    axes[2].set_xlabel("step")
    axes[2].grid(alpha=0.3)
    return figure


def confusion(evaluation: Evaluation, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix: of the images of each class (rows), the part taken for each (columns).

    Few classes are named and counted in their cells; many are an image, some of whose rows are named.
    """
    number = len(classes)
    counts = confusion_matrix(evaluation, number, min(number, MOST_CELLS))
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    edge = min(max(4.0, 2.5 + 0.45 * number), 16.0)
    figure, (axis,) = _figure(edge + 1.0, edge, 1)
    image = axis.imshow(parts, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="part of the class's images", fraction=0.046, pad=0.02)
    named = np.arange(number)
    if number > MOST_NAMES:
        named = np.unique(np.linspace(0, number - 1, MOST_NAMES).round().astype(int))
    places = named * len(counts) // number
    names = [_short(classes[int(index)]) for index in named]
    axis.set_xticks(places, names, rotation=90, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    if number <= MOST_NUMBERS:
        for row, column in np.argwhere(counts):
            color = "white" if parts[row, column] > 0.5 else "black"
            axis.text(
                column, row, str(counts[row, column]), ha="center", va="center",
                fontsize=8, color=color,
            )  # fmt: skip
    return figure


def confusion_matrix(evaluation: Evaluation, number: int, cells: int) -> np.ndarray:
    """Return how many images of each class (rows) are taken for each (columns).

    Args:
        evaluation: At least one image.
        number: Classes.
        cells: Rows and columns; fewer than classes: neighbours share one.
    """
    rows = evaluation.labels * cells // number
    columns = evaluation.predictions * cells // number
    return np.bincount(rows * cells + columns, minlength=cells * cells).reshape(cells, cells)


def png_writer(figure: Figure) -> Callable[[Path], None]:
    """Return a writer of the figure as a PNG file, for ``replace_files``."""

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            # The font has not all letters of the world; boxes stand for the others.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, format="png", dpi=DPI)

    return write


def _figure(width: float, height: float, rows: int) -> tuple[Figure, list[Any]]:
    # Not through pyplot, which keeps figures and chooses a display for the whole process.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(rows, sharex=True)))


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _short(name: str) -> str:
    # Names are the user's: "$" would be read as mathematics.
    name = name.replace("$", r"\$")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
