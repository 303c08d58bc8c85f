"""``python -m bench.kernel_builds``: build the Triton kernels for three chips, without a GPU, and look inside.

Every launch of the norms and weights of R50x1 and R152x4, and of batches of images, is compiled ahead of time
as Triton would compile it on the first call. Each access of its PTX code carries the line of the kernel that
asked for it, which says whether it is to a whole feature map or weight (these should be 16 bytes wide) or to a
few numbers beside it. The machine code has the same accesses, without lines: there they are counted by width.
"""

from __future__ import annotations

import argparse
import ast
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .kernel_variants import Job, all_jobs, quick_jobs, sampled_jobs
from .tables import table

REGISTERS_PER_THREAD = 255
REGISTERS_PER_MULTIPROCESSOR = 65536
SHARED_PER_PROGRAM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# ---- one build ----------------------------------------------------------------------------------


def build(job: Job) -> dict[str, Any]:
    """Compile a variant for a chip and say what its code is like.

    Returns:
        ``registers`` per thread; ``spills``: bytes of stack and local memory per thread plus the
        instructions that use them; ``shared``: bytes per program; ``code``: the instructions that reach
        global memory, and ``asked``: the same in PTX, by :func:`category`. Both by width, as "16x4 4x2":
        four of 16 bytes and two of 4.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, architecture = job
    module, name = variant.kernel.split(".")
    kernel = getattr(import_module(f"bitfast.kernels.{module}"), name)
    place = {parameter: (number,) for number, parameter in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={place[name]: value for name, value in variant.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in variant.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, show, file.name], capture_output=True, text=True, check=True
            ).stdout
            for show in ("-res-usage", "-sass")
        )
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    in_code, local = machine_accesses(code)
    return {
        "registers": sizes["REG"],
        "spills": sizes["STACK"] + sizes["LOCAL"] + local,
        "shared": compiled.metadata.shared,
        "code": by_width(in_code),
        "asked": by_width(asked_accesses(compiled.asm["ptx"])),
    }


MACHINE_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG|LD|ST|LDL|STL)((?:\.\w+)*) ")
MACHINE_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def machine_accesses(code: str) -> tuple[Counter[tuple[str, int]], int]:
    """Count the accesses to global memory in machine code by ("load|store", bytes), and to local memory."""
    counts: Counter[tuple[str, int]] = Counter()
    local = 0
    for name, modifiers in MACHINE_ACCESS.findall(code):
        if name in ("LDL", "STL"):
            local += 1
        else:
            found = (MACHINE_WIDTHS[m] for m in modifiers.split(".") if m in MACHINE_WIDTHS)
            counts["store" if name.startswith("ST") else "load", next(found, 4)] += 1
    return counts, local


def by_width(counts: Counter[tuple[str, int]]) -> dict[str, str]:
    """Turn counts of (what, width) into {what: "16x4 4x2"}."""
    result: dict[str, str] = {}
    for (what, width), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[0][1])):
        result[what] = f"{result.get(what, '')} {width}x{count}".lstrip()
    return result


def widths(text: str | None) -> dict[int, int]:
    """Turn "16x4 4x2" into {16: 4, 4: 2}."""
    pairs = (part.split("x") for part in (text or "").split())
    return {int(width): int(count) for width, count in pairs}


PTX_FILE = re.compile(r'\s*\.file\s+(\d+) "(.*)"')
PTX_LINE = re.compile(r"\s*\.loc\s+(\d+) (\d+) ")
PTX_ACCESS = re.compile(r"\b(ld|st)\.(?:\w+\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[busf](\d+) ")


def asked_accesses(ptx: str) -> Counter[tuple[str, int]]:
    """Count the accesses to global memory in PTX by ("category load|store", bytes)."""
    files = dict(PTX_FILE.findall(ptx))
    counts: Counter[tuple[str, int]] = Counter()
    line, is_inline, is_known = ("", 0), False, False
    for text in ptx.splitlines():
        if "inline asm" in text:
            is_inline, is_known = "begin" in text, False
        elif found := PTX_LINE.match(text):
            # Within inline assembly LLVM counts on from line to line: the first one is right.
            if not is_known:
                line = (files.get(found[1], ""), int(found[2]))
            is_known = is_inline
        elif found := PTX_ACCESS.search(text):
            action = {"ld": "load", "st": "store"}[found[1]]
            counts[f"{category(*line)} {action}", int(found[2] or 1) * int(found[3]) // 8] += 1
    return counts


VECTOR = re.compile(
    r"tl\.(load|store)\("
    r"((weight|bias|grad_weight|grad_bias|mean|rstd|channel_d|channel_dh) \+ (channel|image|row)\b"
    r"|(mean|rstd), |partial_\w+ \+ place|channel_\w+ \+ place, sum_|programs|entry)"
)
"""Accesses to what has a number per channel, group or filter, and to the table of all weights."""


@cache
def category(file: str, line: int) -> str:
    """Return what an access is to, by the line of the kernel that it stands in.

    "vector": numbers per channel, group or filter, few beside the tensors themselves. "turned": the side of
    a weight where neighbouring threads have neighbouring filters' pixels, 4 bytes each by design.
    "looped": filters too long for a tile, or unaligned ones. "tile": all else, and anything unknown.
    """
    text = linecache.getline(file, line)
    if VECTOR.search(text):
        return "vector"
    function = next((name for name, lines in functions_in(file) if line in lines), "")
    if function.endswith("_looped"):
        return "looped"
    return "turned" if function.endswith("_turned") and "+ source" in text else "tile"


@cache
def functions_in(file: str) -> list[tuple[str, range]]:
    nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [(f.name, range(f.lineno, (f.end_lineno or f.lineno) + 1)) for f in functions]


# ---- the sweep ----------------------------------------------------------------------------------


def build_all(jobs: list[Job], workers: int) -> dict[str, dict[str, Any]]:
    """Build in parallel, from nothing (cached builds may name lines that have changed); return the results by
    variant and chip."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            built = pool.map(build, jobs, chunksize=8)
            for (variant, architecture), result in zip(jobs, built, strict=True):
                results.setdefault(variant.title, {})[str(architecture)] = result
    return results


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: the worst of every kernel on every chip."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for title, by_chip in results.items():
        for chip, result in by_chip.items():
            groups.setdefault((title.partition("(")[0], f"sm_{chip}"), []).append(result)
    heads = ["kernel", "chip", "variants", "registers", "spilling", "shared bytes"]
    rows = []
    for group, members in sorted(groups.items()):
        asked = [member["asked"].get(f"tile {a}") for member in members for a in ("load", "store")]
        narrowest = min((width for text in asked for width in widths(text)), default="-")
        most = {key: max(member[key] for member in members) for key in ("registers", "shared")}
        spilling = sum(member["spills"] > 0 for member in members)
        rows.append((*group, len(members), most["registers"], spilling, most["shared"], narrowest))
    return "\n".join(table([*heads, "narrowest tile access"], rows, "llrrrrr"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--quick", action="store_true", help="the part that the table must have")
    parts.add_argument("--sample", action="store_true", help="the part of it that the tests build")
    help_only = "variants whose title contains it; the others stay in the output as they are"
    parser.add_argument("--only", default="", metavar="TEXT", help=help_only)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    part = quick_jobs if options.quick else sampled_jobs if options.sample else all_jobs
    jobs = [job for job in part() if options.only in job[0].title]
    start = time.perf_counter()
    results = build_all(jobs, options.workers)
    print(f"{len(jobs)} builds in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(summary(results))
    if options.output is not None:
        if options.only and options.output.exists():
            earlier = json.loads(options.output.read_text())["variants"]
            results |= {title: row for title, row in earlier.items() if options.only not in title}
        options.output.write_text(to_json(results))


def to_json(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of results, with one line per variant."""
    rows = (f"  {json.dumps(title)}: {json.dumps(row)}" for title, row in results.items())
    version = json.dumps(metadata.version("triton"))
    return f'{{\n "triton": {version},\n "variants": {{\n' + ",\n".join(rows) + "\n }\n}\n"


if __name__ == "__main__":
    main()
