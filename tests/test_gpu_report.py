"""``make gpu-report``: its steps, with a Python that only seems to be one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = (
    *(
        "install",
        "build",
        "environment",
        "tests-unproved",
        "bench-unproved",
        "tilings",
        "bench",
        "host",
        "tests",
    ),
    *("memcheck-checks", "racecheck-checks", "memcheck", "racecheck"),
)
PYTHON = """\
#!/bin/sh
case "$*" in
*build_ext*) echo out of order; exit 3 ;;
*bench.run*)
    output=$(echo "$*" | sed 's/.*--output \\([^ ]*\\).*/\\1/')
    echo '{"rows": []}' > "$output"
    exec sleep "$SLEEP"
    ;;
esac
echo "ran $*"
"""
SANITIZER = """\
#!/bin/sh
echo "watched: $*"
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def report(folder: Path, **variables: str) -> tuple[int, list[str], str]:
    """Run the script; return its exit status, the lines of its summary and its log."""
    tools = folder / "tools"
    tools.mkdir()
    script(tools / "compute-sanitizer", SANITIZER)
    variables = {
        "PYTHON": str(script(folder / "python", PYTHON)), "SLEEP": "0",
        "PATH": f"{tools}:/usr/local/bin:/usr/bin:/bin", **variables,
    }  # fmt: skip
    command = [ROOT / "bench/gpu_report.sh", folder / "out"]
    finished = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    summary = finished.stdout.rpartition("\n\n")[2].splitlines()
    return finished.returncode, summary, (folder / "out/log.txt").read_text()


def test_a_failing_step_leaves_the_others_alone(tmp_path: Path) -> None:
    status, summary, log = report(tmp_path)
    assert status == 1
    assert [line.partition(":")[0] for line in summary] == list(STEPS)
    ended = {line.partition(":")[0]: line for line in summary}
    assert "failed (3)" in ended["build"]
    assert "out of order" in ended["build"]
    assert all(": done after" in ended[name] for name in STEPS if name != "build"), summary
    assert all((tmp_path / f"out/{name}.json").exists() for name in ("report", "norm_convolution"))
    assert "===== build: " in log
    assert "env --check" in log
    commands = " ".join(line for line in log.splitlines() if line.startswith("====="))
    words = [word.removeprefix("--ignore=") for word in commands.split()]
    named = {word for word in words if word.startswith("tests/")}
    assert {"tests/gpu", "tests/test_group_norm_act_kernels.py"} <= named
    assert all((ROOT / path).exists() for path in named), named
    assert log.rstrip().endswith("\n".join(summary))


@pytest.mark.parametrize(
    ("sleep", "seconds", "words"), [("60", "-89", "out of time"), ("0", "0", "done")]
)
def test_a_step_that_hangs_is_ended(tmp_path: Path, sleep: str, seconds: str, words: str) -> None:
    # The script adds 90 seconds.
    status, summary, _ = report(tmp_path, ONLY="bench", SECONDS_OF_BENCH=seconds, SLEEP=sleep)
    assert [line.partition(" after")[0] for line in summary] == [f"bench: {words}"]
    assert status == (words != "done")


def test_it_needs_a_folder() -> None:
    finished = subprocess.run(
        [ROOT / "bench/gpu_report.sh"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "usage:" in finished.stderr
