"""``python -m bench.cuda_builds``: what the compiler made of the CUDA kernels: registers and memory per thread.

Reads the extension's CUDA half as it was built, and needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from .tables import table

INSTRUCTION = re.compile(r"Function : (\S+)|/\*[0-9a-f]{4,}\*/ +(.*?) *;")
PART = re.compile(r"arch = (\S+)|Function (\S+):|\s+(REG:\d+ .*)")


@dataclass(frozen=True)
class Build:
    """A kernel as compiled for one chip."""

    kernel: str  # as in the source, with its template's arguments
    architecture: str  # "sm_80", "sm_90a"
    registers: int  # per thread
    stack: int  # bytes per thread that are not in registers: spills, arrays indexed at run time
    shared: int  # static bytes per block; dynamic ones are chosen by each launch


def builds(library: Path) -> list[Build]:
    """Return every kernel of a library for every chip that it has machine code for."""
    usage = run(cuobjdump(), "-res-usage", library)
    found: list[tuple[str, str, dict[str, int]]] = []
    architecture = name = ""
    for chip, function, sizes in PART.findall(usage):
        architecture, name = chip or architecture, function or name
        if sizes and name.startswith("_Z"):
            pairs = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", sizes)
            found.append((name, architecture, {key: int(value) for key, value in pairs}))
    names = iter(readable([name for name, *_ in found]))
    return [
        Build(next(names), chip, n["REG"], n["STACK"] + n["LOCAL"], n["SHARED"])
        for _, chip, n in found
    ]


def machine_code(library: Path, architecture: str, word: str) -> dict[str, list[str]]:
    """Return the instructions, in order, of every kernel of a library whose name contains a word.

    Args:
        library: As :func:`builds` takes it.
        architecture: For which they are compiled.
        word: Of the files that the library is made of, only those with the word in them are read.
    """
    code: dict[str, list[str]] = {}
    with TemporaryDirectory() as folder:
        run(cuobjdump(), "-xelf", "all", library.resolve(), folder=folder)
        for file in Path(folder).glob(f"*.{architecture}.cubin"):
            if word.encode() not in file.read_bytes():
                continue
            instructions: list[str] = []
            for function, instruction in INSTRUCTION.findall(run(cuobjdump(), "-sass", file)):
                if function:
                    instructions = code.setdefault(function, [])
                else:
                    instructions.append(instruction)
    found = {name: instructions for name, instructions in code.items() if word in name}
    return dict(zip(readable(list(found)), found.values(), strict=True))


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def run(*command: object, folder: str | None = None) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder).stdout


def readable(names: Sequence[str]) -> list[str]:
    """Return the short names of functions, given those in the machine code."""
    return [short(name) for name in run("c++filt", *names).splitlines()] if names else []


def short(name: str) -> str:
    """Return a kernel's struct, "group_norm_act::Forward<float, true>", from the function's whole name."""
    inner = re.search(r"gpu::kernel<(.*?) ?>\(", name)
    plain = inner[1] if inner else name
    return re.sub(r"\(anonymous namespace\)::|bitfast::", "", plain)


def main() -> None:
    spec = find_spec("bitfast._native_cuda")
    if spec is None or spec.origin is None:
        sys.exit("bitfast._native_cuda was not built: it needs nvcc")
    rows = sorted(builds(Path(spec.origin)), key=lambda build: (build.kernel, build.architecture))
    cells = [[b.kernel, b.architecture, *map(str, (b.registers, b.stack, b.shared))] for b in rows]
    columns = ["kernel", "chip", "registers", "stack bytes", "static shared bytes"]
    print("\n".join(table(columns, cells)))


if __name__ == "__main__":
    main()
