"""``python -m bench.run``: every case of the registry, checked and timed, as a table and as JSON.

The contestants of a case take turns, so that what else the machine does meets all of them alike; the
figure to read is the ratio of their medians, which comes with the spread of the single rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.registry import Case, Contestants, check, select

SHORTEST_SAMPLE = 0.02
"""Seconds. A call that takes less is repeated within one sample, for the clock's sake."""


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose title contains it")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for case in select(options.only):
        rows += run(case, options.rounds)
        print(f"{case.title} done", file=sys.stderr)
    print(table(rows))
    if options.output is not None:
        content = {"machine": machine(), "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def run(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Check and time one case; return a row per contestant."""
    torch.manual_seed(0)
    contestants = case.make()
    baseline, *_ = contestants
    with torch.set_grad_enabled(case.training):
        differences = compare(contestants, case.tolerance)
        samples = take_turns(contestants, rounds)
    rows = []
    for name, seconds in samples.items():
        ratios = [a / b for a, b in zip(samples[baseline], seconds, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "contestant": name,
                "seconds": statistics.median(seconds),
                "ratio": statistics.median(samples[baseline]) / statistics.median(seconds),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "relative_difference": differences[name],
            }
        )
    return rows


def compare(contestants: Contestants, tolerance: float) -> dict[str, float]:
    """Return each contestant's difference from the first; nothing is timed that differs too much."""
    results = {name: function().detach() for name, function in contestants.items()}
    expected = next(iter(results.values()))
    return {name: check(result, expected, tolerance) for name, result in results.items()}


def take_turns(contestants: Contestants, rounds: int) -> Mapping[str, list[float]]:
    """Return the seconds per call of each contestant in each round."""
    repeats = {name: calls_per_sample(function) for name, function in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return samples


def calls_per_sample(function: Callable[[], Tensor]) -> int:
    """Return how many calls fill the shortest sample, after a few to warm up."""
    for _ in range(2):
        function()
    start = time.perf_counter()
    function()
    return max(1, int(SHORTEST_SAMPLE / (time.perf_counter() - start)))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| case | contestant | time | ratio (quartiles) | difference |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['op']}: {row['case']} | {row['contestant']} | {duration(row['seconds'])} "
            f"| {row['ratio']:.2f}x ({low:.2f}-{high:.2f}) | {row['relative_difference']:.0e} |"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ("bitfast", "torch", "triton", "transformers", "numpy")
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
