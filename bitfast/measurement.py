"""How accurate a model is, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """Of ``total`` images, ``correct`` were classified correctly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The fraction that is correct."""
        return self.correct / self.total

    def confidence_interval(self) -> tuple[float, float]:
        """Return Wilson's score interval for the accuracy, at 95%."""
        z = 1.959964
        scale = 1 + z**2 / self.total
        center = (self.accuracy + z**2 / (2 * self.total)) / scale
        variance = self.accuracy * (1 - self.accuracy) / self.total + z**2 / (4 * self.total**2)
        half = z * math.sqrt(variance) / scale
        return max(0.0, center - half), min(1.0, center + half)  # rounding may lead outside

    def __str__(self) -> str:
        low, high = self.confidence_interval()
        return f"{self.accuracy:.2%} ({self.correct}/{self.total}, 95%: {low:.2%} to {high:.2%})"
