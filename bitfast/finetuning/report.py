"""How well each class is recognized: the numbers of ``report.json`` and ``report.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitfast.finetuning.evaluation import Evaluation

MOST_CONFUSED = 3
"""Classes that a class is said to be confused with."""


@dataclass(frozen=True)
class ClassReport:
    """One class in the validation images.

    Attributes:
        name: Of the class.
        count: Its images.
        precision: Of the images that are taken for this class, the part that is of it; 0 where none is.
        recall: Of its images, the part that is recognized; 0 where it has none.
        f1: Harmonic mean of both; 0 where both are.
        confused_with: What its other images are taken for, most frequent first: (class, images).
    """

    name: str
    count: int
    precision: float
    recall: float
    f1: float
    confused_with: tuple[tuple[str, int], ...]


def report_classes(evaluation: Evaluation, classes: Sequence[str]) -> list[ClassReport]:
    """Return the report of each class, in the order of the classes."""
    labels, predictions = evaluation.labels, evaluation.predictions
    number = len(classes)
    counts = np.bincount(labels, minlength=number)
    said = np.bincount(predictions, minlength=number)
    right = np.bincount(labels[labels == predictions], minlength=number)
    confused = _confusions(labels, predictions)
    reports = []
    for index, name in enumerate(classes):
        precision = _part(right[index], said[index])
        recall = _part(right[index], counts[index])
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        others = tuple((classes[other], count) for other, count in confused.get(index, []))
        reports.append(ClassReport(name, int(counts[index]), precision, recall, f1, others))
    return reports


def _part(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


def _confusions(labels: np.ndarray, predictions: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """Return what images of each class are wrongly taken for: (class, images), most frequent first."""
    wrong = labels != predictions
    pairs, counts = np.unique(
        np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True
    )
    found: dict[int, list[tuple[int, int]]] = {}
    for label, prediction, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        found.setdefault(label, []).append((prediction, count))
    return {
        label: sorted(others, key=lambda other: -other[1])[:MOST_CONFUSED]
        for label, others in found.items()
    }


def as_json(evaluation: Evaluation, reports: Sequence[ClassReport]) -> dict[str, Any]:
    """Return the content of ``report.json``; without validation images there are no numbers in it."""
    if not len(evaluation.labels):
        return {"images": 0, "accuracy": None, "classes": []}
    measured = evaluation.measurement
    present = [report for report in reports if report.count]
    return {
        "images": measured.total,
        "correct": measured.correct,
        "accuracy": measured.accuracy,
        "accuracy_95": list(measured.confidence_interval()),
        "loss": evaluation.loss,
        "macro_average": {
            name: sum(getattr(report, name) for report in present) / len(present)
            for name in ("precision", "recall", "f1")
        },
        "classes": [
            {
                **asdict(report),
                "confused_with": [
                    {"class": name, "images": count} for name, count in report.confused_with
                ],
            }
            for report in reports
        ],
    }


def as_csv(reports: Sequence[ClassReport]) -> str:
    """Return the content of ``report.csv``: a line for each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "count", "precision", "recall", "f1", "confused_with"])
    for report in reports:
        numbers = [f"{value:.4f}" for value in (report.precision, report.recall, report.f1)]
        others = "; ".join(f"{name} ({count})" for name, count in report.confused_with)
        writer.writerow([report.name, report.count, *numbers, others])
    return text.getvalue()
