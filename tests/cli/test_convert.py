"""bitfast convert: from timm's and Google's files to folders that transformers and bitfast load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import bitfast
from bitfast.checkpoints import files, weights
from tests.cli.common import Run, lines_of_json
from tests.foreign_checkpoints import (
    edit_config,
    google_arrays,
    released_model,
    save_folder,
    save_npz,
    timm_model,
    without_memory,
)
from tests.model_pairs import assert_close
from tests.tiny_models import contents, file_names

WRITTEN = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def model() -> Any:
    return timm_model(channels=(128, 128), layers=(1, 2))


@pytest.fixture
def npz(tmp_path: Path, model: Any) -> Path:
    return save_npz(tmp_path / "BiT-M-R50x1.npz", google_arrays(model))


def assert_same_logits(folder: Path, model: Any) -> None:
    images = torch.randn(2, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        exact = model.double()(images)
        for library in (bitfast, transformers):
            loaded = library.BitForImageClassification.from_pretrained(folder, dtype=torch.float64)
            assert_close(loaded(images).logits, exact)


def test_a_file_of_google(run: Run, npz: Path, model: Any, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    status, out, err = run("convert", npz, folder)
    assert (status, err) == (0, "")
    assert "found: a BiT of its own size (depths [1, 2], stem 32, hidden sizes [128, 128])" in out
    assert "in Google's npz format, 7 classes, 0.1 M parameters" in out
    assert "assumed: GroupNorm of 32 groups; images of 448x448 pixels" in out
    assert f"wrote: {', '.join(sorted(WRITTEN))} in {folder}, weights in float32" in out
    assert file_names(folder) == WRITTEN
    assert_same_logits(folder, model)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BitForImageClassification"]
    assert config["dtype"] == "float32"
    for library in (bitfast, transformers):
        processor = library.BitImageProcessor.from_pretrained(folder)
        assert processor.size == {"shortest_edge": 448}
        assert processor.crop_size == {"height": 448, "width": 448}
        assert processor.resample == 2
        assert processor.image_mean == processor.image_std == [0.5, 0.5, 0.5]
    status, out, err = run("classify", photo, "--model", folder, "--json")
    assert status == 0
    assert len(lines_of_json(out)[0]["predictions"]) == 5


def test_a_folder_of_timm(run: Run, model: Any, photo: Path, tmp_path: Path) -> None:
    source = save_folder(
        tmp_path / "timm", model, data_config={"input_size": (3, 96, 96), "crop_pct": 0.9}
    )
    folder = tmp_path / "out"
    status, out, err = run("convert", source, folder)
    assert (status, err) == (0, "")
    assert "in timm's format, 7 classes" in out
    assert (
        "images of 96x96 pixels, from a shorter edge of 106, bicubic, mean [0.5, 0.5, 0.5]" in out
    )
    assert f"(from {source / 'config.json'})" in out
    assert_same_logits(folder, model)
    status, _, _ = run("convert", source, tmp_path / "larger", "--image-size", "128")
    assert status == 0
    larger = bitfast.BitImageProcessor.from_pretrained(tmp_path / "larger")
    assert (larger.size["shortest_edge"], larger.crop_size["height"]) == (142, 128)
    # The timm folder itself can be classified with, and gives the same.
    predictions = [
        lines_of_json(run("classify", photo, "--model", name, "--json")[1])[0]
        for name in (source, folder)
    ]
    assert predictions[0] == predictions[1]


def test_a_model_without_a_head(run: Run, tmp_path: Path) -> None:
    model = timm_model(num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    status, out, _ = run("convert", tmp_path / "model.safetensors", tmp_path / "out")
    assert status == 0
    assert "no head (load it with BitModel)" in out
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        for library in (bitfast, transformers):
            loaded, info = library.BitModel.from_pretrained(
                tmp_path / "out", output_loading_info=True
            )
            assert not info["missing_keys"]
            assert_close(loaded(images).pooler_output.flatten(1), expected, bound=1e-5)


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnetv2_50x1_bit", 448), ("resnetv2_152x4_bit", 480)]
)
def test_a_released_model(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    size: int,
) -> None:
    state = released_model(architecture, 21843).state_dict()
    tensors = without_memory({name: tuple(tensor.shape) for name, tensor in state.items()})
    monkeypatch.setattr(weights, "read_file", lambda path: tensors)
    monkeypatch.setattr(weights, "_tensor_writer", lambda *_: Path.touch)
    (tmp_path / "model.pth").touch()
    status, out, _ = run("convert", tmp_path / "model.pth", tmp_path / "out")
    assert status == 0
    name = architecture.split("_")[1]
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    assert f"found: R{name} in timm's format, 21843 classes, {millions:.1f} M parameters" in out
    processor = bitfast.BitImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size == {"height": size, "width": size}


def test_another_type_of_weights_and_gray_images(run: Run, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "gray.npz", google_arrays(timm_model(in_chans=1)))
    status, out, _ = run(
        "convert", path, tmp_path / "out", "--dtype", "bfloat16", "--image-size", 64
    )
    assert status == 0
    assert "weights in bfloat16" in out
    loaded = bitfast.BitForImageClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    processor = bitfast.BitImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.image_mean, processor.do_convert_rgb) == ([0.5], False)
    assert processor.crop_size["width"] == processor.size["shortest_edge"] == 64


# ---- what is refused, and what stays as it is ---------------------------------------------------


def assert_refused(run: Run, arguments: list[Any], *said: str) -> None:
    status, out, err = run("convert", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("bitfast: error: ")
    assert err.count("\n") == 1
    for part in said:
        assert part in err


def test_sources_that_are_none(run: Run, model: Any, npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arrays = google_arrays(model)
    del arrays["resnet/group_norm/beta"]
    half = save_npz(tmp_path / "half.npz", arrays)
    assert_refused(
        run, [half, out], f"'{half}' cannot be converted", "lacks resnet/group_norm/beta"
    )
    assert_refused(
        run, [tmp_path / "missing.npz", out], f"there is no file {tmp_path / 'missing.npz'}"
    )
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(run, [tmp_path / "notes.txt", out], "expected a folder", ".npz")
    run("convert", npz, tmp_path / "ours")
    assert_refused(run, [tmp_path / "ours", out], "names no timm architecture")
    timm_folder = save_folder(tmp_path / "timm", model)
    edit_config(timm_folder, architecture="resnet50")
    assert_refused(run, [timm_folder, out], "'resnet50'", "resnetv2_50x1_bit")
    assert not out.exists()


def test_usage(run: Run, npz: Path, tmp_path: Path) -> None:
    for arguments in ([npz], [], [npz, tmp_path / "x", "--image-size", "0"]):
        status, out, err = run("convert", *arguments)
        assert (status, out) == (2, "")
        assert "usage: bitfast convert" in err
    assert not (tmp_path / "x").exists()


def test_folders_of_something_else_are_left_alone(run: Run, npz: Path, tmp_path: Path) -> None:
    for name, config in (("notes", None), ("other", {"model_type": "resnet"}), ("timm", {"a": 1})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text("mine")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        before = contents(folder)
        for options in ([], ["--overwrite"]):
            assert_refused(
                run, [npz, folder, *options], str(folder), "give a new or an empty folder"
            )
        assert contents(folder) == before
    assert_refused(run, [npz, npz], "is not a folder")


def test_a_model_is_replaced_only_when_asked_for(
    run: Run, npz: Path, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    older = timm_model()
    bitfast.BitForImageClassification.from_pretrained(
        save_npz(tmp_path / "older.npz", google_arrays(older))
    ).save_pretrained(folder, max_shard_size=500_000)
    (folder / "README.md").write_text("mine")
    before = contents(folder)
    assert_refused(run, [npz, folder], "--overwrite replaces it")
    assert contents(folder) == before
    status, _, _ = run("convert", npz, folder, "--overwrite")
    assert status == 0
    assert file_names(folder) == {*WRITTEN, "README.md"}
    assert_same_logits(folder, model)


def test_an_empty_folder_is_filled(run: Run, npz: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("convert", npz, tmp_path / "empty")[0] == 0
    assert file_names(tmp_path / "empty") == WRITTEN


def test_a_failure_while_writing_leaves_nothing(
    run: Run, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.os.replace
    renamed = []

    def replace(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    assert_refused(run, [npz, tmp_path / "a" / "b"], "disk full")
    assert len(renamed) == 2
    assert not (tmp_path / "a").exists()
