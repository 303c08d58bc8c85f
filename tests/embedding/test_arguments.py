"""What ``bitfast embed`` refuses, and how it says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.common import Run
from tests.embedding.common import files_in


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: --output"),
        (["--output", "out.npy"], "required: IMAGE, or --list"),
        (
            ["x.png", "--output", "out.csv"],
            "--output: must end in .parquet or .npy or .safetensors, got",
        ),
        (["x.png", "--output", "no/where/out.npy"], "--output: there is no folder 'no/where'"),
        (["x.png", "--output", "folder.npy"], "--output: 'folder.npy' is a folder"),
        (["x.png", "--output", "out.npy", "--batch-size", "0"], "--batch-size: must be an integer"),
        (["x.png", "--output", "out.npy", "--workers", "none"], "--workers: must be an integer"),
        (["x.png", "--output", "out.npy", "--store", "bfloat16"], "--store: invalid choice"),
        (["x.png", "--output", "out.npy", "--device", "abacus"], "--device: the device 'abacus'"),
        (["x.png", "--output", "out.npy", "--ray-workers", "2"], "--ray-workers: needs --ray"),
        (
            ["--output", "out.npy", "--ray", "photos"],
            "--ray: ADDRESS must be host:port, auto or local, got",
        ),
        (
            ["x.png", "--output", "out.npy", "--ray", "ray://head:10001"],
            "--ray: ADDRESS must be host:port",
        ),
    ],
    ids=str,
)
def test_usage_errors(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npy").mkdir()
    status, out, err = run("embed", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: bitfast embed [-h]")
    assert said in err
    assert files_in(tmp_path) == ["folder.npy"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["x.png", "--layer", "stage9"],
            "--layer must be one of stage1, stage2, pooled, logits for this",
        ),
        (["--list", "nowhere"], "--list: 'nowhere' cannot be read: No such file or directory"),
        (["--list", "empty"], "--list: 'empty' is empty"),
        (["{0..9999999}.png"], "'{0..9999999}.png' stands for 10000000 names; at most 1000000 are"),
        (["x.png", "--model", "nowhere/at/all"], "the model 'nowhere/at/all' cannot be loaded: "),
        (["x.png", "--ray", "127.0.0.1:1"], "--ray: no cluster at '127.0.0.1:1': "),
    ],
    ids=str,
)
def test_unusable_input(
    tmp_path: Path,
    model: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n\n")
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    status, out, err = run("embed", "--output", "out.npy", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"bitfast: error: {said}")
    assert err.count("\n") == 1
    assert files_in(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "missing", "said"),
    [
        (
            ["out.parquet"],
            "pyarrow",
            "--output FILE.parquet needs pyarrow, not installed here: pip install",
        ),
        (
            ["out.npy", "--ray"],
            "ray",
            "--ray needs ray, not installed here: pip install 'bitfast[ray]'",
        ),
    ],
)
def test_missing_extras(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    missing: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec

    def without_it(name: str, *others: Any) -> Any:
        return None if name == missing else find_spec(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", without_it)
    status, _, err = run("embed", "x.png", "--output", *arguments)
    assert status == 2
    assert err.startswith(f"bitfast: error: bitfast embed {said}")


def test_other_formats_need_no_extra(tmp_path: Path, model: Path, photo: Path) -> None:
    """Neither pyarrow nor Ray is imported for them."""
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'ray', 'tqdm'): sys.modules[name] = None\n"
        "from bitfast import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["embed", photo, "--output", tmp_path / "out.npy", "--model", model]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from bitfast.embedding import arguments\n"
        "sys.exit(any(name in sys.modules for name in ('pyarrow', 'ray', 'bitfast.embedding.embedder')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0
