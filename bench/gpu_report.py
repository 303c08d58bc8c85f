"""``make gpu-report OUT=<folder>``: everything that is to be learnt on a machine with a GPU, in one command.

It builds the extension, proves every kernel, measures the kernels and whole models beside the peers that are
installed, runs the GPU tests and the sanitizer, and leaves report.json, report.md, plots and log.txt, in eight
minutes. Each part is a process with a time limit of its own (``gpu_plan`` says which, in what order); one that
fails, crashes or hangs is recorded, and the others still run. The exit status is 1 if anything failed.

This file needs nothing but Python: what is broken on the machine shall break a part, not the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

from .gpu_plan import ROOT, SECONDS, SMOKE_PATIENCE, Part, Plan
from .gpu_summary import add_ratios, draw_plots, markdown, short_table, targets

GRACE = 3.0
"""Seconds that an interrupted part has to write what it knows."""

NOTHING_BEGINS = 12.0
"""Seconds before the end in which no part is started."""


@dataclass
class Running:
    """A part that was started."""

    part: Part
    process: subprocess.Popen[bytes]
    output: Path
    began: float
    ends: float
    is_late: bool = False


# ---- running it -----------------------------------------------------------------------------------


class Runner:
    """Runs parts, and keeps how they ended and the rows that they left."""

    def __init__(self, options: argparse.Namespace, folder: Path, log: TextIO) -> None:
        self.options = options
        self.folder = folder
        self.log = log
        self.ends = time.monotonic() + options.seconds
        self.parts: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def run(self, group: list[Part]) -> None:
        """Run the parts of one group side by side."""
        started = []
        for part in group:
            if part.instead_of and not self.has_failed(part.instead_of):
                continue
            left = self.ends - time.monotonic()
            if not part.skipped and left < NOTHING_BEGINS:
                part.skipped = "the report is out of time"
            if part.skipped:
                self.ended(part, "skipped", 0.0, part.skipped)
            else:
                started.append(self.start(part, min(part.seconds, left - GRACE)))
        while started:
            for running in [r for r in started if self.has_ended(r)]:
                started.remove(running)
                self.finish(running)
            time.sleep(0.1)

    def start(self, part: Part, seconds: float) -> Running:
        """Start a part, in a process group of its own."""
        command = part.command
        if part.rows is not None and "--part" in command:
            # It should end by itself: what began must be able to end within the limit.
            command = [*command, "--seconds", f"{0.8 * seconds:.0f}"]
        output = self.folder / f"{part.name}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=self.environment(part),
                start_new_session=True,
            )
        now = time.monotonic()
        print(f"{part.name}: started, {seconds:.0f} s at most", flush=True)
        return Running(part, process, output, now, now + seconds)

    def environment(self, part: Part) -> dict[str, str]:
        """Return the variables of a part; kernels are interpreted only in a smoke run on the CPU."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        environment.pop("TRITON_INTERPRET", None)
        if self.options.device == "cpu" and importlib.util.find_spec("triton") is not None:
            environment["TRITON_INTERPRET"] = "1"
        if self.options.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # the sizes are tiny
        return environment

    def has_ended(self, running: Running) -> bool:
        """Say whether a part has ended; interrupt it at its limit, and end it soon after."""
        process, now = running.process, time.monotonic()
        if process.poll() is not None:
            return True
        if now > running.ends and not running.is_late:
            running.is_late = True
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
        if now > running.ends + GRACE:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.poll() is not None

    def finish(self, running: Running) -> None:
        """Note how a part ended, and the rows that it left."""
        part, process, is_late = running.part, running.process, running.is_late
        seconds = time.monotonic() - running.began
        text = running.output.read_text(errors="replace")
        self.log.write(f"\n===== {part.name}: {' '.join(part.command)}\n{text}")
        self.log.flush()
        self.rows += rows_in(part)
        if is_late:
            status = "out of time" if part.is_optional else "timed out"
        else:
            status = "done" if process.returncode == 0 else "failed"
        problem = "" if status == "done" else "\n".join(text.strip().splitlines()[-12:])[-2500:]
        if status == "failed":
            problem += f"\nexit status {process.returncode}"
        said = (text.strip().splitlines() or [""])[-1]
        is_telling = part.name.startswith(
            ("tests", "sanitizer", "proof")
        )  # of others the rows say more
        self.ended(part, status, seconds, problem, said[:160] if is_telling else "")

    def ended(
        self, part: Part, status: str, seconds: float, problem: str, last_words: str = ""
    ) -> None:
        """Note how a part ended."""
        self.parts.append(
            {
                "part": part.name,
                "status": status,
                "seconds": seconds,
                "problem": problem,
                "last_words": problem if status == "skipped" else last_words,
            }
        )
        print(f"{part.name}: {status} after {seconds:.0f} s", flush=True)

    def has_failed(self, name: str) -> bool:
        """Say whether the part of this name has failed; one that ran out of time leaves none to others."""
        return any(part["part"] == name and part["status"] == "failed" for part in self.parts)

    def succeeded(self) -> bool:
        """Say whether nothing failed."""
        fine = {"done", "skipped", "out of time"}
        return all(part["status"] in fine for part in self.parts) and not any(
            row["status"] == "failed" for row in self.rows
        )


def rows_in(part: Part) -> list[dict[str, Any]]:
    """Return the rows that a part left, also one that did not get to its end."""
    if part.junit is not None and part.junit.exists():
        return test_rows(part.name, part.junit)
    if part.rows is None or not part.rows.exists():
        return []
    rows = []
    for line in part.rows.read_text().splitlines():
        try:
            rows.append({**json.loads(line), "part": part.name})
        except json.JSONDecodeError:  # cut off in the middle
            continue
    return rows


def test_rows(part: str, junit: Path) -> list[dict[str, Any]]:
    """Return a row for each test file, and one for each test that failed."""
    counts: dict[str, dict[str, int]] = {}
    failures = []
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("classname", "") or case.get("name", "")
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = found[0].tag if found else "passed"
        outcome = "failed" if outcome in ("failure", "error") else outcome
        counts.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})[outcome] += 1
        if outcome == "failed":
            message = (found[0].text or found[0].get("message") or "").strip()
            failures.append((f"{name}::{case.get('name')}", "\n".join(message.splitlines()[-6:])))
    rows = []
    for name, count in counts.items():
        note = ", ".join(f"{n} {outcome}" for outcome, n in count.items())
        rows.append(test_row(part, name, "checked", note[:600]))
    return rows + [test_row(part, name, "failed", note[-1500:]) for name, note in failures]


def test_row(part: str, case: str, status: str, note: str) -> dict[str, Any]:
    """Return a row without a time."""
    empty = dict.fromkeys(("seconds", "spread", "ratio", "fraction_of_floor", "check"))
    return {
        "part": part, "case": case, "contestant": "pytest", "status": status, **empty,
        "device": "", "smoke": False, "note": note,
    }  # fmt: skip


# ---- the report -----------------------------------------------------------------------------------


def report_of(runner: Runner, output: Path) -> dict[str, Any]:
    """Return the report, and draw its plots."""
    options, rows = runner.options, runner.rows
    described = [row["facts"] for row in rows if "facts" in row]
    for row in rows:
        row["smoke"] = options.smoke
    add_ratios(rows)
    names, problem = draw_plots(rows, output)
    return {
        "date": date.today().isoformat(),
        "smoke": options.smoke,
        "succeeded": runner.succeeded(),
        "environment": described[0] if described else None,
        "parts": runner.parts,
        "targets": targets(rows),
        "plots": names,
        "plots_problem": problem,
        "rows": [row for row in rows if "facts" not in row],
    }


def write(report: dict[str, Any], output: Path) -> None:
    """Write report.json and report.md."""
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text(markdown(report))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument("--build", action="store_true", help="build and install in place first")
    parser.add_argument("--only", action="append", default=[], metavar="PART")
    parser.add_argument(
        "--seconds", type=float, help=f"for the whole report; {SECONDS:.0f} by default"
    )
    parser.add_argument("--commit", help="where this is a copy without git's history")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that the report works, no figures"
    )
    # For the tests: these parts fail.
    parser.add_argument("--sabotage", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.smoke:
        parser.error("--device cpu needs --smoke: times from a CPU say nothing about a GPU")
    if options.seconds is None:
        options.seconds = SECONDS * (SMOKE_PATIENCE if options.smoke else 1)
    if options.commit:
        os.environ["BITFAST_COMMIT"] = options.commit
    return options


def main(arguments: list[str] | None = None) -> None:
    """Make the report."""
    options = parse(arguments)
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        (options.output / "log.txt").open("w") as log,
    ):
        runner = Runner(options, Path(folder), log)
        for group in Plan(options, Path(folder)).groups():
            runner.run(group)
            write(report_of(runner, options.output), options.output)
    report = report_of(runner, options.output)
    write(report, options.output)
    print(f"\n{options.output / 'report.md'}\n\n{short_table(report)}")
    if not report["succeeded"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
