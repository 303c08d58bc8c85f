"""Small runs of ``bitfast finetune``, in this process and in others that wait to be interrupted.

``python -m tests.finetuning.runs WHAT NUMBER FLAG ARGUMENTS...`` runs the command, in which something happens:
it waits for a signal when it has touched the file FLAG, or it fails, or it tells more than usual.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitfast import cli

ROOT = Path(__file__).parents[2]
CLASSES = ("blue", "green", "red")
STEPS = 6
PATIENCE = 240.0
"""Seconds until a process is given up."""


def write_images(folder: Path, per_class: int = 8, size: int = 20) -> Path:
    """Write noise that is a bit blue, green or red into a folder for each."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(reversed(CLASSES)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = random.integers(0, 200, (size, size, 3), dtype=np.uint8)
            pixels[:, :, channel] += 55
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def arguments(data: Path, output: Path, model: Path, *more: Any) -> list[str]:
    """Return the arguments of a run of a few steps."""
    return [
        str(argument)
        for argument in (
            "finetune", data, "--output", output, "--model", model, "--steps", STEPS,
            "--batch-size", 8, "--micro-batch", 4, "--resize", 18, "--crop", 16,
            "--learning-rate", 0.01, "--dtype", "float32", "--device", "cpu", "--workers", 0,
            "--valid-fraction", 0.25, "--evaluate-every", 2, *more,
        )
    ]  # fmt: skip


def run(*given: Any) -> int:
    """Run the command in this process, which must not say that its arguments are wrong."""
    return cli.main(arguments(*given))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return what a run has measured, but for what a clock has."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        row.pop("images_per_second", None)
    return found


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_result(folder: Path, expected: Path) -> None:
    """Two runs have left the same, to the bit."""
    assert rows(folder) == rows(expected)
    assert names_in(folder) == names_in(expected)
    for name in ("model.safetensors", "config.json", "report.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@contextmanager
def interrupted_after(number: int) -> Iterator[None]:
    """Inside, this process gets SIGINT in that step (from 1)."""
    from bitfast.finetuning import training

    update = training.Trainer.update

    def update_with_signal(self: Any, step: int) -> None:
        update(self, step)
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "update", update_with_signal)
        yield


# ---- other processes ----------------------------------------------------------------------------


@contextmanager
def process(*command: Any, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process, which does not outlive the block."""
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def wait_until(condition: Callable[[], Any], started: subprocess.Popen[str]) -> None:
    """Wait for something that a process is to do."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if started.poll() is not None and not condition():
            pytest.fail(f"the process has ended: {started.communicate()}")
        assert time.monotonic() < end, "the process does not get that far"
        time.sleep(0.02)


def pause(flag: Path) -> None:
    """Tell the parent that this process waits, and wait until a signal has been noted."""
    interruption = signal.getsignal(signal.SIGINT).__self__  # type: ignore[union-attr]
    flag.touch()
    end = time.monotonic() + PATIENCE
    while interruption.signal is None and time.monotonic() < end:
        time.sleep(0.02)


def is_meant() -> bool:
    """Whether this process is the one that something shall happen to: the only one, or the second of two."""
    return os.environ.get("RANK", "1") == "1"


def pause_after_update(number: int, flag: Path) -> None:
    """Let the process that is meant wait when it has changed the weights that many times."""
    from bitfast.finetuning import training

    update = training.Trainer.update

    def update_and_wait(self: Any, step: int) -> None:
        update(self, step)
        if step == number - 1 and is_meant():
            pause(flag)

    training.Trainer.update = update_and_wait  # type: ignore[method-assign]


def fail_in_step(number: int, flag: Path) -> None:
    """Let the process that is meant fail in that step."""
    from bitfast.finetuning import training
    from bitfast.finetuning.errors import FinetuningError

    gradients = training.Trainer.gradients

    def fail(self: Any, step: Any) -> Any:
        if step.number == number - 1 and is_meant():
            raise FinetuningError("out of luck")
        return gradients(self, step)

    training.Trainer.gradients = fail  # type: ignore[method-assign]


def write_digest(_: int, flag: Path) -> None:
    """Let each process write a hash of its weights into a file of its own, when it has trained."""
    from bitfast.finetuning import command

    train = command._train

    def train_and_write(options: Any, plan: Any, *others: Any) -> Any:
        trained = train(options, plan, *others)
        flag.with_name(f"{flag.name}-{os.environ['RANK']}").write_text(
            command.weights_digest(plan.model)
        )
        return trained

    command._train = train_and_write


def pause_in_checkpoint(number: int, flag: Path) -> None:
    """Let this process wait when it has written a part of that checkpoint (from 1)."""
    from bitfast.finetuning import checkpoint

    write, count = checkpoint.write_safetensors, 0

    def write_a_part(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal count
        write(tensors, path, metadata)
        count += 1
        if count == number:
            os.truncate(path, path.stat().st_size // 2)
            pause(flag)

    checkpoint.write_safetensors = write_a_part


WHAT = {
    "checkpoint": pause_in_checkpoint,
    "digest": write_digest,
    "fail": fail_in_step,
    "update": pause_after_update,
}

if __name__ == "__main__":
    what, number_, flag_file, *others_ = sys.argv[1:]
    WHAT[what](int(number_), Path(flag_file))
    sys.exit(cli.main(others_))
