"""The ops of the registry under pytest-benchmark: ``pytest bench --benchmark-only``.

One group per case, plain PyTorch beside bitfast. Whole models are timed by ``bitfast bench`` alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .contest import checked_errors
from .registry import OURS, PLAIN, Case, cases


@pytest.mark.parametrize("contestant", [PLAIN, OURS])
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.title)
def test_op(case: Case, contestant: str, benchmark: Any) -> None:
    """Check every contestant, then time one of them."""
    benchmark.group = case.title
    problem = case.make()
    with torch.set_grad_enabled(case.is_training):
        for result in checked_errors(problem, case.dtype).values():
            assert result.problem is None
        benchmark(problem.contestants[contestant])
