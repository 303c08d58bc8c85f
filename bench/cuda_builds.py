"""``python -m bench.cuda_builds``: what the compiler made of the CUDA kernels: registers and memory per thread.

Reads the extension's CUDA half as it was built, and needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .tables import table

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
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = run(tool, "-res-usage", library)
    found: list[tuple[str, str, dict[str, int]]] = []
    architecture = name = ""
    for chip, function, sizes in PART.findall(usage):
        architecture, name = chip or architecture, function or name
        if sizes and name.startswith("_Z"):
            pairs = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", sizes)
            found.append((name, architecture, {key: int(value) for key, value in pairs}))
    names = iter(run("c++filt", *(name for name, *_ in found)).splitlines())
    return [
        Build(short(next(names)), chip, n["REG"], n["STACK"] + n["LOCAL"], n["SHARED"])
        for _, chip, n in found
    ]


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


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
