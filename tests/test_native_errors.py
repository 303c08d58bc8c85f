"""What the extension's operators say of wrong arguments.

That it is whole with a static libstdc++ as well is tested where such a library is built, in test_packaging.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitfast import extension
from tests.native_errors import Message, assert_whole, messages

ROOT = Path(__file__).parent.parent
SAID_BY_TORCH_FIRST = {"weights must hold at least one tensor"}
"""Torch finds no kernel for an operator that is given no tensor."""


@pytest.fixture(scope="module")
def installed() -> list[list[Message]]:
    """What the installed extension says, with the instructions that this CPU has and with fewer."""
    if extension.CPU.path is None:
        pytest.skip(f"the extension is not built: {extension.CPU.problem}")
    path = Path(extension.CPU.path)
    return [messages(path), messages(path, ATEN_CPU_CAPABILITY="default")]


def test_messages(installed: list[list[Message]]) -> None:
    for found in installed:
        assert_whole(found)


def test_every_check_of_the_sources_was_failed(installed: list[list[Message]]) -> None:
    """A check that nobody fails here would be one whose message nobody reads."""
    said = [message for found in installed for _, message, _ in found]
    is_fused = any("packed for another convolution" in message for message in said)
    unheard = set()
    for path in (ROOT / "csrc").glob("*.[ch]*"):
        if path.suffix == ".cu" or "cuda" in path.stem.split("_") or path.name == "errors.h":
            continue  # what CUDA's operators say is heard only where there is a GPU
        for check in re.findall(r"STD_TORCH_CHECK\((.*?)\);", path.read_text(), re.DOTALL):
            words = max(re.findall(r'"(.*?)"', check), key=len)
            if not any(words in message for message in said):
                unheard.add((path.name, words))
    if not is_fused:  # this CPU refuses before it looks at the arguments
        fused = {"norm_convolution.cpp", "convolution_weight_gradient.cpp"}
        unheard = {check for check in unheard if check[0] not in fused}
    assert {words for _, words in unheard} <= SAID_BY_TORCH_FIRST, unheard
