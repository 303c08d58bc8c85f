"""What the compiler made of the CUDA kernels, read from the library as it was built."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from bench.cuda_builds import Build, builds, machine_code
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


def test_norm_convolution_multiplies_by_wgmma_and_finds_the_registers_that_it_takes(
    found: list[Build],
) -> None:
    """Of three groups of warps one leaves registers to the two others.

    Together they have what they were launched with, the number in ``found``. Who asks for more waits for ever.
    """
    launched = {b.kernel: b.registers for b in found if b.architecture == "sm_90a"}
    kernels = machine_code(LIBRARY, "sm_90a", "NormConvolution")
    assert kernels
    for kernel, instructions in kernels.items():
        text = "\n".join(instructions)
        assert "HGMMA" in text, kernel
        left, taken = (
            {int(number, 16) for number in re.findall(rf"USETMAXREG\.{action}.*(0x\w+)", text)}
            for action in ("DEALLOC", "TRY_ALLOC")
        )
        assert len(left) == len(taken) == 1, kernel
        assert max(left) + 2 * max(taken) <= 3 * launched[kernel], kernel


LOAD = """
import ctypes, os, sys
import torch
import bitfast.ops
library = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)  # what only a torch with CUDA has is not looked for yet
names = "group_norm_act_forward group_norm_act_backward same_max_pool same_pad stem norm_convolution_prepare"
names += " norm_convolution norm_convolution_strips norm_convolution_partials norm_convolution_factors"
for name in names.split():
    library["bitfast_" + name]
size = library.bitfast_group_norm_act_workspace
size.restype = ctypes.c_char_p
call = bitfast.ops.group_norm_act_cuda.Call.of(
    (2, 64, 8, 8), torch.bfloat16, 32, 1e-5, "relu", torch.float32, torch.float32
)
problem = size(ctypes.byref(call), ctypes.byref(ctypes.c_int64()))
assert torch.cuda.is_available() == (problem is None), problem
assert problem is None or b"CUDA" in problem, problem
"""


def test_the_library_loads_without_a_gpu() -> None:
    """Its entries are there, define all that they call, and say what is missing."""
    command = [sys.executable, "-c", LOAD, str(LIBRARY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
