"""The model that ships with bitfast: what its card says, its held-out images, and how it is trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from sklearn import datasets

from bitfast import BitForImageClassification, BitImageProcessor
from bitfast.checkpoints import files
from bitfast.checkpoints.files import CheckpointError
from bitfast.digits import MODEL_PATH, card, held_out_images, sheet, train
from tests.tiny_models import contents, file_names
from tests.tolerances import relative_error

FILES = {
    "README.md",
    "config.json",
    "held_out.json",
    "held_out.png",
    "model.safetensors",
    "preprocessor_config.json",
}
AIM = 0.98


@pytest.fixture(scope="module")
def digits() -> train.Digits:
    return train.load_digits()


@pytest.fixture(scope="module")
def few_digits(digits: train.Digits) -> train.Digits:
    return digits.select(range(160))


def held_out_pixel_values() -> torch.Tensor:
    processor = BitImageProcessor.from_pretrained(MODEL_PATH)
    images = [image for image, _ in held_out_images()]
    return processor(images, return_tensors="pt")["pixel_values"]


# ---- the shipped model --------------------------------------------------------------------------


def test_the_card_states_the_accuracy_of_the_shipped_model() -> None:
    labels = torch.tensor([label for _, label in held_out_images()])
    model = BitForImageClassification.from_pretrained(MODEL_PATH)
    with torch.inference_mode():
        predictions = model(held_out_pixel_values()).logits.argmax(dim=1)
    correct = int((predictions == labels).sum())
    measurement = card.Measurement(correct, len(labels))
    assert measurement.accuracy >= AIM

    text = (MODEL_PATH / "README.md").read_text(encoding="utf-8")
    assert f"**{correct / len(labels):.2%}** on the held-out images" in text
    assert f"{correct} correct out of {len(labels)}\n" in text
    low, high = measurement.confidence_interval()
    assert f"interval {low:.2%} to {high:.2%}" in text
    in_front_matter = re.search(r"type: accuracy\n +value: ([0-9.]+)\n", text)
    assert in_front_matter is not None
    assert float(in_front_matter[1]) == round(correct / len(labels), 4)


@pytest.mark.parametrize(("correct", "total"), [(448, 450), (450, 450), (0, 7), (1, 2)])
def test_the_confidence_interval_is_wilsons(correct: int, total: int) -> None:
    measurement = card.Measurement(correct, total)
    low, high = measurement.confidence_interval()
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= measurement.accuracy <= high + 1e-12
    # Its ends are the rates p from which the measured one is 1.96 standard deviations away.
    for p in (low, high):
        distance = (measurement.accuracy - p) ** 2
        assert distance == pytest.approx(1.959964**2 * p * (1 - p) / total, abs=1e-12)


def test_the_files_and_their_size() -> None:
    assert file_names(MODEL_PATH) == FILES
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 2_000_000
    model = BitForImageClassification.from_pretrained(MODEL_PATH)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert model.config.label2id == {str(digit): digit for digit in range(10)}


def test_transformers_computes_the_same() -> None:
    images = [image for image, _ in held_out_images()]
    processor = transformers.BitImageProcessor.from_pretrained(MODEL_PATH)
    pixel_values = held_out_pixel_values()
    assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], pixel_values)

    models = [
        package.from_pretrained(MODEL_PATH)
        for package in (BitForImageClassification, transformers.BitForImageClassification)
    ]
    with torch.inference_mode():
        ours, theirs = (model(pixel_values).logits for model in models)
    assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))
    assert relative_error(ours, theirs) <= 1e-5
    assert models[1].config.id2label == {digit: str(digit) for digit in range(10)}


def test_colour_images_give_the_same_pixels() -> None:
    image, _ = held_out_images()[0]
    processor = BitImageProcessor.from_pretrained(MODEL_PATH)
    gray, colour = (processor(i)["pixel_values"][0] for i in (image, image.convert("RGB")))
    assert np.array_equal(gray, colour)


# ---- the held-out images ------------------------------------------------------------------------


def test_the_held_out_images_are_those_of_scikit_learn() -> None:
    data = datasets.load_digits()
    training, held_out = train.split(data.target.tolist(), train.HELD_OUT_FRACTION)
    assert sorted(training + held_out) == list(range(1797))
    assert len(held_out) == len(held_out_images()) == 450

    assert [label for _, label in held_out_images()] == data.target[held_out].tolist()
    for (image, _), values in zip(held_out_images(), data.images[held_out], strict=True):
        assert (image.mode, image.size) == ("L", (8, 8))
        # Rounded half up, as the card says; no two of the 17 values fall together.
        assert np.array_equal(np.asarray(image), np.floor(values * 255 / 16 + 0.5))

    seen = {values.tobytes() for values in data.images[training]}
    assert not any(values.tobytes() in seen for values in data.images[held_out])


def test_each_digit_is_split_alike() -> None:
    labels = datasets.load_digits().target
    _, held_out = train.split(labels.tolist(), 0.25)
    for digit in range(10):
        count = int((labels == digit).sum())
        assert int((labels[held_out] == digit).sum()) == round(0.25 * count)


def test_a_sheet_returns_what_was_written(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for count in (1, sheet.COLUMNS, sheet.COLUMNS + 1):
        pixels = rng.integers(0, 256, (count, 3, 5), dtype=np.uint8)
        sheet.write_sheet(tmp_path, [Image.fromarray(p) for p in pixels], list(range(count)))
        result = sheet.read_sheet(tmp_path)
        assert [label for _, label in result] == list(range(count))
        assert np.array_equal(np.stack([np.asarray(image) for image, _ in result]), pixels)


def test_a_broken_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"held_out\.json"):
        sheet.read_sheet(tmp_path)
    sheet.write_sheet(tmp_path, [Image.new("L", (8, 8))] * 30, [0] * 30)
    labels = json.loads((tmp_path / "held_out.json").read_text())
    for change in ({"labels": [0] * 20}, {"width": 7}, {"columns": 0}):
        (tmp_path / "held_out.json").write_text(json.dumps({**labels, **change}))
        with pytest.raises(CheckpointError, match=r"200, 16.* is not the sheet"):
            sheet.read_sheet(tmp_path)
    (tmp_path / "held_out.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match="not a readable image"):
        sheet.read_sheet(tmp_path)


# ---- training -----------------------------------------------------------------------------------


def test_equal_seeds_write_equal_files(few_digits: train.Digits, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        train.train_and_save(few_digits, tmp_path / name, epochs=1, seed=seed)
        torch.rand(1)  # the training must not depend on where torch's random numbers stand
    assert file_names(tmp_path / "first") == FILES
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    weights = "model.safetensors"
    assert contents(tmp_path / "first")[weights] != contents(tmp_path / "other")[weights]

    torch.random.set_rng_state(state)
    train.train_and_save(few_digits, tmp_path / "first", epochs=1, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert settings == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def test_held_out_images_have_no_influence(few_digits: train.Digits, tmp_path: Path) -> None:
    _, held_out = train.split(few_digits.labels, train.HELD_OUT_FRACTION)
    images = list(few_digits.images)
    for index in held_out:
        images[index] = Image.new("L", (8, 8), 200)
    blank = replace(few_digits, images=images)
    train.train_and_save(few_digits, tmp_path / "real", epochs=1, seed=1)
    train.train_and_save(blank, tmp_path / "blank", epochs=1, seed=1)
    real, without = contents(tmp_path / "real"), contents(tmp_path / "blank")
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert real[name] == without[name]
    assert real["held_out.png"] != without["held_out.png"]
    assert train.validate(few_digits, 1, 1) == train.validate(blank, 1, 1)


def test_training_learns(few_digits: train.Digits) -> None:
    model, processor = train.fit(few_digits, epochs=6, seed=0)
    assert train.count_correct(model, processor, few_digits) > 100  # chance is 16 of 160
    assert not model.training


def test_augmentation_keeps_black_black() -> None:
    batch = torch.full((4, 3, 32, 32), -0.9)
    assert torch.equal(train.augment(batch, torch.Generator()), batch)
    batch[:, :, 12:20, 12:20] = 2.0
    changed = train.augment(batch, torch.Generator().manual_seed(0))
    assert changed.shape == batch.shape
    assert not torch.equal(changed, batch)
    assert torch.allclose(changed.amin(dim=(1, 2, 3)), torch.tensor(-0.9))


def test_a_failing_save_leaves_the_earlier_model(
    few_digits: train.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train_and_save(few_digits, tmp_path, epochs=1, seed=0)
    kept = contents(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_rename_into_place", fail)
    with pytest.raises(OSError, match="No space left"):
        train.train_and_save(few_digits, tmp_path, epochs=1, seed=1)
    assert contents(tmp_path) == kept


# ---- command line -------------------------------------------------------------------------------


def test_the_command_writes_a_model(
    few_digits: train.Digits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "load_digits", lambda: few_digits)
    train.main(["--output", str(tmp_path / "new" / "model"), "--epochs", "1", "--seed", "3"])
    assert "held-out accuracy" in capsys.readouterr().out
    text = (tmp_path / "new" / "model" / "README.md").read_text()
    assert "`python -m bitfast.digits.train --seed 3 --epochs 1`" in text
    assert len(load_file(tmp_path / "new" / "model" / "model.safetensors")) > 10

    monkeypatch.chdir(tmp_path)
    train.main(["--validate", "--epochs", "1"])
    assert "validation accuracy" in capsys.readouterr().out
    assert file_names(tmp_path) == {"new"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed: must be from 0 to"),
        (["--seed", str(2**63)], "--seed: must be from 0 to"),
        (["--output", __file__], "--output: must be a folder"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_made(
    few_digits: train.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_digits", lambda: few_digits)
    with pytest.raises(SystemExit, match=r"error: .*Not a directory"):
        train.main(["--output", f"{__file__}/model"])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"scikit-learn.*pip install \"bitfast\[test\]\""):
        train.main([])


def test_importing_needs_no_other_library() -> None:
    heavy = ("sklearn", "transformers", "triton")
    code = (
        "import sys, bitfast.digits.train; bitfast.digits.held_out_images(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
