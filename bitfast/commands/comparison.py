"""One network in transformers and in bitfast, measured on this machine: agreement, time and memory.

Both load the same checkpoint and get the same input, on the CPU, in one process where times are
compared and each in its own where memory is.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RELATIVE_LIMIT = 1e-5
"""How far the float32 outputs may be apart: norm of the difference over norm."""

MEMORY_TIMEOUT = 120.0
"""Seconds after which a process whose memory is measured is killed."""


@dataclass(frozen=True)
class Agreement:
    """How far two outputs are apart."""

    largest: float
    relative: float

    @property
    def good(self) -> bool:
        """Whether the difference is within :data:`RELATIVE_LIMIT`; NaN is not."""
        return self.relative <= RELATIVE_LIMIT


def load(library: str, folder: Path) -> nn.Module:
    """Load the classifier in ``folder`` with "transformers" or "bitfast"."""
    if library == "transformers":
        from bitfast.bench.torchvision_import import import_torchvision

        import_torchvision()
    return importlib.import_module(library).BitForImageClassification.from_pretrained(folder).eval()


@torch.inference_mode()
def logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Run the model once."""
    return model(pixel_values).logits


def compare(expected: Tensor, actual: Tensor) -> Agreement:
    """Compare two outputs of one shape, in float64."""
    expected, actual = expected.double(), actual.double()
    difference = actual - expected
    relative = difference.norm() / expected.norm()
    return Agreement(difference.abs().max().item(), relative.item())


def time_in_turns(
    models: Mapping[str, nn.Module], pixel_values: Tensor, rounds: int, budget: float
) -> dict[str, list[float]]:
    """Time the models' runs.

    Args:
        models: By name. They take turns, and change the order each round, so that none has the quieter
            moments of the machine.
        pixel_values: The input.
        rounds: Timed runs of each model, after one that is not timed.
        budget: Seconds after which no further round begins, once there are three.

    Returns:
        The seconds of each timed run, by model name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        logits(model, pixel_values)
    started = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - started > budget:
            break
        for name in list(models)[:: -1 if i % 2 else 1]:
            begin = time.perf_counter()
            logits(models[name], pixel_values)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


# ---- memory -------------------------------------------------------------------------------------

RUN_TWICE = """
import sys
import torch
from safetensors.torch import load_file
{prepare}
from {library} import BitForImageClassification

torch.set_num_threads({threads})
model = BitForImageClassification.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    for _ in range(2):
        model(load_file(sys.argv[2])["pixel_values"])
"""

# A process inherits the peak of the one that starts it, and this one is large. So a small process
# starts the one to be measured, and asks afterwards.
MEASURE_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(library: str, folder: Path, pixel_values: Tensor) -> int:
    """Return the peak resident memory, in bytes, of a fresh process that does nothing but import the
    library, load the classifier in ``folder`` and run it twice, with this process's thread count.

    Raises:
        RuntimeError: it cannot be measured; the message says why.
    """
    path = folder / "input.safetensors"
    save_file({"pixel_values": pixel_values.contiguous()}, path)
    prepare = ""
    if library == "transformers":  # without importing bitfast, which would count too
        from bitfast.bench import torchvision_import

        prepare = (
            f"import runpy; runpy.run_path({torchvision_import.__file__!r})['import_torchvision']()"
        )
    program = RUN_TWICE.format(prepare=prepare, library=library, threads=torch.get_num_threads())
    command = [sys.executable, "-c", program, str(folder), str(path)]
    # The other process must find what this one found, however this one was started.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        finished = subprocess.run(
            [sys.executable, "-c", MEASURE_CHILD, *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=MEMORY_TIMEOUT,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {MEMORY_TIMEOUT:.0f} s") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return int(finished.stdout.split()[-1]) * unit
