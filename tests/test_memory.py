"""The heap keeps what a network frees."""

from __future__ import annotations

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's heap")
def test_freed_pages_are_used_again():
    def run(call: str) -> int:
        code = CODE.format(call=call)
        return int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    # Without, where something lies above them in the heap, they may be kept as well; so only this is sure.
    pages = 4 * 32 * 2**20 // resource.getpagesize()
    kept = run("keep_freed_memory()")
    assert kept < pages / 8, f"{kept} page faults for {pages} pages; {run('')} without"
