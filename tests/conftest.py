"""One seed for all that the tests draw, how several processes share the tests, and what many of them use.

BITFAST_TEST_SEED is that seed; ``make test SEED=...`` sets it. By default and in CI it is fixed, so that only a
change makes a test fail. A nightly run uses ``SEED=random``, which draws a new one and prints it.
"""

from __future__ import annotations

import functools
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.torchvision_import import import_torchvision
from tests import interpreter
from tests.guarded import poisoned_memory

interpreter.enable()
import_torchvision()  # before any test imports transformers, which would fail to

VARIABLE = "BITFAST_TEST_SEED"
FIXED_SEED = 0
BASE_SEED = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # hypothesis reads its option in the same hook
def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "random":
        wanted = str(random.SystemRandom().randrange(2**31))
        os.environ[VARIABLE] = wanted  # the processes of xdist inherit the number
    if wanted and not wanted.isdecimal():
        raise pytest.UsageError(f'{VARIABLE} must be a number or "random", got {wanted!r}')
    seed = int(wanted or FIXED_SEED)
    config.stash[BASE_SEED] = seed
    if seed != FIXED_SEED:
        config.option.hypothesis_seed = seed
    configure_hypothesis(derandomize=seed == FIXED_SEED)


def configure_hypothesis(derandomize: bool) -> None:
    try:
        from hypothesis import settings
    except ImportError:  # a machine with a GPU may have what tests/gpu needs, and no more
        return
    # One example may include a first-use compilation; the shapes, not the seconds, are under test.
    settings.register_profile("bitfast", deadline=None, print_blob=True, derandomize=derandomize)
    settings.load_profile("bitfast")


def pytest_report_header(config: pytest.Config) -> str:
    return f"{VARIABLE}={config.stash[BASE_SEED]}"


@pytest.hookimpl(optionalhook=True)  # a machine with a GPU may have no xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process the next test, but all tests of a file together where they share a fixture.

    Some of these fixtures take minutes. xdist starts with what has most tests, so these files come first.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return file if shares_fixtures(config.rootpath / file) else nodeid

    return Scheduling(config, log)


@functools.cache
def shares_fixtures(path: Path) -> bool:
    return 'fixture(scope="module")' in path.read_text()


def seed_from(request: pytest.FixtureRequest) -> int:
    """Seed random, numpy and torch for a test or module, whichever others run before it; return the seed."""
    name = f"{request.config.stash[BASE_SEED]} {request.node.nodeid}"
    value = zlib.crc32(name.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True, scope="module")
def module_seed(request: pytest.FixtureRequest) -> int:
    """Seed what the fixtures of a whole module draw."""
    return seed_from(request)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed the test; where it fails, pytest shows what repeats it."""
    print(f"{VARIABLE}={request.config.stash[BASE_SEED]}")
    return seed_from(request)


@pytest.fixture
def no_gradient() -> Iterator[None]:
    """Record gradients only where the test itself says so."""
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what is allocated but not written with NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let torch.compile find nothing of earlier tests, and leave nothing to later ones."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
