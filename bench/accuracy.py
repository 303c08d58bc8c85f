"""The rule that every result must keep before its time is taken.

The error against float64 is at most ``factor`` times that of plain PyTorch (of transformers, for whole
models) in the same dtype, plus one rounding. That yardstick itself must keep an absolute limit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OURS = 2.0
"""How many times the yardstick's error bitfast may have, as in ``tests/tolerances.py``."""
PEERS = 4.0
"""How many times other runtimes may: their accuracy is shown, not vouched for."""
YARDSTICK_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""What the yardstick's relative error may be: a deep network of random weights magnifies roundings."""
GRADIENT_LIMIT = 5e-2
"""The same for the gradients of a whole network in float32. Of its millions of ReLUs some have an argument so
near to 0 that rounding decides whether a gradient passes."""


class WrongResultError(AssertionError):
    """A result is too far from float64's, or not finite; it is not timed."""


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Return the norm of the difference over the norm of the oracle, both in float64.

    Raises:
        WrongResultError: the shapes differ.
    """
    if result.shape != oracle.shape:
        raise WrongResultError(f"shape {tuple(result.shape)} is not {tuple(oracle.shape)}")
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm().clamp_min(1e-300))


def overall_error(result: Tensor, oracle: list[Tensor]) -> float:
    """Return the root of the mean squared relative errors of several results, each counting alike.

    Args:
        result: All numbers of the results, one after the other.
        oracle: The results in float64, flat.

    Raises:
        WrongResultError: the number of numbers differs.
    """
    sizes = [tensor.numel() for tensor in oracle]
    if result.numel() != sum(sizes):
        raise WrongResultError(f"{result.numel()} numbers instead of {sum(sizes)}")
    pairs = zip(result.split(sizes), oracle, strict=True)
    errors = [relative_error(r, o) for r, o in pairs]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def allowed_error(
    dtype: torch.dtype, yardstick: float | None, factor: float, limit: float | None = None
) -> float:
    """Return the largest relative error that a result of this dtype may have.

    Args:
        dtype: In which it was computed.
        yardstick: The relative error of the yardstick in that dtype; None: it is the yardstick, or there
            is none.
        factor: :data:`OURS` or :data:`PEERS`.
        limit: What the yardstick may have; default: :data:`YARDSTICK_LIMITS`.
    """
    if yardstick is None:
        return YARDSTICK_LIMITS[dtype] if limit is None else limit
    return factor * yardstick + torch.finfo(dtype).eps / 2


def check(error: float, allowed: float) -> None:
    """Raise WrongResultError unless the error is finite and allowed."""
    if not (math.isfinite(error) and error <= allowed):
        raise WrongResultError(f"error {error:.1e} against float64, allowed {allowed:.1e}")
