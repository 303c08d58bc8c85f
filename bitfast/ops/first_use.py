"""CUDA kernels check themselves before the first use in a process.

They are proved without a GPU (``docs/development.md``), which leaves what only the hardware decides. So the
first question whether a kernel can run here runs it on small inputs and compares with plain PyTorch in
float64. A kernel that differs is not used: one warning says so, and the next backend serves.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bitfast import extension
from bitfast.torch_state import constant_when_compiled, unseen

Check = Callable[[torch.device], "str | None"]
"""Runs a kernel on a device; returns how it differs from what is right, or None."""

ROUNDINGS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""How much one rounding changes a number, relatively, at most."""

_checks: dict[str, Check] = {}
_problems: dict[str, str | None] = {}
_lock = threading.RLock()


def register_first_use(op: str, check: Check) -> None:
    """Register how the CUDA kernels of an op are checked. ``bitfast/ops/<op>.py`` calls this when imported."""
    _checks[op] = check


@constant_when_compiled
def why_unusable(op: str) -> str | None:
    """Return why the extension's CUDA kernels of an op cannot be used here, or None.

    The first call for an op runs its check, some milliseconds, on the current device.
    """
    if extension.CUDA.problem is not None:
        return extension.CUDA.problem
    if op in _problems:
        return _problems[op]
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.is_current_stream_capturing():
        return "it has not been checked yet, and a CUDA graph is being captured"
    with _lock:
        if op not in _problems:
            _problems[op] = _run(op, torch.device("cuda", torch.cuda.current_device()))
        return _problems[op]


def failures() -> dict[str, str]:
    """Return what the checks that have run found wrong, by op."""
    return {op: problem for op, problem in _problems.items() if problem is not None}


def _run(op: str, device: torch.device) -> str | None:
    with unseen(), torch.autocast("cuda", enabled=False):
        try:
            problem = _checks[op](device)
        except RuntimeError as error:
            problem = str(error)
    if problem is None:
        return None
    problem = f"its check on {torch.cuda.get_device_name(device)} failed: {problem}"
    warnings.warn(f"bitfast does not use its CUDA kernels of {op}: {problem}", stacklevel=2)
    return problem


def difference(name: str, result: Tensor, expected: Tensor, roundings: float = 4.0) -> str | None:
    """Return how a result differs from what is expected, or None if it is near enough.

    Args:
        name: Of the result, for the text.
        result: What the kernel wrote.
        expected: The right values, in float64.
        roundings: How many roundings to the result's dtype are allowed, relative to the norm.
    """
    if result.shape != expected.shape:
        return f"{name} has shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
    error = (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    allowed = roundings * ROUNDINGS[result.dtype]
    if error.item() <= allowed:  # NaN is not
        return None
    return f"the error of {name} ({result.dtype}) is {error.item():.1e}, {allowed:.1e} is allowed"


__all__ = ["Check", "difference", "failures", "register_first_use", "why_unusable"]
