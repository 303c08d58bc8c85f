"""The extension's error messages are whole however it was linked, because no iostream has a part in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitfast import extension

ROOT = Path(__file__).parent.parent
SAID_BY_TORCH_FIRST = {"weights must hold at least one tensor"}
"""Torch finds no kernel for an operator that is given no tensor."""

Message = tuple[str, str, str]


def messages(library: Path, **environment: str) -> list[Message]:
    """Return (operator, message, the words it must end with); the last one is torch's own."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.native_errors", str(library)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return [tuple(row) for row in json.loads(process.stdout.splitlines()[-1])]


def assert_whole(found: list[Message]) -> None:
    *ours, (_, of_torch, _) = found
    for operator, message, words in ours:
        assert re.fullmatch(rf"\w+(\(\))?, \S+:\d+, {re.escape(words)}", message), (
            operator,
            message,
        )
    assert re.search(r"API call failed at \S+, line \d+$", of_torch), of_torch


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


def test_messages_with_a_static_standard_library(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build the extension with")
    process = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext",
         "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "BITFAST_EXTENSION": "cpu", "LDFLAGS": "-static-libstdc++"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    (library,) = tmp_path.glob("lib/bitfast/_native*")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in needed.stdout
    assert "libstdc++" not in needed.stdout
    assert_whole(messages(library))


def test_every_check_of_the_sources_was_failed(installed: list[list[Message]]) -> None:
    """A check that nobody fails here would be one whose message nobody reads."""
    said = [message for found in installed for _, message, _ in found]
    is_fused = any("packed for another convolution" in message for message in said)
    unheard = set()
    for path in (ROOT / "csrc").glob("*.[ch]*"):
        if path.suffix == ".cu" or path.name == "errors.h":
            continue
        for check in re.findall(r"STD_TORCH_CHECK\((.*?)\);", path.read_text(), re.DOTALL):
            words = max(re.findall(r'"(.*?)"', check), key=len)
            if not any(words in message for message in said):
                unheard.add((path.name, words))
    if not is_fused:  # this CPU refuses before it looks at the arguments
        unheard = {check for check in unheard if check[0] != "norm_convolution.cpp"}
    assert {words for _, words in unheard} <= SAID_BY_TORCH_FIRST, unheard
