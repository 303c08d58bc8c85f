"""All cases of the benchmark, of ops, image processors and whole models, for a CPU and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from . import images, models, norm_convolutions, ops
from .cases import Case, Problem


def cases(device: str, thread_counts: Sequence[int]) -> Iterator[Case]:
    """Yield every case.

    Args:
        device: "cpu" or "cuda".
        thread_counts: Models and image processors run with each on the CPU, ops with the largest.
    """
    if device == "cuda":  # first, since nothing is known of them yet
        yield from norm_convolutions.cases()
        yield from models.fused_cases()
        yield from norm_convolutions.further_cases()
    yield from ops.cases(device, max(thread_counts))
    yield from images.cases(device, thread_counts)
    yield from models.cases(device, thread_counts)


@contextmanager
def opened(case: Case) -> Iterator[Problem]:
    """Draw a case's inputs; within the block torch has its threads, and records for autograd or not."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(case.is_training), case.open() as problem:
            yield problem
    finally:
        torch.set_num_threads(before)
