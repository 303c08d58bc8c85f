"""A fresh seed for every test of every run, printed where a test fails."""

from __future__ import annotations

import os
import random

import pytest
import torch

from bench.torchvision_import import import_torchvision
from tests import interpreter

interpreter.enable()
import_torchvision()  # before any test imports transformers, which would fail to

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may have what tests/gpu needs, and no more
    pass
else:
    # One example may include a first-use compilation; the shapes, not the seconds, are under test.
    settings.register_profile("bitfast", deadline=None, print_blob=True)
    settings.load_profile("bitfast")


LONGEST = (
    "test_kernel_builds",
    "test_modeling",
    "test_modeling_compile",
    "test_group_norm_act_kernels",
    "test_instruction_sets",
    "test_export",
    "test_gpu_report",
    "test_in_place",
    "test_packaging",
    "test_modeling_triton",
    "test_documentation",
    "test_modeling_cpu",
)
"""The files that take longest. First, so that of processes which share the files none is left with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch and random from BITFAST_TEST_SEED, or anew; pytest shows the line when a test fails."""
    value = int(os.environ.get("BITFAST_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"BITFAST_TEST_SEED={value}")
    random.seed(value)
    torch.manual_seed(value)
    return value
