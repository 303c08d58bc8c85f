"""Several processes compute what one does, at the same batch, to rounding; none of them hangs."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitfast.finetuning.checkpoint import read_progress
from bitfast.finetuning.errors import PeerLost, UsageError
from bitfast.finetuning.processes import Processes
from tests.finetuning.runs import (
    PATIENCE,
    arguments,
    interrupted_after,
    names_in,
    process,
    rows,
    run,
    wait_until,
)

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def assert_close(folder: Path, expected: Path) -> None:
    """Two runs have the same metrics and weights, but for rounding."""
    found = rows(folder)
    assert len(found) == len(rows(expected))
    for row, wanted in zip(found, rows(expected), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    weights, wanted = (load_file(path / "model.safetensors") for path in (folder, expected))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@contextlib.contextmanager
def two_processes(*command: Any) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two processes as torchrun does, but without it: nobody ends one because of the other."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(process(*command, RANK=rank, LOCAL_RANK=rank, **shared))
            for rank in ("0", "1")
        ]


def test_both_stop_after_the_same_step_if_one_is_told_to(images, base, whole, tmp_path) -> None:
    """They agree in the step after. Then one process goes on alone."""
    folder, flag = tmp_path / "run", tmp_path / "flag"
    here = ("-m", "tests.finetuning.runs", "update", 3, flag, *arguments(images, folder, base))
    with two_processes(*here) as (first, second):
        wait_until(flag.exists, second)
        second.send_signal(signal.SIGTERM)
        endings = [each.communicate(timeout=PATIENCE) for each in (first, second)]
    assert [first.returncode, second.returncode] == [143, 143], endings
    progress = read_progress(folder)
    assert progress is not None
    assert progress.step == 4  # the step in which they agree
    assert run(images, folder, base) == 0
    assert_close(folder, whole)


def test_torchrun_goes_on_from_one_process(images, base, whole, tmp_path) -> None:
    """It begins with an evaluation, of which each process has a part."""
    folder, digest = tmp_path / "run", tmp_path / "digest"
    with interrupted_after(4):
        assert run(images, folder, base) == 130
    here = (*TORCHRUN, "--master-port", free_port(), "-m", "tests.finetuning.runs", "digest", 0)
    with process(*here, digest, *arguments(images, folder, base)) as started:
        out, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == 0, err
    assert out.count("Wrote ") == 1
    assert_close(folder, whole)
    digests = [(tmp_path / f"digest-{rank}").read_text() for rank in range(2)]
    assert digests[0] == digests[1]


def test_an_error_of_one_process_ends_both(images, base, tmp_path) -> None:
    folder = tmp_path / "run"
    here = ("-m", "tests.finetuning.runs", "fail", 2, tmp_path / "flag")
    with two_processes(*here, *arguments(images, folder, base)) as (first, second):
        errors = [each.communicate(timeout=PATIENCE)[1] for each in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1], errors
    assert "bitfast: error: out of luck" in errors[1]
    assert "Traceback" not in "".join(errors)
    assert names_in(folder) == {"checkpoint.safetensors", "metrics.jsonl"}


class OneOfTwo(Processes):
    """This process and another one, which has this to say."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.__dict__["said"] = b""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        content = torch.tensor(list(self.__dict__["said"]), dtype=torch.uint8)
        values[1 - self.rank, : len(content)] += content
        return values


def test_what_fails_in_one_process_fails_in_both() -> None:
    def fail() -> None:
        raise UsageError("no such file: Möwe")

    first, second = (OneOfTwo(torch.device("cpu"), rank, 2) for rank in range(2))
    assert first.together(lambda: 5) == 5
    with pytest.raises(UsageError, match=r"^no such file: Möwe$"):
        first.together(fail)
    with pytest.raises(PeerLost):
        second.together(fail)
    for each in (first, second):
        each.__dict__["said"] = b"no memory"
    with pytest.raises(UsageError, match=r"^process 1: no memory$"):
        first.together(lambda: 5)
    with pytest.raises(PeerLost):
        second.together(lambda: 5)
