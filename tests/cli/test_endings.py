"""How the command ends, with which status, and what it shows meanwhile."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitfast
from bitfast import cli
from bitfast.commands import classify
from tests.cli.common import (
    BAD,
    GOOD,
    Run,
    lines_of_json,
    save_model,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["classify"], "required: IMAGE"),
        (
            ["classify", "x.png", "--top-k", "0"],
            "--top-k: must be an integer of at least 1, got '0'",
        ),
        (["classify", "x.png", "--batch-size", "-3"], "--batch-size: must be an integer of at"),
        (["classify", "x.png", "--batch-size", "two"], "got 'two'"),
        (["classify", "x.png", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["classify", "x.png", "--device", "abacus"], "the device 'abacus' cannot be used"),
        (["classify", "x.png", "--device", "meta"], "the device 'meta' cannot be used"),
        (["classify", "x.png", "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["demo", "--threads", "0"], "--threads: must be an integer of at least 1"),
        (["paint"], "invalid choice: 'paint'"),
    ],
    ids=str,
)
def test_usage_errors(run: Run, arguments: list[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "wrong",
    [
        "classify",
        "classify x.png --topk",
        "classify x.png --topk 3",
        "classify x.png --top-k",
        "classify x.png --top-k many",
        "classify x.png --device abacus",
        "convert a",
        "convert a b c",
        "convert a b --dtipe float32",
        "demo now",
        "demo --threads",
        "env --jason",
        "bench --fast",
        "bench --rounds",
    ],
)
def test_wrong_arguments_show_the_usage_of_their_command(run: Run, wrong: str) -> None:
    command = wrong.split()[0]
    status, out, err = run(*wrong.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: bitfast {command} [-h]")
    assert f"bitfast {command}: error: " in err


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")


def change_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "embedding_size": 16}))


def remove_labels(folder: Path) -> None:
    save_model(folder, id2label={})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_weights, "model.safetensors"),
        (remove_processor, "contains no file preprocessor_config.json"),
        (break_config, "config.json is not a readable JSON file"),
        (break_weights, "model.safetensors"),
        (change_shape, "shape"),
        (remove_labels, "it has no labels"),
    ],
)
def test_models_that_cannot_be_loaded(
    tmp_path: Path, photo: Path, run: Run, damage: Callable[[Path], None], said: str
) -> None:
    folder = save_model(tmp_path / "model")
    damage(folder)
    status, out, err = run("classify", photo, "--model", folder)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"bitfast: error: the model '{folder}' cannot be loaded: ")
    assert said in err


def test_interrupt(model: Path, photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classify, "read_image", interrupt)
    assert run("classify", photo, "--model", model) == (130, "", "bitfast: interrupted\n")


def bitfast_process(*arguments: Any, module: str = "bitfast", **options: Any) -> Any:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_as_a_module(model: Path, photo: Path) -> None:
    process = bitfast_process(
        "classify", photo, "nowhere", "--model", model, "--json", module="bitfast.cli"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    good, bad = lines_of_json(out.decode())
    assert good["path"] == str(photo)
    assert bad == {"path": "nowhere", "error": "no such file or folder"}
    assert b"1 classified, 1 failed" in err


def test_closed_pipe(model: Path, photo: Path) -> None:
    # A file name outside ASCII, on a terminal that has nothing else, ends nothing either.
    umlaut = photo.with_name("Möwe.png")
    photo.rename(umlaut)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ["classify", umlaut, photo.parent / "*.png", "--batch-size", 1, "--model", model]
    process = bitfast_process(*arguments, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == cli.PIPE_CLOSED
    process.stderr.close()


def test_a_pipe_that_closes_after_the_first_batch(
    model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipe(io.StringIO):
        def flush(self) -> None:
            if self.getvalue():
                raise BrokenPipeError

        def fileno(self) -> int:
            raise io.UnsupportedOperation

    out, err = Pipe(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    paths = [str(corpus / name) for name in GOOD]
    status = cli.main(["classify", *paths, "--model", str(model), "--json", "--batch-size", "2"])
    assert status == cli.PIPE_CLOSED
    assert len(lines_of_json(out.getvalue())) == 2
    assert err.getvalue() == ""


# ---- progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(
    model: Path, corpus: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = run("classify", corpus, "--model", model, "--json", "--batch-size", 2)
    assert status == 1
    assert len(lines_of_json(out)) == len(GOOD) + len(BAD)
    assert f"/{len(GOOD) + len(BAD)} [" in terminal.getvalue()
    assert f"{corpus / 'text.png'}: {BAD['text.png']}\n" in terminal.getvalue()
    last = terminal.getvalue().rpartition("\r")[2]
    assert last.startswith(f"{len(GOOD)} classified")


def test_no_progress_without_tqdm(
    model: Path, photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, _ = run("classify", photo, "--model", model)
    assert status == 0
    assert terminal.getvalue().startswith("1 classified")


def test_no_progress_off_a_terminal(model: Path, photo: Path, run: Run) -> None:
    _, _, err = run("classify", photo, "--model", model)
    assert "\r" not in err


# ---- help ---------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"bitfast {bitfast.__version__}\n", "")


@pytest.mark.parametrize("command", ["classify", "demo", "env"])
def test_help(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: bitfast {command}")
    _, out, _ = run("--help")
    assert command in out
