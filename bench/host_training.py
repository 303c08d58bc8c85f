"""``python -m bench.host_training``: what a training step costs the host, apart from arithmetic.

Counted are calls and nodes of autograd, of each direction: of a whole step of R50x1 on a tiny image, and of one
block, by which a deeper network differs. Milliseconds are the least of many steps of a network with R50x1's
steps but next to no arithmetic. On a GPU, for which nobody waits, they are the host's: to launch everything.

The GPU's path is measured where there is no GPU too: in Triton's interpreter, with launches that do nothing.
(What the type of the device decides is then decided for the CPU, which asks somewhat more.) With ``--base``
another commit is measured too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from . import host
from .base import ROOT, environment_of, git, worktree_of
from .tables import table

Counts = dict[str, Any]
"""As :func:`host.calls_of` returns them, and ``nodes``, in the forward pass: of autograd's graph, by name."""

DEPTHS = (3, 4, 6, 3)
DEEPER = (3, 4, 7, 3)
"""Of R50x1, and of a network with one block more, which has no convolution in its shortcut."""
DIRECTIONS = ("forward", "backward")
STEPS = 60

TRITON = {"group_norm_act": "triton", "weight_standardization": "triton"}
"""What a GPU computes by kernels that are launched."""
PATHS = {"cpu": "CPU", "gpu": "GPU's path"}

# ---- what is counted ------------------------------------------------------------------------------------


def counts_of(model: nn.Module, images: Tensor) -> dict[str, Counts]:
    """Count what each direction of a warm training step makes Python, torch and autograd do."""

    def forward() -> Tensor:
        return model(images).pooler_output

    for _ in range(host.WARM_UPS):
        output = forward()
        output.sum().backward(retain_graph=True)
    grad = torch.ones_like(output)

    def backward() -> None:
        model.zero_grad()
        torch.autograd.backward(output, grad, retain_graph=True)

    # A GPU's nodes are otherwise computed by a thread of their own, in which calls are not seen.
    with torch.autograd.set_multithreading_enabled(False):
        found = {
            "forward": host.calls_of(forward, most=None),
            "backward": difference(
                host.calls_of(backward, most=None), host.calls_of(model.zero_grad, most=None)
            ),
        }
    found["forward"]["nodes"] = dict(nodes_of(output))
    return found


def nodes_of(output: Tensor) -> Counter[str]:
    """Return the nodes of autograd's graph behind a tensor, by name."""
    seen, names, waiting = set(), Counter[str](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names[node.name().removeprefix("torch::autograd::")] += 1
        waiting += [following for following, _ in node.next_functions]
    return names


def difference(counts: Counts, others: Counts) -> Counts:
    """Return by how much counts are greater than others; of names those that differ."""
    found: Counts = {}
    for key, value in counts.items():
        if isinstance(value, dict):
            apart = Counter(value)
            apart.subtract(others[key])
            found[key] = {name: n for name, n in apart.most_common() if n}
        else:
            found[key] = value - others[key]
    return found


def block_counts(library: str, images: Tensor, device: str = "cpu") -> dict[str, dict[str, Counts]]:
    """Return the counts of a "step" and of a "block", by direction."""
    step, deeper = (
        counts_of(model_of(library, device, depths=list(depths)), images)
        for depths in (DEPTHS, DEEPER)
    )
    return {"step": step, "block": {each: difference(deeper[each], step[each]) for each in step}}


def model_of(library: str, device: str = "cpu", **settings: Any) -> nn.Module:
    """Return a model in training that costs next to no arithmetic."""
    return host.model_of(library, **host.NARROW, **settings).to(device).train()


# ---- what is timed --------------------------------------------------------------------------------------


def milliseconds_of(model: nn.Module, images: Tensor, steps: int = STEPS) -> dict[str, float]:
    """Return what each direction takes the host, in the fastest of some steps."""
    best = dict.fromkeys(DIRECTIONS, float("inf"))
    grad = torch.ones_like(model(images).pooler_output)
    for _ in range(steps + host.WARM_UPS):
        model.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        output = model(images).pooler_output
        middle = time.perf_counter()
        torch.autograd.backward(output, grad)
        times = {"forward": middle - began, "backward": time.perf_counter() - middle}
        best = {each: min(best[each], 1e3 * times[each]) for each in DIRECTIONS}
    return best


# ---- paths ----------------------------------------------------------------------------------------------


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Within the block, launches of Triton kernels do nothing: interpreted, each is thousands of calls."""
    from bitfast.kernels import launch

    def nothing(*_: Any) -> None:
        pass

    with (
        patch.object(launch.Launch, "launch", nothing),
        patch.object(launch._PublicLaunch, "__call__", nothing),
    ):
        yield


@contextmanager
def on_path(path: str) -> Iterator[str]:
    """Within the block, networks on the device that is yielded run as on "cpu" or as on "gpu".

    For the GPU's path where there is no GPU, Triton must have been imported with TRITON_INTERPRET=1.
    """
    from bitfast import use_backend

    if path == "cpu":
        yield "cpu"
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    replaced: AbstractContextManager[None] = (
        launching_nothing() if device == "cpu" else nullcontext()
    )
    with use_backend(**TRITON), replaced:
        yield device


def measure(library: str, path: str) -> dict[str, Any]:
    """Count and time on a path, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # transformers' does the same everywhere.
    context: AbstractContextManager[str] = (
        on_path(path) if library == "bitfast" else nullcontext("cpu")
    )
    with context as device:
        images = torch.randn(host.IMAGES, device=device)
        counts = block_counts(library, images, device)
        return {**counts, "milliseconds": milliseconds_of(model_of(library, device), images)}


# That checkout's bitfast, and this one's way to measure it.
MEASURE = """
import json, sys, bitfast
sys.path.insert(0, sys.argv[1])
from bench import host_training
print(json.dumps(host_training.measure(*sys.argv[2:])))
"""


def measure_elsewhere(library: str, path: str, folder: Path = ROOT) -> dict[str, Any]:
    """Measure the bitfast of a checkout, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(ROOT), library, path]
    environment = environment_of(folder)
    environment.pop("TRITON_INTERPRET", None)
    if path == "gpu" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    printed = subprocess.check_output(command, cwd=folder, env=environment)
    return json.loads(printed.splitlines()[-1])


# ---- the report -----------------------------------------------------------------------------------------


def report(command: str, base: str | None) -> dict[str, Any]:
    """Measure everything; the result is ready for JSON."""
    from .rows import machine

    about = {"machine": machine(), "command": command, "threads": 1, "images": host.IMAGES}
    models: dict[str, Any] = {}
    if base is not None:
        with worktree_of(base) as folder:
            about["base"] = git(folder, "rev-parse", "--short", "HEAD")
            for path, title in PATHS.items():
                models[f"{title}, before"] = measure_elsewhere("bitfast", path, folder)
    for path, title in PATHS.items():
        models[title] = measure_elsewhere("bitfast", path)
    models["transformers"] = measure_elsewhere("transformers", "cpu")
    return {**about, "models": dict(sorted(models.items()))}


COUNTED = {**host.COUNTED, "nodes of autograd": "nodes"}


def markdown(found: dict[str, Any]) -> str:
    models: dict[str, Any] = found["models"]
    lines: list[str] = []
    for part in ("block", "step"):
        rows: list[tuple[str, ...]] = []
        for direction in DIRECTIONS:
            for title, key in COUNTED.items():
                if key in next(iter(models.values()))[part][direction]:
                    cells = (number(m[part][direction][key]) for m in models.values())
                    rows.append((f"{direction}: {title}", *cells))
        lines += [*table([f"one {part}", *models], rows), ""]
    times = [
        (f"{each}, ms", *(f"{m['milliseconds'][each]:.2f}" for m in models.values()))
        for each in DIRECTIONS
    ]
    lines += table(["a step with next to no arithmetic", *models], times)
    return "\n".join(lines)


def number(counted: int | dict[str, int]) -> str:
    return f"{sum(counted.values()) if isinstance(counted, dict) else counted:,}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here")
    parser.add_argument("--base", metavar="REV", help="another commit, to be measured too")
    options = parser.parse_args(arguments)
    command = "python -m bench.host_training"
    if options.base is not None:
        command += f" --base {options.base}"
    try:
        found = report(command, options.base)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
