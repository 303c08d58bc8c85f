"""The rule that every result must keep before its time is taken.

The error against float64 is at most ``factor`` times that of the yardstick, which is plain PyTorch (for whole
models transformers) in the same dtype, plus one rounding. The yardstick itself must keep an absolute limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OURS = 2.0
"""How many times the yardstick's error bitfast may have, as in ``tests/tolerances.py``."""
PEERS = 4.0
"""How many times other runtimes may: their accuracy is shown, not vouched for."""
LIMITS = {"float32": 1e-4, "float16": 1e-1, "bfloat16": 1e-1}
"""What the yardstick's relative error may be: a deep network of random weights magnifies roundings."""
GRADIENT_LIMITS = {"float32": 5e-2, "float16": 1.0, "bfloat16": 1.0}
"""What a yardstick may be off by in the gradients of a whole network. Of its millions of ReLUs some have an
argument so near to 0 that rounding decides whether a gradient passes; in 16 bits they are many."""

Errors = Callable[[Sequence[Tensor], Sequence[Tensor]], list[float]]
"""Takes results and those in float64; returns how far they are off."""


class WrongResultError(AssertionError):
    """A result is too far from what it should be, or not finite; it is not timed."""


class Verdict(NamedTuple):
    """A contestant's error, and what is allowed; of several results those of the worst one."""

    error: float | None
    allowed: float | None


Judge = Callable[[str, str, Sequence[Tensor]], Verdict]
"""Takes a contestant's name, its dtype and its results."""


class Float64Judge:
    """Compares results with those of float64. The first contestant of each dtype is its yardstick."""

    def __init__(
        self, oracle: Sequence[Tensor], limits: Mapping[str, float] = LIMITS, errors_of: Errors | None = None
    ) -> None:  # fmt: skip
        self.oracle, self.limits, self.errors_of = oracle, limits, errors_of or each_error
        self.yardsticks: dict[str, list[float]] = {}

    def __call__(self, name: str, dtype: str, results: Sequence[Tensor]) -> Verdict:
        errors = self.errors_of(results, self.oracle)
        yardsticks = self.yardsticks.get(dtype, [None] * len(errors))
        factor = OURS if name.startswith("bitfast") else PEERS
        allowed = [allowed_error(dtype, y, factor, self.limits[dtype]) for y in yardsticks]
        pairs = zip(errors, allowed, strict=True)
        # NaN first, then the largest share of what is allowed.
        worst = Verdict(*max(pairs, key=lambda pair: (math.isnan(pair[0]), pair[0] / pair[1])))
        if dtype not in self.yardsticks and is_fine(worst):
            self.yardsticks[dtype] = errors
        return worst


def each_error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    return [relative_error(r, o) for r, o in zip(results, oracle, strict=True)]


def overall_error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    """Return the root of the mean squared relative errors of several results, each counting alike.

    The results are one tensor of all their numbers, one after the other; those in float64 are flat.
    """
    (result,) = results
    sizes = [tensor.numel() for tensor in oracle]
    if result.numel() != sum(sizes):
        raise WrongResultError(f"{result.numel()} numbers instead of {sum(sizes)}")
    errors = each_error(result.split(sizes), oracle)
    return [math.sqrt(sum(error**2 for error in errors) / len(errors))]


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Return the norm of the difference over the norm of the oracle, both in float64."""
    if result.shape != oracle.shape:
        raise WrongResultError(f"shape {tuple(result.shape)} is not {tuple(oracle.shape)}")
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm().clamp_min(1e-300))


def allowed_error(dtype: str, yardstick: float | None, factor: float, limit: float) -> float:
    """Return the largest relative error that a result of this dtype may have.

    Args:
        dtype: In which it was computed.
        yardstick: The yardstick's error in that dtype; None: the result is the yardstick, or there is none.
        factor: :data:`OURS` or :data:`PEERS`.
        limit: What the yardstick may have.
    """
    if yardstick is None:
        return limit
    return factor * yardstick + torch.finfo(getattr(torch, dtype)).eps / 2


def is_fine(verdict: Verdict) -> bool:
    """Whether the error is finite and allowed; a verdict without an error says nothing against it."""
    error, allowed = verdict
    return error is None or (math.isfinite(error) and error <= (allowed or 0.0))


def check(verdict: Verdict) -> None:
    """Raise WrongResultError unless the verdict is fine."""
    if not is_fine(verdict):
        raise WrongResultError(f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}")
