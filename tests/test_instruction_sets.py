"""The CPU kernels on each instruction set that this machine has, the lower ones in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.requirements import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION

ROOT = Path(__file__).parents[1]
SETS = ("baseline", "avx2", "avx512")
DEMANDS = {"baseline": "default", "avx2": "avx2"}
"""What torch's environment variable calls them."""


def run(arguments: list[str], capability: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_a_known_instruction_set_is_chosen():
    assert torch.ops.bitfast.instruction_set() in SETS


@pytest.mark.parametrize("name", DEMANDS)
def test_the_kernels_are_right_on_lower_instruction_sets(name):
    if SETS.index(torch.ops.bitfast.instruction_set()) <= SETS.index(name):
        pytest.skip(f"this process runs on {torch.ops.bitfast.instruction_set()} already")
    capability = DEMANDS[name]
    code = "import torch, bitfast; print(torch.ops.bitfast.instruction_set())"
    assert run(["-c", code], capability).stdout.strip() == name
    ops = ("group_norm_act", "weight_standardization", "resize_normalize")
    files = ["tests/test_staging.py", *(f"tests/test_{op}_native.py" for op in ops)]
    outcome = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], capability)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
