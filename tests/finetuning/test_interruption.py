"""A run that is interrupted goes on where it was, and ends with the same bits as one that is not."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from bitfast.finetuning import checkpoint, metrics, training
from bitfast.finetuning.checkpoint import CHECKPOINT_NAME, read_progress
from tests.finetuning.runs import (
    PATIENCE,
    STEPS,
    arguments,
    assert_same_result,
    interrupted_after,
    names_in,
    process,
    rows,
    run,
    wait_until,
)

UNFINISHED = {CHECKPOINT_NAME, "metrics.jsonl"}


def step_of(folder: Path) -> int:
    progress = read_progress(folder)
    assert progress is not None
    return progress.step


def test_an_interrupt_from_the_terminal(images, base, whole, tmp_path) -> None:
    folder, flag = tmp_path / "run", tmp_path / "flag"
    number = random.randint(1, STEPS - 1)
    command = arguments(images, folder, base)
    with process("-m", "tests.finetuning.runs", "update", number, flag, *command) as started:
        wait_until(flag.exists, started)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"bitfast: interrupted after step {number} of {STEPS}; the same command goes on from there"
    )
    assert step_of(folder) == number
    assert names_in(folder) == UNFINISHED
    assert rows(folder) == rows(whole)[: len(rows(folder))]
    assert run(images, folder, base) == 0
    assert_same_result(folder, whole)


def test_mixed_images_in_bfloat16_from_workers(images, base, tmp_path) -> None:
    """What is drawn, and what autocast keeps, does not depend on where a run began."""
    number = random.randint(1, STEPS - 1)
    options = ("--mixup", 0.3, "--dtype", "bfloat16", "--workers", 1)
    assert run(images, tmp_path / "whole", base, *options) == 0
    with interrupted_after(number):
        assert run(images, tmp_path / "run", base, *options) == 130
    assert step_of(tmp_path / "run") == number
    assert run(images, tmp_path / "run", base, *options) == 0
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_process_that_is_killed_while_it_writes(images, base, whole, tmp_path) -> None:
    folder, flag = tmp_path / "run", tmp_path / "flag"
    number = random.randint(2, 4)  # the first one is that of the beginning
    command = arguments(images, folder, base, "--checkpoint-every", 1)
    with process("-m", "tests.finetuning.runs", "checkpoint", number, flag, *command) as started:
        wait_until(flag.exists, started)
        started.kill()
        started.communicate(timeout=PATIENCE)
    assert step_of(folder) == number - 2
    left = names_in(folder) - UNFINISHED
    assert len(left) == 1, left  # what it was writing
    assert rows(folder)[-1]["step"] == number - 1  # a step more than the checkpoint knows of
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": ')  # a line that was cut off
    assert run(images, folder, base, "--checkpoint-every", 1) == 0
    assert_same_result(folder, whole)


def test_a_disk_that_is_full(images, base, whole, tmp_path, capsys) -> None:
    """Files may not be larger than the checkpoint of the beginning, which has no momentum yet."""
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 3 * (whole / "model.safetensors").stat().st_size // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        assert run(images, folder, base, "--checkpoint-every", 3) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert "bitfast: error: cannot write" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert names_in(folder) == UNFINISHED
    assert step_of(folder) == 0
    assert run(images, folder, base, "--checkpoint-every", 3) == 0
    assert_same_result(folder, whole)


@pytest.mark.parametrize("fails", ["metrics", "checkpoint", "result"])
def test_no_space_left(
    fails: str, images, base, whole, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time, the last checkpoint stays, and the run goes on from it."""
    folder = tmp_path / "run"
    calls, allowed = 0, {"metrics": 4, "checkpoint": 2, "result": 0}[fails]

    def fail(original: Any) -> Any:
        def write(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError(28, "No space left on device")
            return original(*given, **named)

        return write

    with monkeypatch.context() as patch:
        if fails == "metrics":
            patch.setattr(metrics.MetricsLog, "add", fail(metrics.MetricsLog.add))
        elif fails == "checkpoint":
            patch.setattr(checkpoint, "write_safetensors", fail(checkpoint.write_safetensors))
        else:
            patch.setattr("bitfast.finetuning.charts.Figure.savefig", fail(None))
        assert run(images, folder, base, "--checkpoint-every", 2) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert names_in(folder) == UNFINISHED
    assert step_of(folder) == {"metrics": 2, "checkpoint": 2, "result": STEPS}[fails]
    assert run(images, folder, base, "--checkpoint-every", 2) == 0
    assert_same_result(folder, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_an_evaluation(
    number: int, status: int, images, base, whole, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for; the run that goes on makes it."""
    folder = tmp_path / "run"
    evaluate = training.evaluate

    def evaluate_with_signal(*given: Any) -> Any:
        os.kill(os.getpid(), number)
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate_with_signal)
        assert run(images, folder, base) == status
    assert step_of(folder) == 2
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert run(images, folder, base) == 0
    assert_same_result(folder, whole)


def test_a_second_interrupt_does_not_wait(
    images, base, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    update = training.Trainer.update

    def update_with_signals(self: Any, step: int) -> None:
        update(self, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "update", update_with_signals)
    assert run(images, folder, base, "--checkpoint-every", 1) == 130
    assert capsys.readouterr().err.endswith("bitfast: interrupted\n")
    assert step_of(folder) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
