"""What a run leaves: a model that transformers loads too, reports, charts, and a card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import classification_report, confusion_matrix

import bitfast
from bitfast.finetuning import charts, report
from bitfast.finetuning.card import Facts, model_card
from bitfast.finetuning.evaluation import Evaluation
from bitfast.finetuning.recipe import Choice
from bitfast.finetuning.report import report_classes
from tests.finetuning.runs import CLASSES, STEPS, names_in, run

RESULT = {
    "README.md", "config.json", "confusion.png", "curves.png", "finetuning.json", "metrics.jsonl",
    "model.safetensors", "preprocessor_config.json", "report.csv", "report.json",
}  # fmt: skip


def evaluation(classes: int, images: int, right: float = 0.7) -> Evaluation:
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, images)
    wrong = random.integers(0, classes, images)
    predictions = np.where(random.random(images) < right, labels, wrong)
    return Evaluation(labels, predictions, 0.5)


# ---- the model ----------------------------------------------------------------------------------


def test_the_files(whole: Path) -> None:
    assert names_in(whole) == RESULT
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[0].keys() == {"step", "loss", "accuracy", "learning_rate", "images_per_second"}
    evaluations = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert evaluations[0].keys() == {"step", "validation_loss", "validation_accuracy"}


def test_bitfast_and_transformers_load_it(whole: Path, images: Path) -> None:
    paths = sorted(images.glob("*/*.png"))
    logits = []
    for processor_class, model_class in (
        (bitfast.BitImageProcessor, bitfast.BitForImageClassification),
        (transformers.AutoImageProcessor, transformers.AutoModelForImageClassification),
    ):
        options = {"use_fast": False} if processor_class is not bitfast.BitImageProcessor else {}
        processor = processor_class.from_pretrained(whole, **options)
        model = model_class.from_pretrained(whole)
        assert list(model.config.id2label.values()) == list(CLASSES)
        assert model.config.label2id == {name: index for index, name in enumerate(CLASSES)}
        pixels = processor([Image.open(path) for path in paths], return_tensors="pt")
        assert pixels["pixel_values"].shape[2:] == (16, 16)
        with torch.no_grad():
            logits.append(model(**pixels).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_the_numbers_are_those_of_the_model_that_is_left(whole: Path, images: Path, capsys) -> None:
    """Every image but those that the network learned from is classified as the report says."""
    found = json.loads((whole / "report.json").read_text())
    held_out = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["accuracy"] == held_out["validation_accuracy"]
    assert found["loss"] == held_out["validation_loss"]
    from bitfast.finetuning.dataset import open_splits

    splits = open_splits(images, valid_fraction=0.25)
    processor = bitfast.BitImageProcessor.from_pretrained(whole)
    model = bitfast.BitForImageClassification.from_pretrained(whole)
    pixels = processor(
        [splits.validation.read(i) for i in range(len(splits.validation))], return_tensors="pt"
    )
    with torch.no_grad():
        predictions = model(**pixels).logits.argmax(1).numpy()
    assert found["correct"] == (predictions == splits.validation.labels).sum()


def test_it_can_be_fine_tuned_again(whole: Path, images: Path, tmp_path: Path) -> None:
    """Without validation images: there is nothing to report, and everything else is there."""
    output = tmp_path / "again"
    assert run(images, output, whole, "--valid-fraction", 0) == 0
    assert names_in(output) == RESULT - {"confusion.png"}
    assert json.loads((output / "report.json").read_text())["accuracy"] is None
    assert "Not measured" in (output / "README.md").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, output))
    assert not torch.equal(*(w["bit.embedder.convolution.weight"] for w in (before, after)))


# ---- the report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 7])
def test_the_report_has_the_numbers_of_scikit_learn(classes: int) -> None:
    found = evaluation(classes, 200)
    names = [f"class {index}" for index in range(classes)]
    expected = classification_report(
        found.labels, found.predictions, target_names=names, output_dict=True
    )
    reports = report_classes(found, names)
    for each in reports:
        wanted = expected[each.name]
        assert (each.count, each.precision, each.recall, each.f1) == pytest.approx(
            (wanted["support"], wanted["precision"], wanted["recall"], wanted["f1-score"])
        )
    content = report.as_json(found, reports)
    assert content["accuracy"] == pytest.approx(expected["accuracy"])
    average = expected["macro avg"]
    assert content["macro_average"]["f1"] == pytest.approx(average["f1-score"])
    assert content["macro_average"]["recall"] == pytest.approx(average["recall"])

    matrix = confusion_matrix(found.labels, found.predictions)
    assert (charts.confusion_matrix(found, classes, classes) == matrix).all()
    np.fill_diagonal(matrix, 0)
    for index, each in enumerate(reports):
        most = sorted(matrix[index].tolist(), reverse=True)[:3]
        assert [count for _, count in each.confused_with] == [count for count in most if count]
        for name, count in each.confused_with:
            assert matrix[index, names.index(name)] == count


def test_classes_that_do_not_occur() -> None:
    found = Evaluation(np.array([0, 0]), np.array([0, 2]), 0.1)
    first, second, third = report_classes(found, ["a", "b", "c"])
    assert (first.precision, first.recall, first.confused_with) == (1.0, 0.5, (("c", 1),))
    assert (second.count, second.precision, second.recall, second.f1) == (0, 0.0, 0.0, 0.0)
    assert (third.count, third.precision) == (0, 0.0)


def test_the_table(whole: Path) -> None:
    with (whole / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    content = json.loads((whole / "report.json").read_text())
    assert [line["class"] for line in lines] == list(CLASSES)
    for line, each in zip(lines, content["classes"], strict=True):
        assert float(line["recall"]) == pytest.approx(each["recall"], abs=1e-4)
        assert int(line["count"]) == each["count"] == 2


# ---- charts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "named"), [(2, 2), (40, 40), (1000, 60), (2500, 60)])
def test_the_confusion_matrix(classes: int, named: int, tmp_path: Path) -> None:
    figure = charts.confusion(evaluation(classes, 3000), [f"$class$ {i}" for i in range(classes)])
    charts.png_writer(figure)(tmp_path / "matrix")
    with Image.open(tmp_path / "matrix") as image:
        assert image.format == "PNG"
        assert all(300 < edge < 2000 for edge in image.size)
        assert len(set(image.convert("L").tobytes())) > 10
    axis = figure.axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == named
    assert labels[0] == r"\$class\$ 0"
    assert len(axis.texts) == (4 if classes == 2 else 0)
    edge = min(classes, charts.MOST_CELLS)
    assert axis.images[0].get_array().shape == (edge, edge)


def test_the_curves(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    figure = charts.curves(rows)
    training, validation = figure.axes[0].lines
    assert training.get_ydata().tolist() == [row["loss"] for row in rows if "loss" in row]
    assert validation.get_xdata().tolist() == [2, 4, 6]
    assert len(charts.curves(rows[:1]).axes[0].lines) == 1


# ---- the card -----------------------------------------------------------------------------------


def facts(**others: Any) -> Facts:
    return Facts(
        **{
            "name": "run", "base": "google/bit-50", "classes": CLASSES, "data": "photos: mine",
            "training": 18, "left_out": 2, "choices": [Choice("steps", "500", "a | b")], "seed": 7,
            "command": "bitfast finetune photos", "versions": {"bitfast": "1", "triton": None},
            **others,
        }
    )  # fmt: skip


def test_the_card(whole: Path) -> None:
    card = ModelCard.load(whole / "README.md")
    found = json.loads((whole / "report.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_value == round(found["accuracy"], 4)
    low, high = found["accuracy_95"]
    assert f"95% confidence interval {low:.2%} to {high:.2%}" in card.text
    assert f"{found['correct']} correct out of {found['images']}" in card.text
    assert "| steps | 6 | given |" in card.text
    assert "`bitfast " in card.text
    assert f"torch {torch.__version__}" in card.text


def test_names_from_outside_do_not_break_the_card(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(model_card(facts(classes=[f"class {i}" for i in range(50)]), evaluation(3, 9)))
    card = ModelCard.load(path)
    assert card.data.base_model == "google/bit-50"
    assert card.data.eval_results[0].dataset_name == "photos: mine, validation images"
    assert r"| steps | 500 | a \| b |" in card.text
    assert "class 29, and 20 more" in card.text
    assert "Left out, because they could not be used: 2 images" in card.text
    assert "triton" not in card.text


def test_paths_that_are_not_text(whole: Path, images: Path, base: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd\udcff"
    try:
        shutil.copytree(images, odd)
    except OSError:
        pytest.skip("this file system takes only text as names")
    assert run(odd, tmp_path / "run\udcff", base) == 0
    assert r"odd\udcff" in (tmp_path / "run\udcff" / "README.md").read_text(encoding="utf-8")
