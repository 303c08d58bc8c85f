"""The heap keeps what a network frees."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from bitfast.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        tensors = [torch.ones(2**20) for _ in range(8)]  # 32 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
{call}
faults()
print(faults())
"""


def page_faults(call: str, **environment: str) -> int:
    command = [sys.executable, "-c", CODE.format(call=call)]
    variables = {**os.environ, **environment}
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's heap")
def test_freed_pages_are_used_again() -> None:
    # Without, where something lies above them in the heap, they may be kept as well; so only this is sure.
    pages = 4 * 32 * 2**20 // resource.getpagesize()
    kept = page_faults("keep_freed_memory()")
    assert kept < pages / 8, f"{kept} page faults for {pages} pages; {page_faults('')} without"


def test_it_can_be_turned_off() -> None:
    asked = "import bitfast.memory as m; m.torch.empty = lambda *_, **__: print(10**9); keep_freed_memory()"
    assert page_faults(f"{asked}; raise SystemExit", BITFAST_KEEP_FREED_MEMORY="1") == 10**9
    assert page_faults(f"{asked}; print(0); raise SystemExit", BITFAST_KEEP_FREED_MEMORY="0") == 0
