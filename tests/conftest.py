"""One seed for all that the tests draw, and what xdist must know to share the tests out.

BITFAST_TEST_SEED is that seed; ``make test SEED=...`` sets it. By default and in CI it is fixed, so that only a
change makes a test fail. A nightly run uses ``SEED=random``, which draws a new one and prints it.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.torchvision_import import import_torchvision
from tests import interpreter
from tests.guarded import poisoned_memory

interpreter.enable()
import_torchvision()  # before any test imports transformers, which would fail to

VARIABLE = "BITFAST_TEST_SEED"
BASE_SEED = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # hypothesis reads its option in the same hook
def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "random":
        wanted = str(random.SystemRandom().randrange(2**31))
        os.environ[VARIABLE] = wanted  # the processes of xdist inherit the number
    if wanted and not wanted.isdecimal():
        raise pytest.UsageError(f'{VARIABLE} must be a number or "random", got {wanted!r}')
    config.stash[BASE_SEED] = int(wanted or 0)
    if wanted:
        config.option.hypothesis_seed = wanted
    configure_hypothesis(derandomize=not wanted)


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


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that share a fixture of their module in one process: some of these take minutes."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if isinstance(item, pytest.Function) and uses_module_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def uses_module_fixture(item: pytest.Function) -> bool:
    """Whether the test uses a fixture of its module, besides the seed that every module has."""
    found = item._fixtureinfo.name2fixturedefs
    return any(found[name][-1].scope == "module" for name in found if name != "module_seed")


def seed_from(request: pytest.FixtureRequest) -> int:
    """Seed random, numpy and torch for a test or module, whichever others run before it; return the seed."""
    node = request.node  # whose own nodeid xdist changes
    name = f"{request.config.stash[BASE_SEED]} {node.parent.nodeid} {node.name}"
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
