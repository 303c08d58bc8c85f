"""The comparison of ways to cut a fused convolution: the kernels are emulated, and the times invented."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfast.bench import norm_convolution_tilings as bench
from bitfast.bench.isolated import LostError, OtherProcess
from bitfast.bench.norm_convolution_problems import Cut, Fused, Layer
from bitfast.bench.norm_convolution_tilings import Answers, Limited, Question, Shape, Ways, measured
from bitfast.bench.rows import EVERYBODY, FAILED, SKIPPED, TIMED, Report, Row
from bitfast.ops import native_cuda
from bitfast.ops.norm_convolution_fused import TILINGS
from tests.norm_convolution_kernels import Kernels

NARROW, WIDE, THREE = Layer(64, 9, 64), Layer(64, 9, 128, adds=True), Layer(64, 7, 64, 3)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated ones; each time that is asked for is a microsecond more than the one before."""
    library = Kernels()
    monkeypatch.setattr(native_cuda, "library", lambda: library)
    monkeypatch.setattr("bitfast.bench.norm_convolution_problems.GROUPS", 8)
    monkeypatch.setattr("bitfast.bench.op_problems.GROUPS", 8)
    microseconds = count(10)
    samples = lambda calls: [1e-6 * next(microseconds)] * 3  # noqa: E731
    monkeypatch.setattr("bitfast.bench.cases.kernel_samples", samples)


class Here:
    """Answers in this process, and loses what it is told to lose."""

    def __init__(self, lost: Cut | None = None) -> None:
        self.answers, self.lost = Answers("cpu"), lost
        self.questions: list[Question] = []

    def ask(self, question: Question, seconds: float | None) -> Any:
        assert seconds
        self.questions.append(question)
        if question.tiling is not None and question.tiling == self.lost:
            raise LostError("no answer after 20 s")
        return self.answers(question)


def test_every_way_to_cut_is_checked_and_timed(kernels: None) -> None:
    ways = Answers("cpu")(Question(Shape(WIDE, 2)))
    assert isinstance(ways, Ways)
    assert ways.cycles[ways.chosen] == min(ways.cycles.values())
    (found,) = measured([Shape(WIDE, 2)], Limited(Here()))
    assert len(found) == len(TILINGS) == 16  # a small 1x1 convolution can be cut in each way
    assert len({row.contestant for row in found}) == 16
    assert {row.note for row in found if row.status == FAILED} == set()
    assert [row.note for row in found] == ["chosen", *[""] * 15]
    cycles = [row.predicted_cycles or 0 for row in found]
    assert cycles == sorted(cycles)
    assert [row.ratio for row in found] == pytest.approx([10 / n for n in range(10, 26)])
    assert all(row.bytes == WIDE.bytes(2, torch.bfloat16) for row in found)


def test_ways_that_do_not_fit_are_left_out(kernels: None) -> None:
    (found,) = measured([Shape(THREE, 1)], Limited(Here()))
    assert 3 < len(found) < 16
    assert {row.status for row in found} == {TIMED}


def test_a_way_that_is_wrong_is_not_timed(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (128, 0, 0, 2, 2)
    call = Fused.__call__

    def spoil(self: Fused) -> list[torch.Tensor]:
        results = call(self)
        tiling = self.prepared.launch.tiling
        if (tiling.columns, tiling.cluster) == (wrong[0], wrong[3]):
            results[0][1, 5].zero_()
        return results

    monkeypatch.setattr(Fused, "__call__", spoil)
    (found,) = measured([Shape(NARROW, 2)], Limited(Here()))
    failed = [row for row in found if row.status == FAILED]
    assert [row.contestant for row in failed] == [f"bitfast, {bench.words_of(wrong)}"]
    assert failed[0].note
    assert failed[0].seconds is None


def test_a_way_that_hangs_loses_itself_alone(kernels: None) -> None:
    process = Here(lost=(64, 0, 0, 2, 1))
    first, second = measured([Shape(NARROW, 2), Shape(WIDE, 1)], Limited(process))
    lost = [next(row for row in found if row.status != TIMED) for found in (first, second)]
    assert [row.status for row in lost] == [FAILED, SKIPPED]
    assert lost[0].note == "no answer after 20 s"
    assert sum(question.tiling == process.lost for question in process.questions) == 1
    for found in (first, second):
        assert sum(row.status == TIMED for row in found) == len(found) - 1


def test_nothing_is_begun_when_time_is_over(kernels: None) -> None:
    times = count()
    first, second = measured(
        [Shape(NARROW, 2), Shape(WIDE, 2)], Limited(Here(), 4, lambda: next(times))
    )
    assert [row.status for row in first[:5]] == [TIMED] * 4 + [SKIPPED]
    assert [(row.contestant, row.status) for row in second] == [(EVERYBODY, SKIPPED)]


def test_the_inputs_of_a_shape_are_drawn_once(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = bench.drawn_sets
    monkeypatch.setattr(
        bench, "drawn_sets", lambda layer, *rest: drawn.append(layer) or draw(layer, *rest)
    )
    list(measured([Shape(NARROW, 1), Shape(WIDE, 1)], Limited(Here())))
    assert drawn == [NARROW, WIDE]


# ---- what is told -------------------------------------------------------------------------------------------


def rows_of(case: str, times: list[float | None]) -> list[Row]:
    about = ("op", bench.OP, case, "cuda", 0)
    found: list[Row] = []
    for number, (tiling, seconds) in enumerate(zip(TILINGS, times, strict=False)):
        row = Row(*about, f"bitfast, {bench.words_of(tiling)}", "bfloat16", seconds=seconds,
                  predicted_cycles=1000.0 * (number + 1))  # fmt: skip
        if seconds is None:
            row = replace(row, status=FAILED, note="no answer after 20 s")
        found.append(bench.with_ratio(row, found))
    return found


def test_a_line_tells_the_chosen_and_the_fastest() -> None:
    first, second, third = (rows_of("a", [2e-5, 1e-5, 4e-5]), rows_of("b", [1e-5, None]),
                            rows_of("c", [None, 1e-5]))  # fmt: skip
    report = Report({}, rows=[*first, *second, *third, replace(first[0], case="d", status=SKIPPED,
                    seconds=None, contestant=EVERYBODY, note="out of time")])  # fmt: skip
    lines = bench.markdown(report).splitlines()[2:]
    loaded, by_pairs, wider = (
        f"64 channels, {pixels} pixels, shared, weights {weights}"
        for pixels, weights in ((64, "loaded"), (64, "by pairs"), (128, "loaded"))
    )
    assert lines[0] == (
        f"| a | {loaded} | 20 us | 1 kcycles | {by_pairs} | 10 us | 2.00x |"
        f" {by_pairs}: 0.50 (2.00); {wider}: 2.00 (3.00) |"
    )
    assert "by pairs: failed, no answer after 20 s" in lines[1]
    assert lines[2].startswith(f"| c | {loaded} | failed |")
    assert "out of time" in lines[3]
    assert bench.summary(report) == (
        "in 2 shapes the chosen way takes 1.41 times as long as the fastest, at worst 2.00 times: a"
    )
    assert bench.summary(Report({})) == "nothing was timed"


def test_it_is_written_as_json(tmp_path: Path) -> None:
    report = Report({}, rows=rows_of("a", [2e-5, 1e-5]))
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json").rows == report.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert capsys.readouterr().out == "nothing is timed: torch sees no CUDA device\n"


# ---- the whole command, and the other process ---------------------------------------------------------------


@pytest.fixture
def here(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command measure two shapes in this process."""

    class Process(Here):
        def __init__(self, answers: Answers) -> None:
            super().__init__()

        def close(self) -> None:
            pass

    monkeypatch.setattr(bench, "OtherProcess", Process)
    monkeypatch.setattr(bench, "LAYERS", (NARROW, THREE))
    monkeypatch.setattr(bench, "TELLING", (THREE,))
    monkeypatch.setattr(bench, "require_kernels", lambda: None)
    monkeypatch.setattr(bench.rows, "machine", lambda device: {"versions": {}})


def test_the_command(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, text = tmp_path / "tilings.json", tmp_path / "tilings.md"
    words = ["--batches", "2", "--output", str(output), "--markdown", str(text)]
    assert bench.main(words) == 0
    printed = capsys.readouterr().out
    assert text.read_text() in printed
    assert printed.splitlines()[-1].startswith("in 2 shapes the chosen way takes")
    cases = [row.case for row in Report.read(output).rows]
    assert list(dict.fromkeys(cases)) == [Shape(layer, 2).case().name for layer in (THREE, NARROW)]
    assert bench.main(["--quick", "--batches", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("in 1 shapes")


def answer_or_die(kept: list[int], question: int) -> tuple[int, int]:
    """Answer with how many questions came before, and this process."""
    if question < 0:
        os._exit(3)
    kept.append(question)
    return len(kept), os.getpid()


def test_the_other_process_keeps_what_it_has_drawn_until_it_dies() -> None:
    process = OtherProcess(answer_or_die, [])
    try:
        first, second = process.ask(1, 30.0), process.ask(1, 30.0)
        assert first[1] == second[1] != os.getpid()
        assert (first[0], second[0]) == (1, 2)
        with pytest.raises(LostError, match="died, exit status 3"):
            process.ask(-1, 30.0)
        assert process.ask(1, 30.0)[0] == 1
    finally:
        process.close()
