"""The registry under pytest-benchmark: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.registry import Case, cases, check


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.title)
def test_case(case: Case, benchmark: Any) -> None:
    """Check every contestant against the first, then time the one that users get."""
    contestants = case.make()
    with torch.set_grad_enabled(case.training):
        expected = next(iter(contestants.values()))()
        for function in contestants.values():
            check(function(), expected, case.tolerance)
        chosen = next(name for name in contestants if "bitfast" in name or name == "same_pad")
        benchmark(contestants[chosen])
