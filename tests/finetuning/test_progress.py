"""What is shown while a run is under way, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bitfast.finetuning import progress
from bitfast.finetuning.dataset import Problem
from bitfast.finetuning.progress import Display, duration, problem_lines, scanning
from tests.finetuning.runs import run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 0.5, "accuracy": 0.75, "images_per_second": 123.4}


def test_a_bar_on_a_terminal(images, base, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(images, tmp_path / "run", base) == 0
    shown = terminal.getvalue()
    assert "looking at images" in shown
    assert "/6 [" in shown
    assert "step/s" in shown or "s/step" in shown
    assert "after step 2: validation loss" in shown
    assert "images/s" in shown


def test_lines_now_and_then_elsewhere(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = Display(steps=200, done=100)
    for step in range(101, 201):
        clock[0] += 7
        display.step(row(step))
    display.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 101/200: loss 0.5000, accuracy 75.0 %, 123 images/s, 11:33 left"
    assert lines[1].startswith("step 106/200: ")  # 30 seconds are over
    assert lines[-1] == "step 200/200: loss 0.5000, accuracy 75.0 %, 123 images/s"
    assert len(lines) == 21


def test_looking_at_images(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for is_shown in (True, False):
        with scanning(is_shown) as tell:
            for done in range(1000, 12001, 1000):
                clock[0] += 7
                tell(done, 12000)
    assert capsys.readouterr().err.splitlines() == [
        "looked at 5,000 of 12,000 images",
        "looked at 10,000 of 12,000 images",
    ]


def test_only_one_of_several_processes_shows(capsys) -> None:
    display = Display(steps=2, done=0, is_shown=False)
    display.step(row(1))
    display.say("hello")
    assert capsys.readouterr().err == ""
    problems = [Problem("Möwe\x1b.png", "broken")]
    display.tell_problems(SimpleNamespace(problems=problems))  # its own, nobody else knows
    assert capsys.readouterr().err == "bitfast: left out Möwe\\x1b.png: broken\n"


def test_problems_are_told_once_and_not_all(capsys) -> None:
    source = SimpleNamespace(problems=[])
    display = Display(steps=100, done=0)
    for number in range(25):
        source.problems.append(Problem(f"{number}.png", "broken"))
        if number % 3 == 0:
            display.tell_problems(source)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:10] == [f"bitfast: left out {number}.png: broken" for number in range(10)]
    assert lines[10:] == ["bitfast: more images are left out, which are not named"]
    assert problem_lines([]) == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (7384, "2:03:04")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
