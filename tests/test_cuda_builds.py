"""What the compiler made of the CUDA kernels, read from the library as it was built."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from bench.cuda_builds import Build, builds
from bitfast import extension

LIBRARY = Path(extension.__file__).parent / "_native_cuda.abi3.so"
CHIPS = {"sm_80", "sm_90a"}

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the extension's CUDA half was not built here: it needs nvcc"
)


@pytest.fixture(scope="module")
def found() -> list[Build]:
    return builds(LIBRARY)


def test_every_kernel_is_there_for_every_chip(found: list[Build]) -> None:
    chips = defaultdict(set)
    for build in found:
        chips[build.kernel].add(build.architecture)
    assert chips
    assert {kernel: missing for kernel, on in chips.items() if (missing := CHIPS - on)} == {}


def test_nothing_is_spilled(found: list[Build]) -> None:
    assert [build for build in found if build.stack > 0] == []
