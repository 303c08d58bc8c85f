"""The GPU report, in its smoke mode: that it runs to its end and says truly what happened."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import gpu_plan, gpu_report, gpu_summary, sanitizer_cases
from bench.gpu_model_runs import FixedBatch
from bench.gpu_timing import Contest, Session, measure

ROOT = Path(__file__).parent.parent
ROW_KEYS = {
    "part", "case", "contestant", "status", "seconds", "spread", "ratio", "fraction_of_floor", "check",
    "device", "smoke", "note",
}  # fmt: skip
STATUSES = {"measured", "checked", "failed", "skipped", "not installed"}


def run_report(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_report", "--output", str(folder), *options]
    return subprocess.run(
        [*command, "--device", "cpu", "--smoke"], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def spoilt(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole smoke run in which one part fails."""
    folder = tmp_path_factory.mktemp("report")
    return folder, run_report(folder, "--sabotage", "ceilings")


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_failing_part_leaves_the_others_alone(spoilt):
    folder, process = spoilt
    assert process.returncode == 1, process.stdout + process.stderr
    report = load(folder)
    assert not report["succeeded"]
    ended = {part["part"]: part for part in report["parts"]}
    assert ended["ceilings"]["status"] == "failed"
    assert "RuntimeError: sabotaged" in ended["ceilings"]["problem"]
    others = {part["status"] for name, part in ended.items() if name != "ceilings"}
    problems = [part for name, part in ended.items() if name != "ceilings" and part["problem"]]
    assert others <= {"done", "skipped"}, problems
    parts = {row["part"] for row in report["rows"]}
    assert {"group_norm_act", "weight_standardization", "same_padding", "dispatch"} <= parts
    assert {"models_eager", "models_compiled", "images"} <= parts
    assert "RuntimeError: sabotaged" in (folder / "report.md").read_text()


def test_rows_have_one_form(spoilt):
    report = load(spoilt[0])
    assert report["smoke"]
    for row in report["rows"]:
        assert row.keys() >= ROW_KEYS
        assert row["status"] in STATUSES
        assert row["smoke"]
        assert row["status"] != "failed", row
        assert (row["seconds"] is not None) == (row["status"] == "measured"), row
        if row["part"] in ("group_norm_act", "weight_standardization", "models_eager"):
            assert row["status"] != "measured" or row["check"] is not None
    ratios = [row["ratio"] for row in report["rows"] if row.get("is_baseline")]
    assert ratios
    assert set(ratios) == {1.0}


def test_peers_that_are_missing_are_listed(spoilt):
    report = load(spoilt[0])
    listed = {row["contestant"] for row in report["rows"] if row["status"] == "not installed"}
    missing = {name for name in ("timm", "torchvision") if importlib.util.find_spec(name) is None}
    assert missing <= listed
    text = (spoilt[0] / "report.md").read_text()
    for name in missing:
        assert name in text


def test_the_table_comes_last_and_states_no_figures(spoilt):
    folder, process = spoilt
    assert process.stdout.rstrip().endswith("| not measured |")
    assert "A smoke run" in process.stdout
    assert "A smoke run" in (folder / "report.md").read_text()
    assert all(target["measured"] is None for target in load(folder)["targets"])
    assert "| ceilings | failed |" in process.stdout


def test_plots_or_why_there_are_none(spoilt):
    report = load(spoilt[0])
    if importlib.util.find_spec("matplotlib") is None:
        assert "No plots" in report["plots_problem"]
    for name in report["plots"]:
        assert (spoilt[0] / name).exists()


def test_all_is_well(tmp_path):
    process = run_report(tmp_path, "--only", "environment", "--only", "same_padding")
    assert process.returncode == 0, process.stdout + process.stderr
    report = load(tmp_path)
    assert report["succeeded"]
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert [part["part"] for part in report["parts"]] == ["environment", "same_padding"]


def test_times_of_a_cpu_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        gpu_report.main(["--output", str(tmp_path), "--device", "cpu"])


# ---- the driver -----------------------------------------------------------------------------------


def runner_for(folder: Path, **options: Any) -> gpu_report.Runner:
    arguments = gpu_report.parse(["--output", str(folder), "--device", "cpu", "--smoke"])
    vars(arguments).update(options)
    return gpu_report.Runner(arguments, folder, (folder / "log.txt").open("w"))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_hangs_is_ended_and_its_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE", 0.5)
    rows = tmp_path / "rows.jsonl"
    row = {"part": "x", "case": "a", "contestant": "b", "status": "measured", "seconds": 1.0}
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    code = (
        f"{deaf}; open({str(rows)!r}, 'w').write({json.dumps(row)!r} + '\\n{{cut'); time.sleep(60)"
    )
    runner = runner_for(tmp_path)
    hanging = gpu_report.Part("hanging", python(code), 2.0, rows=rows)
    optional = gpu_report.Part(
        "optional", python("import time; time.sleep(60)"), 1.0, is_optional=True
    )
    quick = gpu_report.Part("quick", python("print('well')"), 20.0)
    runner.run([hanging, optional, quick])
    ended = {part["part"]: part["status"] for part in runner.parts}
    assert ended == {"hanging": "timed out", "optional": "out of time", "quick": "done"}
    assert [row["part"] for row in runner.rows] == ["hanging"]
    assert max(part["seconds"] for part in runner.parts) < 10
    assert not runner.succeeded()


def test_nothing_begins_when_the_time_is_up(tmp_path):
    runner = runner_for(tmp_path, seconds=1.0)
    runner.run([gpu_report.Part("late", python("pass"), 5.0)])
    assert runner.parts[0]["status"] == "skipped"
    assert "out of time" in runner.parts[0]["problem"]


def test_kernels_are_not_interpreted_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    part = gpu_report.Part("any", [], 1.0)
    assert "TRITON_INTERPRET" not in runner_for(tmp_path, device="cuda").environment(part)
    assert runner_for(tmp_path, device="cpu").environment(part)["TRITON_INTERPRET"] == "1"
    process = subprocess.run(
        [sys.executable, "-m", "bench.gpu_device", "--part", "environment", "--device", "cuda"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 2
    assert "TRITON_INTERPRET is set" in process.stderr


def test_a_part_in_the_place_of_another(tmp_path):
    """With less of the extension, where the whole cannot be built."""
    runner = runner_for(tmp_path)
    fails, works = python("raise SystemExit('no nvcc')"), python("pass")
    runner.run([gpu_report.Part("a", fails, 20.0)])
    runner.run([gpu_report.Part("b", works, 20.0, instead_of="a")])
    runner.run([gpu_report.Part("c", works, 20.0, instead_of="b")])
    assert [(p["part"], p["status"]) for p in runner.parts] == [("a", "failed"), ("b", "done")]
    assert not runner.succeeded()


# ---- the order and the time -----------------------------------------------------------------------

BUILD_ON_THE_H100 = 78.0
"""Seconds, as measured there."""


def plan_for(folder: Path, *options: str) -> list[list[gpu_plan.Part]]:
    arguments = gpu_report.parse(["--output", str(folder), "--build", *options])
    return gpu_plan.Plan(arguments, folder).groups()


def limits(groups: list[list[gpu_plan.Part]]) -> dict[str, tuple[float, float]]:
    """When each part begins at the latest, and is interrupted, if all take as long as they may."""
    begin, times = 0.0, {}
    for group in groups:
        if any(part.instead_of for part in group):
            continue
        times.update({part.name: (begin, begin + part.seconds) for part in group})
        begin += max(part.seconds for part in group) + gpu_report.GRACE
    return times


def test_every_kernel_is_proved_in_two_minutes(tmp_path):
    groups = plan_for(tmp_path)
    times = limits(groups)
    proofs = {name: times[f"proof_{name}"] for name in sanitizer_cases.CASES}
    assert max(proofs[name][1] for name in gpu_plan.TRITON_PROOFS) <= 120
    # The others wait for the extension.
    assert times["build_cuda"][0] == times["proof_weights"][0]
    saved = times["build_cuda"][1] - times["build_cuda"][0] - BUILD_ON_THE_H100
    assert saved > 0
    assert max(end for _, end in proofs.values()) - saved <= 120


def test_each_part_has_its_time_within_eight_minutes(tmp_path):
    groups = plan_for(tmp_path)
    assert gpu_plan.SECONDS <= 480
    parts = [part for group in groups for part in group]
    times = limits(groups)
    must = [times[p.name][1] for p in parts if not p.is_optional and not p.instead_of]
    assert max(must) <= gpu_plan.SECONDS - gpu_report.GRACE
    optional = [part.is_optional for part in parts]
    assert optional == sorted(optional)  # they come last


def test_times_are_taken_one_part_at_a_time_after_the_proofs(tmp_path):
    groups = plan_for(tmp_path)
    times = limits(groups)
    proved = max(times[f"proof_{name}"][1] for name in sanitizer_cases.CASES)
    timed = [group for group in groups if any(part.rows for part in group)]
    names = [[part.name for part in group] for group in timed if group[0].name != "build_cuda"]
    assert all(len(group) == 1 for group in names)
    assert all(times[name][0] >= proved for (name,) in names)
    # The sanitizer and the tests find the kernels compiled, by the proofs and by the same command.
    commands = {part.name: part.command for group in groups for part in group}
    for tool in ("memcheck", "racecheck"):
        assert times[f"sanitizer_{tool}"][0] >= proved
        command = " ".join(commands[f"sanitizer_{tool}"])
        assert f"--tool {tool}" in command
        assert "bench.sanitizer_cases" in command
        assert "--only" not in command


def test_the_tests_run_in_eight_processes(tmp_path, monkeypatch):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    (tests,) = [p for group in plan_for(tmp_path) for p in group if p.name == "tests"]
    assert tests.command[tests.command.index("-n") + 1] == "8"
    assert {"tests/gpu/test_models.py", *gpu_plan.KERNEL_TESTS} <= set(tests.command)


class Clock:
    """Time that passes only where the report waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Sleeper:
    """A process that ends by itself after a while, or when it is told to."""

    def __init__(self, clock: Clock, seconds: float, heeds: int) -> None:
        self.clock, self.ends, self.heeds = clock, clock.now + seconds, heeds
        self.pid, self.returncode = id(self), None

    def poll(self) -> int | None:
        if self.returncode is None and self.clock.now >= self.ends:
            self.returncode = 0
        return self.returncode

    def wait(self) -> None:
        assert self.returncode is not None


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every process runs for an hour; half of them heed an interrupt, the others only what kills."""
    clock = Clock()
    processes: dict[int, Sleeper] = {}

    def popen(*_: Any, **__: Any) -> Sleeper:
        heeds = signal.SIGINT if len(processes) % 2 else signal.SIGKILL
        process = Sleeper(clock, 3600.0, heeds)
        processes[process.pid] = process
        return process

    def killpg(pid: int, number: int) -> None:
        if number in (processes[pid].heeds, signal.SIGKILL):
            processes[pid].returncode = -number

    monkeypatch.setattr(gpu_report.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(gpu_report.time, "sleep", clock.sleep)
    monkeypatch.setattr(gpu_report.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu_report.os, "killpg", killpg)
    return clock


def test_parts_that_all_hang_have_each_had_their_turn(tmp_path, slow, monkeypatch):
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    runner = runner_for(tmp_path, seconds=gpu_plan.SECONDS)
    began = slow.now
    groups = plan_for(tmp_path)
    for group in groups:
        runner.run(group)
    assert slow.now - began <= gpu_plan.SECONDS
    wanted = {part.name: part.seconds for group in groups for part in group}
    ended = {part["part"]: part for part in runner.parts}
    must = [p.name for group in groups for p in group if not p.is_optional and not p.instead_of]
    for name in must:
        assert ended[name]["status"] == "timed out", name
        assert ended[name]["seconds"] >= wanted[name]
    assert not runner.succeeded()


def test_failures_of_tests_become_rows(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", str(test)]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    rows = gpu_report.test_rows("tests", junit)
    assert [row["status"] for row in rows] == ["checked", "failed"]
    assert rows[0]["note"] == "1 passed, 1 failed, 0 skipped"
    assert rows[1]["case"].endswith("test_b")
    assert "assert 1 == 2" in rows[1]["note"]
    assert all(row.keys() >= ROW_KEYS for row in rows)


# ---- checks and targets ---------------------------------------------------------------------------


def test_a_wrong_contestant_is_not_timed(tmp_path):
    rows = tmp_path / "rows.jsonl"
    session = Session("part", "cpu", False, False, rows, float("inf"))
    x = torch.randn(1000)
    contest = Contest(
        "case",
        {"torch": lambda _: x * 2, "bitfast right": lambda _: x + x, "bitfast wrong": lambda _: x * 2.001},
        "torch", lambda: x.double() * 2, 1, 8000, 1e-6, 2**-24,
    )  # fmt: skip
    session.contest(contest)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["status"] for row in found] == ["measured", "measured", "failed"]
    assert "WrongResultError" in found[2]["note"]
    assert session.failures == 1


def test_what_is_left_unwritten_is_seen(tmp_path):
    session = Session("part", "cpu", True, False, tmp_path / "rows", float("inf"))
    x = torch.randn(100)

    def lazy(_: int) -> torch.Tensor:
        result = torch.empty(100).fill_(float("nan"))
        result[:99] = x[:99]
        return result

    session.contest(
        Contest("case", {"torch": lambda _: x, "bitfast": lazy}, "torch", lambda: x, 1, 1, 1.0, 0.1)
    )
    assert session.failures == 1


def test_a_model_of_one_batch_size_serves_others():
    model = nn.Linear(4, 3)
    sizes = []

    def call(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0])
        return model(x.flatten(1))

    fixed = FixedBatch(call, model)
    for batch in (3, 1, 6):
        x = torch.randn(batch, 4, 1, 1)
        torch.testing.assert_close(fixed(x), model(x.flatten(1)))
    assert set(sizes) == {3}


def test_a_time_is_positive():
    sample = measure([lambda: torch.ones(10)], "cpu", 0.01)
    assert sample.seconds > 0
    assert sample.repeats >= 2
    assert not sample.is_captured


def test_targets_are_the_worst_of_what_counts():
    base = {"smoke": False, "part": "group_norm_act", "form": "forward", "dtype": "bfloat16"}
    large, small = "R50x1 inference batch 128 bfloat16", "R50x1 inference batch 1 bfloat16"
    rows: list[dict[str, Any]] = [
        {**base, "case": f"norm {n}", "contestant": who, "seconds": seconds, "exceeds_l2": n < 2,
         "fraction_of_floor": 0.9 / (n + 1), "is_baseline": who != "bitfast"}
        for n in range(3)
        for who, seconds in (("torch eager, channels_last", 4.0), ("bitfast", 1.0 + n))
    ] + [
        {"smoke": False, "part": "models", "case": case, "contestant": who, "seconds": seconds}
        for case, who, seconds in (
            (large, "transformers eager", 9.0),
            (large, "transformers compiled (default mode)", 4.0),
            (large, "transformers compiled (max-autotune)", 3.0),
            (large, "bitfast eager", 2.5),
            (large, "bitfast compiled", 2.0),
            (small, "transformers eager", 5.0),
            (small, "bitfast eager", 3.0),
            (small, "bitfast, CUDA graph", None),
        )
    ]  # fmt: skip
    gpu_summary.add_ratios(rows)
    measured = [target["measured"] for target in gpu_summary.targets(rows)]
    assert measured == [0.45, 2.0, None, 4.5, 1.5, None, None]
    smoke = [{**row, "smoke": True} for row in rows]
    assert all(target["measured"] is None for target in gpu_summary.targets(smoke))
