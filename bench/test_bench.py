"""The ops of the registry under pytest-benchmark: ``pytest bench --benchmark-only``.

One group per case, plain PyTorch beside bitfast. Whole models are timed by ``bitfast bench`` alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from .accuracy import check
from .cases import OURS, PLAIN, Case
from .ops import cases
from .registry import opened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("contestant", [PLAIN, OURS])
@pytest.mark.parametrize(
    "case", list(cases(DEVICE, torch.get_num_threads())), ids=lambda case: case.title
)
def test_op(case: Case, contestant: str, benchmark: Any) -> None:
    """Check every contestant up to the one that is timed."""
    benchmark.group = case.title
    with opened(case) as problem, ExitStack() as stack:
        for each in problem.contestants:
            if each.name in (PLAIN, contestant):
                running = each.begin(stack)
                check(problem.judge(each.name, each.dtype, running.results))
                if each.name == contestant:
                    benchmark(running.time, 1)
