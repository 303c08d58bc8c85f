"""``bitfast bench``: its arguments, and a short run from end to end."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from bitfast.bench import contest
from bitfast.bench.rows import FAILED, Report, Row
from tests.cli.common import Run

SHORT = ("bench", "--quick", "--only", "dispatch: same_pad of one pixel, recorded")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "perpetual motion"], "--only: no case's title contains 'perpetual motion'"),
        (["--quick", "--only", "R101x1"], "no case's title contains 'R101x1'"),
        (["--only", "dispatch", "--skip", "same"], "--skip: every case's title contains 'same'"),
        (["--device", "cuda"], "argument --device: torch sees no CUDA device"),
        (["--base", "no-such-commit"], "argument --base: there is no commit 'no-such-commit'"),
        (["--threads", "0"], "--threads: must be an integer of at least 1, got '0'"),
        (["--rounds", "few"], "--rounds: must be an integer of at least 1, got 'few'"),
        (["--output", "/no/such/folder/x.json"], "--output: the folder '/no/such/folder' does not"),
        (["--markdown", "/no/such/folder/x.md"], "--markdown: the folder '/no/such/folder' does"),
    ],
    ids=str,
)
def test_usage_errors(run: Run, arguments: list[str], said: str) -> None:
    status, out, err = run("bench", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_charts_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    status, out, err = run(*SHORT, "--charts", "charts")
    assert (status, out) == (2, "")
    assert "matplotlib is not installed: pip install matplotlib" in err


def test_list(run: Run) -> None:
    status, out, _ = run(
        "bench", "--list", "--only", "inference: R50x1 224x224 batch 1", "--threads", 2, 1
    )
    assert status == 0
    assert out.splitlines() == [
        "inference: R50x1 224x224 batch 1, 1 thread",
        "inference: R50x1 224x224 batch 1, 2 threads",
    ]


def test_what_is_skipped(run: Run) -> None:
    words = "bench", "--list", "--device", "cuda"
    listed, only, without = (
        run(*words, *more)[1].splitlines()
        for more in ([], ["--only", "norm_convolution"], ["--skip", "norm_convolution"])
    )
    assert only
    assert without
    assert sorted(only + without) == sorted(listed)


def test_a_short_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfast.bench.limits.PROBE_SECONDS", 0.02)
    output, table = tmp_path / "report.json", tmp_path / "report.md"
    status, out, err = run(*SHORT, "--output", output, "--markdown", table, "--threads", 1)
    assert status == 0, err
    assert out == table.read_text()
    assert "| dispatch | same_pad of one pixel, recorded by autograd | " in out
    assert "1/1" not in out
    assert "2/2" in err  # the progress bar: the limits, and the case
    report = Report.read(output)
    assert {"bitfast", "python", "torch"} <= set(report.machine["versions"])
    assert {"date", "commit", "cpu"} <= set(report.machine)
    assert set(report.peers) == {"transformers", "timm", "onnxruntime", "openvino", "torchvision"}
    assert [row.contestant for row in report.rows] == ["plain PyTorch", "bitfast"]
    assert {row.threads for row in report.rows} == {1}
    limits = report.limits[1]
    assert limits.flops["float32"] == max(
        rate for name, rate in limits.probes.items() if name.startswith("float32")
    )
    assert limits.bandwidth > 1e8
    assert json.loads(output.read_text())["format"] == 3


def test_a_wrong_result_of_ours_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Any, *_: Any, **__: Any) -> list[Row]:
        note = "error 2: not timed"
        return [
            Row("op", case.op, case.name, "cpu", 1, name, "float32", FAILED, note)
            for name in ("plain PyTorch", "bitfast")
        ]

    from bitfast.bench import limits

    monkeypatch.setattr(contest, "run", wrong)
    monkeypatch.setattr(limits, "measure", lambda device, threads: limits.Limits({}, 1.0))
    monkeypatch.setattr("bitfast.bench.report.limits_lines", lambda report: [])
    status, out, err = run(*SHORT)
    assert status == 1
    assert "| failed | failed |" in out
    assert "bitfast failed: error 2: not timed" in err


def test_no_case_begins_after_the_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfast.bench import limits
    from bitfast.bench import run as command

    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(limits, "measure", lambda device, threads: limits.Limits({}, 1.0))
    monkeypatch.setattr(contest, "run", lambda case, *_, **__: [])
    status, out, _ = run(
        "bench", "--only", "same_pad of one pixel", "--seconds", 150, "--threads", 1
    )
    assert status == 0
    assert "| dispatch | same_pad of one pixel, recorded by autograd | " in out
    assert "| out of time | skipped |" in out


def test_a_case_that_cannot_be_drawn_leaves_the_others_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfast.bench import limits, ops

    def fail(is_recorded: bool) -> Any:
        raise RuntimeError("out of | memory")

    monkeypatch.setattr(ops, "dispatch_problem", fail)
    monkeypatch.setattr(limits, "measure", lambda device, threads: limits.Limits({}, 1.0))
    status, out, err = run(
        "bench", "--only", "same_pad of one pixel", "--rounds", 1, "--threads", 1
    )
    assert status == 1
    assert out.count("| RuntimeError: out of / memory | failed |") == 2
    assert err.count("all failed: RuntimeError: out of | memory") == 2
