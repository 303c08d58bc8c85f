"""However ``bitfast embed`` ends, the same command again goes on, to the same bytes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfast.embedding import output as output_module
from bitfast.embedding import pipeline, store
from bitfast.embedding.embedder import Embedder
from bitfast.embedding.store import Store
from tests.cli.common import Run, save_model
from tests.embedding.common import SUFFIXES, files_in, png, save_pictures, save_shard

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """21 images and a broken one."""
    folder = tmp_path / "photos"
    save_pictures(folder, 21)
    (folder / "005.png").write_bytes(b"no image")
    return folder


@pytest.fixture(autouse=True)
def every_batch_is_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_BETWEEN_COMMITS", 0.0)


def words(photos: Path, output: Path, model: Path) -> list[str]:
    return [
        *("embed", str(photos), "--output", str(output), "--model", str(model)),
        *("--batch-size", "2"),
    ]


def contents(output: Path) -> dict[str, bytes]:
    """What was written, by the end of each file's name."""
    return {
        path.name.removeprefix(output.stem): path.read_bytes()
        for path in output.parent.glob(f"{output.stem}.*")
    }


def uninterrupted(photos: Path, output: Path, model: Path, run: Run) -> dict[str, bytes]:
    """What a run comes to that nothing interrupts."""
    whole = output.with_name(f"whole{output.suffix}")
    assert run(*words(photos, whole, model))[0] == 1
    return contents(whole)


DIE_AFTER = """
import os, signal, sys
from bitfast import cli
from bitfast.embedding import command, output, store

store.SECONDS_BETWEEN_COMMITS = 0
where, count = sys.argv[1], int(sys.argv[2])
owner = {"add": store.Store, "replace_files": output, "remove": store.Store}[where]
original = getattr(owner, where)
def call(*arguments):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, where, call)
sys.exit(cli.main(sys.argv[3:]))
"""


def die(where: str, count: int, arguments: list[str]) -> None:
    """Run the command in a process that kills itself at a call, after so many of them."""
    command = [sys.executable, "-c", DIE_AFTER, where, str(count), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_again_and_again(tmp_path: Path, photos: Path, model: Path, run: Run) -> None:
    output = tmp_path / "out.npy"
    arguments = words(photos, output, model)
    some = int(torch.randint(1, 5, ()))
    die("add", some, arguments)
    assert files_in(tmp_path)[:1] == ["out.npy.partial"]
    die("add", some, arguments)
    die("replace_files", 0, arguments)
    assert not output.exists()
    die("remove", 0, arguments)
    assert output.exists()
    status, _, err = run(*arguments)
    assert status == 1
    assert "going on: 21 of 21 images were done" in err
    assert contents(output) == uninterrupted(photos, output, model, run)


def test_killed_while_the_output_is_written(
    tmp_path: Path, photos: Path, model: Path, run: Run
) -> None:
    """What such a process leaves is swept away: a hidden file that nobody would look for."""
    output = tmp_path / "out.npy"
    leftovers = [tmp_path / f".{name}.0123.tmp" for name in ("out.npy", "out.npy.names.json")]
    others = [tmp_path / name for name in (".out.npy.tmp", ".other.npy.0123.tmp")]
    for path in leftovers + others:
        path.touch()
    assert run(*words(photos, output, model))[0] == 1
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def after(count: int, original: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The function, which raises the error instead of the call that comes after so many."""
    calls = iter(range(count))

    def call(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return original(*arguments)

    return call


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_interrupted(
    tmp_path: Path,
    photos: Path,
    model: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    output = tmp_path / f"out{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", after(4, Store.add, KeyboardInterrupt()))
        status, _, err = run(*words(photos, output, model))
        assert status == 130
        assert err == ("bitfast: the same command again goes on from here\nbitfast: interrupted\n")
    embedded: list[int] = []
    original = Embedder.vectors

    def counted(self: Embedder, pixel_values: torch.Tensor) -> torch.Tensor:
        embedded.append(len(pixel_values))
        return original(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "vectors", counted)
        status, _, err = run(*words(photos, output, model))
    assert status == 1
    assert err.startswith("bitfast: going on: 8 of 21 images were done\n20 embedded, 1 failed")
    assert sum(embedded) == 13
    assert contents(output) == uninterrupted(photos, output, model, run)


def test_interrupted_while_the_output_is_written(
    tmp_path: Path, photos: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(output_module.WRITERS, ".npy", after(0, lambda: None, KeyboardInterrupt()))
        status, _, err = run(*words(photos, tmp_path / "out.npy", model))
    assert (status, err) == (
        130,
        "bitfast: the same command again goes on from here\nbitfast: interrupted\n",
    )
    assert files_in(tmp_path) == ["out.npy.partial", "photos"]


# ---- disks --------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(
    tmp_path: Path, photos: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", after(3, Store.add, KeyboardInterrupt()))
        assert run(*words(photos, output, model))[0] == 130
    size = (tmp_path / "out.npy.partial").stat().st_size
    with files_of_at_most(size):
        status, _, err = run(*words(photos, output, model))
    assert status == 2
    assert f"bitfast: error: '{output}.partial' cannot be used: " in err
    status, _, err = run(*words(photos, output, model))
    assert status == 1
    assert "going on: " in err
    assert contents(output) == uninterrupted(photos, output, model, run)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_full_at_the_end(
    tmp_path: Path,
    photos: Path,
    model: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    output = tmp_path / f"out{suffix}"
    original = output_module.WRITERS[suffix]

    def fail(table: output_module.Table, path: Path) -> None:
        original(table, path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setitem(output_module.WRITERS, suffix, fail)  # type: ignore[arg-type]
        status, _, err = run(*words(photos, output, model))
    assert status == 2
    assert f"bitfast: error: '{output}' cannot be written: [Errno 28] No space left" in err
    assert files_in(tmp_path) == [f"out{suffix}.partial", "photos"]
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "vectors", after(0, Embedder.vectors, AssertionError()))
        assert run(*words(photos, output, model))[0] == 1
    assert contents(output) == uninterrupted(photos, output, model, run)


# ---- the same command, or another one -----------------------------------------------------------


@pytest.fixture
def begun(
    tmp_path: Path, photos: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command of a run that was interrupted; its output is ``out.npy``."""
    arguments = words(photos, tmp_path / "out.npy", model)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", after(4, Store.add, KeyboardInterrupt()))
        assert run(*arguments)[0] == 130
    return arguments


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--layer", "stage1"], "--layer pooled then, stage1 now"),
        (["--store", "float16"], "--store float32 then, float16 now"),
        (["--batch-size", "3"], "--batch-size 2 then, 3 now"),
        (["--dtype", "bfloat16"], "--dtype float32 then, bfloat16 now"),
        (["--list", "-"], "the images: 21 ("),
    ],
)
def test_other_settings(
    tmp_path: Path,
    begun: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    other: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("bitfast.embedding.command.read_list", lambda path: ["another.png"])
    before = (tmp_path / "out.npy.partial").read_bytes()
    status, _, err = run(*begun, *other)
    assert status == 2
    assert err.startswith(
        f"bitfast: error: '{tmp_path}/out.npy.partial' holds an unfinished run of other settings: {said}"
    )
    assert err.count(" then, ") >= 1
    assert (tmp_path / "out.npy.partial").read_bytes() == before
    status, _, err = run(*begun, *other, "--overwrite")
    assert status == 1
    assert "going on" not in err
    assert not (tmp_path / "out.npy.partial").exists()


def test_another_model_at_the_same_place(
    tmp_path: Path, photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model")
    arguments = words(photos, tmp_path / "out.npy", model)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", after(4, Store.add, KeyboardInterrupt()))
        assert run(*arguments)[0] == 130
    save_model(model)  # of other random weights
    status, _, err = run(*arguments)
    assert status == 2
    assert "other settings: the weights of --model: " in err


def test_overwriting_goes_on_as_well(tmp_path: Path, begun: list[str], run: Run) -> None:
    """It replaces what is in the way, which results of the same settings are not."""
    status, _, err = run(*begun, "--overwrite")
    assert status == 1
    assert "going on: 8 of 21" in err


def test_the_same_model_by_another_path(
    tmp_path: Path, begun: list[str], model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    status, _, err = run(*begun, "--model", model.name)
    assert status == 1
    assert "going on: 8 of 21" in err


def test_an_output_is_not_overwritten_unasked(
    tmp_path: Path, photos: Path, model: Path, run: Run
) -> None:
    output = tmp_path / "out.npy"
    output.write_bytes(b"something else")
    status, _, err = run(*words(photos, output, model))
    assert (status, err) == (2, f"bitfast: error: '{output}' exists; --overwrite replaces it\n")
    assert files_in(tmp_path) == ["out.npy", "photos"]
    assert output.read_bytes() == b"something else"
    assert run(*words(photos, output, model), "--overwrite")[0] == 1
    assert contents(output) == uninterrupted(photos, output, model, run)
    (photos / "005.png").unlink()
    assert run(*words(photos, output, model), "--overwrite")[0] == 0
    assert not (tmp_path / "out.npy.failed.csv").exists()


def test_an_output_that_came_meanwhile(tmp_path: Path, begun: list[str], run: Run) -> None:
    output = tmp_path / "out.npy"
    output.write_bytes(b"something else")
    status, _, err = run(*begun)
    assert (status, err) == (2, f"bitfast: error: '{output}' exists; --overwrite replaces it\n")


def test_two_at_once(tmp_path: Path, begun: list[str], run: Run) -> None:
    partial = tmp_path / "out.npy.partial"
    with sqlite3.connect(partial) as other:
        other.execute("BEGIN EXCLUSIVE")
        status, _, err = run(*begun)
    other.close()
    assert status == 2
    assert f"'{partial}' cannot be used: another process is writing to it" in err


def test_a_partial_file_of_somebody_else(
    tmp_path: Path, photos: Path, model: Path, run: Run
) -> None:
    partial = tmp_path / "out.npy.partial"
    partial.write_bytes(b"what somebody calls partial" * 100)
    status, _, err = run(*words(photos, tmp_path / "out.npy", model))
    assert status == 2
    assert f"'{partial}' cannot be used: file is not a database; delete it to begin anew" in err
    assert partial.read_bytes() == b"what somebody calls partial" * 100


def test_a_shard_that_has_changed(
    tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = save_shard(tmp_path / "s.tar", {f"{number}.png": png() for number in range(9)})
    arguments = words(shard, tmp_path / "out.npy", model)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", after(2, Store.add, KeyboardInterrupt()))
        assert run(*arguments)[0] == 130
    save_shard(shard, {f"{number}.png": b"longer" * 200 for number in range(9)})
    status, _, err = run(*arguments)
    assert status == 2
    assert "other settings: the images: 9 (" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has ..."),
            "CUDA out of memory; a smaller --batch-size needs less",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal\nmemory access"),
            "the device fails: CUDA error: an illegal memory access",
        ),
    ],
    ids=["memory", "error"],
)
def test_devices_that_fail(
    tmp_path: Path,
    begun: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    """The images are not to blame, and not listed as failed."""
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "vectors", after(1, Embedder.vectors, error))
        status, _, err = run(*begun)
    assert status == 2
    assert f"bitfast: error: {said}\n" in err
    status, _, err = run(*begun)
    assert status == 1
    assert "going on: 10 of 21" in err


def test_only_some_batches_are_decoded_ahead(
    tmp_path: Path, photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def batches() -> Iterator[pipeline.Batch]:
        for number in range(10):
            taken.append(number)
            yield number, []

    embedder = Embedder.load(str(model), torch.device("cpu"), "float32")
    dtype = torch.zeros(0).numpy().dtype
    results = pipeline.embed_batches(embedder, batches(), 2, dtype)
    for number in range(5):
        assert next(results).number == number
        assert len(taken) == number + 1 + pipeline.BATCHES_AHEAD
    results.close()
