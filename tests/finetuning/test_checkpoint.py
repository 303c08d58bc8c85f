"""The file of an unfinished run, and the folder that it is in: which runs may go on there, or begin."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitfast import BitConfig, BitForImageClassification
from bitfast.checkpoints.files import CheckpointError
from bitfast.finetuning.checkpoint import (
    CHECKPOINT_NAME,
    Progress,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from bitfast.finetuning.errors import UsageError
from bitfast.finetuning.metrics import MetricsLog, read_rows
from tests.finetuning.runs import (
    STEPS,
    assert_same_result,
    interrupted_after,
    names_in,
    run,
    write_images,
)


def model_and_optimizer(steps: int = 0) -> tuple[BitForImageClassification, Any]:
    torch.manual_seed(1)
    config = BitConfig(embedding_size=8, hidden_sizes=[16], depths=[1], num_groups=2)
    model = BitForImageClassification(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        model(torch.rand(2, 3, 16, 16)).logits.square().sum().backward()
        optimizer.step()
    return model, optimizer


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_saved_is_loaded(steps: int, tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(steps)
    progress = Progress(steps, 123, {"seed": 5, "classes": ["Möwe"]})
    save_checkpoint(tmp_path, progress, model, optimizer)
    assert names_in(tmp_path) == {CHECKPOINT_NAME}
    assert read_progress(tmp_path) == progress
    again, its_optimizer = model_and_optimizer()
    load_checkpoint(tmp_path, again, its_optimizer)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        momenta = [
            found.get("momentum_buffer")
            for found in (its_optimizer.state[ours], optimizer.state[theirs])
        ]
        if steps:
            assert torch.equal(*momenta)
        else:
            assert momenta == [None, None]


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"{}", b"\xff" * 64])
def test_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint of bitfast finetune"):
        read_progress(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "0"}, {"format": "1", "step": "x"}, {"format": "1"}]
)
def test_tensors_of_something_else(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"model.weight": torch.zeros(1)}, tmp_path / CHECKPOINT_NAME, metadata)
    with pytest.raises(CheckpointError, match="is not a checkpoint of bitfast finetune"):
        read_progress(tmp_path)


def test_the_state_of_another_network(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, Progress(0, 0, {}), model, optimizer)
    config = BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2)
    other = BitForImageClassification(config)
    with pytest.raises(CheckpointError, match="does not hold the state of this network"):
        load_checkpoint(tmp_path, other, torch.optim.SGD(other.parameters()))


def test_rows_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.add({"step": 1})
        size = log.sync()
        log.add({"step": 2})
    with MetricsLog(path) as log:
        log.cut(size)
        log.add({"step": 3})
        with pytest.raises(UsageError, match="has only 24 of the 25 bytes"):
            log.cut(25)
    assert read_rows(path) == [{"step": 1}, {"step": 3}]


# ---- the folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(images: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with interrupted_after(3):
        assert run(images, folder, base) == 130
    return folder


@pytest.fixture
def unfinished(interrupted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--seed", 1, "seed: 0 there, 1 here"),
        ("--steps", 7, f"steps: {STEPS} there, 7 here"),
        ("--learning-rate", 0.5, "base_learning_rate: 0.01 there, 0.5 here"),
        ("--dtype", "bfloat16", "dtype: float32 there, bfloat16 here"),
        ("--per-class", 2, "other training images"),
        ("--valid-fraction", 0.5, "other validation images"),
    ],
)
def test_other_settings(
    option: str, value: Any, said: str, images, base, unfinished, capsys
) -> None:
    before = {path: path.read_bytes() for path in unfinished.iterdir()}
    assert run(images, unfinished, base, option, value) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bitfast: error: argument --output: '{unfinished}' holds another run (")
    assert said in err
    assert {path: path.read_bytes() for path in unfinished.iterdir()} == before


def test_other_images(images, base, unfinished, tmp_path, capsys) -> None:
    copy = shutil.copytree(images, tmp_path / "elsewhere")
    for path in copy.glob("*/0.png"):  # some in training, some in validation
        Image.new("RGB", (21, 20)).save(path)
    assert run(copy, unfinished, base) == 2
    assert "other training images" in capsys.readouterr().err


def test_another_checkpoint_to_begin_with(images, base, unfinished, tmp_path, capsys) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    weights = load_file(other / "model.safetensors")
    weights["bit.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run(images, unfinished, other) == 2
    assert "other base weights" in capsys.readouterr().err


def test_what_makes_no_difference_may_change(images, base, unfinished, whole, tmp_path) -> None:
    """Where the images are, and in how many parts and by whom batches are made."""
    elsewhere = shutil.copytree(images, tmp_path / images.name)
    assert run(elsewhere, unfinished, base, "--workers", 1, "--checkpoint-every", 2) == 0
    assert_same_result(unfinished, whole)


def test_a_finished_run_computes_nothing(images, base, whole, capsys, monkeypatch) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr("bitfast.finetuning.command.Trainer", None)
    assert run(images, whole, base) == 0
    assert f"{whole} holds the result of this run already: nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    assert run(images, whole, base, "--seed", 3) == 2
    assert "seed: 0 there, 3 here" in capsys.readouterr().err


@pytest.mark.parametrize("is_finished", [False, True])
def test_beginning_anew(is_finished: bool, images, base, unfinished, whole, tmp_path) -> None:
    folder = shutil.copytree(whole, tmp_path / "finished") if is_finished else unfinished
    (folder / "notes.txt").write_text("mine")
    assert run(images, folder, base, "--overwrite", "--seed", 1, "--valid-fraction", 0) == 0
    assert json.loads((folder / "finetuning.json").read_text())["settings"]["seed"] == 1
    assert names_in(folder) == (names_in(whole) - {"confusion.png"}) | {"notes.txt"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["config.json", "thesis.tex", ".hidden", ".x.0123456789ab.tmp"])
def test_folders_of_something_else(name, overwrite, images, base, tmp_path, capsys) -> None:
    (tmp_path / name).write_text("mine")
    assert run(images, tmp_path, base, *overwrite) == 2
    assert f"holds '{name}'" in capsys.readouterr().err
    assert names_in(tmp_path) == {name}


def test_a_file_in_the_place_of_the_folder(images, base, tmp_path, capsys) -> None:
    (tmp_path / "run").touch()
    assert run(images, tmp_path / "run", base) == 2
    assert "must be a folder" in capsys.readouterr().err


def test_a_broken_checkpoint(images, base, unfinished, capsys) -> None:
    (unfinished / CHECKPOINT_NAME).write_bytes(b"\xff" * 64)
    assert run(images, unfinished, base) == 2
    assert "--overwrite begins anew" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_two_runs_in_one_folder(overwrite, images, base, unfinished, capsys) -> None:
    """The second one changes nothing, not even what the first is just writing."""
    (unfinished / f".{CHECKPOINT_NAME}.0123456789ab.tmp").touch()
    before = {path: path.read_bytes() for path in unfinished.iterdir()}
    with MetricsLog(unfinished / "metrics.jsonl"):
        assert run(images, unfinished, base, *overwrite) == 2
    assert "another process is fine-tuning into" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in unfinished.iterdir()} == before


def test_what_killed_processes_left_is_removed(images, base, whole, tmp_path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    for ending in ("tmp", "old"):
        (folder / f".model.safetensors.0123456789ab.{ending}").touch()
    assert run(images, folder, base) == 0
    assert names_in(folder) == names_in(whole)


def test_a_finished_run_without_its_model_is_not_finished(
    images, base, whole, tmp_path, capsys
) -> None:
    """So does a process leave it that is killed while it removes an earlier run."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "config.json").unlink()
    assert run(images, folder, base) == 2
    assert "holds a finished run without its model" in capsys.readouterr().err


def test_the_record_is_written_last(images, base, whole, tmp_path, monkeypatch) -> None:
    """A process that is killed before has a checkpoint to go on from, and one after has nothing left to do."""
    renamed = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    assert run(images, tmp_path / "run", base) == 0
    results = names_in(whole) - {"metrics.jsonl"}
    assert set(renamed[-len(results) :]) == results
    assert renamed[-1] == "finetuning.json"


def test_names_of_classes_are_part_of_a_run(base, unfinished, tmp_path, capsys) -> None:
    images = write_images(tmp_path / "colors")
    (images / "red").rename(images / "rouge")
    assert run(images, unfinished, base) == 2
    assert "other classes" in capsys.readouterr().err
