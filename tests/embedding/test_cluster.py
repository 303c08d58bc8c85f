"""``bitfast embed --ray`` on a real Ray of this machine, with two workers, one of which dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from PIL import Image
from skimage.data import chelsea

from bitfast.embedding import cluster, pipeline
from bitfast.embedding.embedder import Embedder
from bitfast.embedding.inputs import Item
from bitfast.embedding.store import Store
from tests.cli.common import Run
from tests.embedding.common import png, save_pictures, save_shard

SECONDS = 300
"""The longest that a run may take before it counts as stuck."""


@pytest.fixture
def folder_of_ray() -> Iterator[str]:
    """Where Ray keeps its sockets, whose paths must be short."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of our own, of two CPUs."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """120 photographs, a broken file, a missing one, and a shard."""
    photo, folder = tmp_path / "photo.jpg", tmp_path / "photos"
    Image.fromarray(chelsea()).save(photo)
    folder.mkdir()
    for number in range(120):
        os.link(photo, folder / f"{number:03}.jpg")
    (folder / "042.jpg").unlink()
    (folder / "042.jpg").write_bytes(b"no image")
    shard = save_shard(tmp_path / "s.tar", {"a.png": png(), "\udcff.png": png()})
    return [str(folder), str(tmp_path / "missing.png"), str(shard)]


def words(inputs: list[str], output: Path, model: Path, *more: object) -> list[str]:
    return ["embed", *inputs, "--output", str(output), "--model", str(model), *map(str, more)]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bitfast", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children() -> dict[int, list[int]]:
    """The process numbers of each process's children."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "12 (name, with anything in it) S 1 ..."
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        found.setdefault(parent, []).append(int(entry.parent.name))
    return found


def busy_workers() -> list[int]:
    """The workers of this process's Ray that have images to embed right now."""
    family, found = children(), []
    ahead = [os.getpid()]
    while ahead:
        process = ahead.pop()
        ahead += family.get(process, [])
        try:
            title = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker(MapBatches(Worker)).submit"):
            found.append(process)
    return found


def kill_a_busy_worker(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for worker in busy_workers():
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.01)
    pytest.fail(f"no worker was seen at work: {process.communicate()}")


def test_a_worker_that_dies(
    tmp_path: Path,
    inputs: list[str],
    model: Path,
    run: Run,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No image is lost, none is doubled: the files are those of a run without Ray."""
    output, alone = tmp_path / "out.parquet", tmp_path / "alone.parquet"
    more = ("--ray", address, "--ray-workers", 2)
    # Of the command's folder, in which the cluster's workers were not started.
    monkeypatch.chdir(tmp_path)
    inputs, model = [os.path.relpath(name) for name in inputs], Path(os.path.relpath(model))
    process = start(words(inputs, output, model, "--batch-size", 4, *more))
    kill_a_busy_worker(process)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    assert "121 embedded, 2 failed" in err
    assert run(*words(inputs, alone, model, "--batch-size", 4))[0] == 1
    assert output.read_bytes() == alone.read_bytes()
    failed = [path.with_name(f"{path.name}.failed.csv").read_bytes() for path in (output, alone)]
    assert failed[0] == failed[1]
    assert not (tmp_path / "out.parquet.partial").exists()


def test_a_ray_of_its_own_goes_on_where_a_run_without_stopped(
    tmp_path: Path,
    inputs: list[str],
    model: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    folder_of_ray: str,
) -> None:
    output, alone = tmp_path / "out.npy", tmp_path / "alone.npy"
    added: list[Any] = []
    original = Store.add

    def add(self: Store, result: Any) -> None:
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(result)
        original(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", add)
        assert run(*words(inputs, output, model))[0] == 130
    process = start(words(inputs, output, model, "--ray"), RAY_TMPDIR=folder_of_ray)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    assert "going on: 96 of 123 images were done" in err
    assert run(*words(inputs, alone, model))[0] == 1
    for suffix in ("", ".names.json", ".failed.csv"):
        found = [path.with_name(path.name + suffix).read_bytes() for path in (output, alone)]
        assert found[0] == found[1]


def embed(batches: list[pipeline.Batch], model: Path) -> set[int]:
    """Embed them with one worker; return the numbers of the results."""
    settings = cluster.WorkerSettings(
        str(model.parent), model.name, "cpu", "float32", "pooled", 1, "float32"
    )
    results = cluster.embed_batches(batches, settings, cluster.Workers(1, 1, "cpu"))
    return {result.number for result in results}


def test_images_that_kill_every_worker(
    address: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end the run, and are named; Ray alone would try them forever."""
    log = tmp_path / "deaths"

    class Deadly(cluster.Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            preprocess = self._embedder.preprocess

            def preprocess_or_die(image: Image.Image) -> torch.Tensor:
                if image.size == (1, 1):
                    with log.open("a") as file:
                        print("died", file=file)
                    os._exit(1)
                return preprocess(image)

            self._embedder.preprocess = preprocess_or_die  # type: ignore[method-assign]

    paths = save_pictures(tmp_path / "photos", 12)
    Image.new("RGB", (1, 1)).save(paths[6])
    monkeypatch.setattr(cluster, "Worker", Deadly)
    batches = [(number, [Item(str(path))]) for number, path in enumerate(paths)]
    said = (
        f"^3 workers died at the images from {str(paths[4])!r} to {str(paths[7])!r}. Where memory"
    )
    with pytest.raises(cluster.ClusterError, match=said):
        embed(batches, model)
    assert log.read_text() == "died\n" * 3


def test_a_worker_that_fails(
    address: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told, which Ray Data would hide in advice about its own settings."""

    class Failing(cluster.Worker):
        def __call__(self, rows: Any) -> Iterator[Any]:
            self._embedder.vectors = self.fail  # type: ignore[method-assign]
            return super().__call__(rows)

        def fail(self, pixel_values: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    paths = save_pictures(tmp_path / "photos", 1)
    monkeypatch.setattr(cluster, "Worker", Failing)
    said = "^a worker fails: OutOfMemoryError: CUDA out of memory"
    with pytest.raises(cluster.ClusterError, match=said):
        embed([(0, [Item(str(paths[0]))])], model)


def test_a_model_that_kills_every_worker(
    address: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(cluster.Worker):
        def __init__(self, *arguments: Any) -> None:
            Embedder.load = lambda *_: os._exit(1)  # type: ignore[method-assign]  # in its process
            super().__init__(*arguments)

    monkeypatch.setattr(cluster, "Worker", Deadly)
    monkeypatch.setattr(cluster, "MOST_DEATHS", 1)
    with pytest.raises(cluster.ClusterError, match="a worker died 1 times as it load"):
        embed([(0, [Item("0.png")])], model)


# ---- how many workers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "count", "device", "expected"),
    [
        ([{"CPU": 8.0}], None, None, (1, 8, "cpu")),
        ([{"CPU": 8.0}], 3, None, (3, 2, "cpu")),
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, None, (2, 4, "cpu")),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 3, None, (3, 4, "cpu")),
        ([{"CPU": 8.0}, {}], None, None, (1, 8, "cpu")),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}], None, None, (4, 4, "cuda")),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}], 3, None, (3, 2, "cuda")),
        ([{"CPU": 2.0, "GPU": 4.0}], None, "cuda", (4, 1, "cuda")),
        ([{"CPU": 16.0, "GPU": 4.0}], None, "cpu", (1, 16, "cpu")),
    ],
)
def test_workers(
    monkeypatch: pytest.MonkeyPatch,
    machines: list[dict[str, float]],
    count: int | None,
    device: str | None,
    expected: tuple[int, int, str],
) -> None:
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead])
    assert cluster.plan_workers(count, device) == cluster.Workers(*expected)


@pytest.mark.parametrize(
    ("machine", "count", "device", "said"),
    [
        ({"CPU": 2.0}, 3, None, "the cluster has 2 CPUs, too few for 3 workers"),
        ({"CPU": 2.0}, None, "cuda", "the cluster has 0 GPUs, too few for 1 workers on cuda"),
        ({"CPU": 2.0}, None, "abacus", "the device 'abacus' cannot be used"),
        ({}, None, None, "the cluster has 0 CPUs, too few for 1 workers"),
    ],
)
def test_too_few_for_the_workers(
    monkeypatch: pytest.MonkeyPatch,
    machine: dict[str, float],
    count: int | None,
    device: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": machine}])
    with pytest.raises(cluster.ClusterError, match=said):
        cluster.plan_workers(count, device)
