"""``bitfast classify``: what it takes and what it prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bitfast import BitForImageClassification, BitImageProcessor, BitImageProcessorFast
from bitfast.commands import classify
from tests.cli.common import (
    BAD,
    GOOD,
    LABELS,
    SIZE,
    Run,
    lines_of_json,
    picture,
    save_model,
    scores_from_api,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_json_equals_the_model_api(model: Path, photo: Path, run: Run, dtype: str) -> None:
    status, out, err = run("classify", photo, "--model", model, "--json", "--dtype", dtype)
    assert status == 0
    (result,) = lines_of_json(out)
    assert result["path"] == str(photo)
    expected = scores_from_api(model, photo, dtype)
    order = sorted(range(len(LABELS)), key=lambda i: -expected[i])
    assert result["predictions"] == [
        {"label": LABELS[i], "index": i, "score": expected[i]} for i in order
    ]
    assert err.startswith("1 classified, 0 failed, in ")


@pytest.mark.parametrize("processor", [BitImageProcessor, BitImageProcessorFast])
def test_the_checkpoint_names_the_processor(
    tmp_path: Path, photo: Path, run: Run, processor: type
) -> None:
    model = save_model(tmp_path / "model")
    # 52x39 pixels are cropped to 24x24: one remainder is odd, of which the two leave out other halves.
    processor(size={"shortest_edge": 39}, crop_size=SIZE).save_pretrained(model)
    slow, fast = (
        scores_from_api(model, photo, processor=p)
        for p in (BitImageProcessor, BitImageProcessorFast)
    )
    assert slow != fast
    _, out, _ = run("classify", photo, "--model", model, "--json")
    predictions = lines_of_json(out)[0]["predictions"]
    expected = slow if processor is BitImageProcessor else fast
    assert {p["index"]: p["score"] for p in predictions} == dict(enumerate(expected))


def test_text(model: Path, photo: Path, run: Run) -> None:
    status, out, err = run("classify", photo, "--model", model)
    assert status == 0
    path, *lines = out.splitlines()
    assert path == str(photo)
    scores = scores_from_api(model, photo)
    best = sorted(range(len(LABELS)), key=lambda i: -scores[i])
    assert [line[2:].split("  ")[0].rstrip() for line in lines] == [LABELS[i] for i in best]
    assert [float(line.split()[-2]) / 100 for line in lines] == pytest.approx(
        [scores[i] for i in best], abs=1e-4
    )
    assert len({len(line) for line in lines}) == 1  # aligned
    assert all(line.endswith(" %") for line in lines)
    assert err.count("\n") == 1


@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_top_k(model: Path, photo: Path, run: Run, top_k: int) -> None:
    _, out, _ = run("classify", photo, "--model", model, "--json", "--top-k", top_k)
    assert len(lines_of_json(out)[0]["predictions"]) == min(top_k, len(LABELS))


def test_five_labels_by_default(tmp_path: Path, photo: Path, run: Run) -> None:
    folder = save_model(tmp_path / "seven", id2label={i: str(i) for i in range(7)})
    _, out, _ = run("classify", photo, "--model", folder)
    assert len(out.splitlines()) == 1 + 5


def test_equal_scores_come_in_the_order_of_labels(tmp_path: Path, photo: Path, run: Run) -> None:
    folder = save_model(tmp_path / "even", id2label={i: str(i) for i in range(40)})
    network = BitForImageClassification.from_pretrained(folder)
    torch.nn.init.zeros_(network.classifier[1].weight)
    torch.nn.init.zeros_(network.classifier[1].bias)
    network.save_pretrained(folder)
    _, out, _ = run("classify", photo, "--model", folder, "--json", "--top-k", 40)
    predictions = lines_of_json(out)[0]["predictions"]
    assert [prediction["index"] for prediction in predictions] == list(range(40))


def test_independent_labels(tmp_path: Path, photo: Path, run: Run) -> None:
    folder = save_model(tmp_path / "multi", problem_type="multi_label_classification")
    _, out, _ = run("classify", photo, "--model", folder, "--json")
    network = BitForImageClassification.from_pretrained(folder)
    pixels = BitImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="pt")
    expected = network(**pixels).logits.sigmoid()[0].tolist()
    scores = {p["index"]: p["score"] for p in lines_of_json(out)[0]["predictions"]}
    assert [scores[i] for i in range(len(LABELS))] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_corpus(model: Path, corpus: Path, run: Run, batch_size: int) -> None:
    status, out, err = run(
        "classify", corpus, "--model", model, "--json", "--batch-size", batch_size
    )
    assert status == 1
    results = lines_of_json(out)
    assert [Path(result["path"]).name for result in results] == sorted([*GOOD, *BAD])
    for result in results:
        name = Path(result["path"]).name
        if name in BAD:
            assert set(result) == {"path", "error"}
            assert BAD[name] in result["error"]
            assert f"bitfast: {result['path']}: {result['error']}\n" in err
        else:
            scores = {p["index"]: p["score"] for p in result["predictions"]}
            expected = scores_from_api(model, Path(result["path"]))
            assert [scores[i] for i in range(3)] == pytest.approx(expected, abs=1e-5)
    assert f"{len(GOOD)} classified, {len(BAD)} failed, in " in err.splitlines()[-1]
    assert "Traceback" not in err


def test_failures_in_text_are_not_on_standard_output(model: Path, corpus: Path, run: Run) -> None:
    status, out, err = run(
        "classify", corpus, corpus / "missing.png", "*nowhere*", "--model", model
    )
    assert status == 1
    shown = [line for line in out.splitlines() if not line.startswith("  ")]
    assert [Path(path).name for path in shown] == GOOD
    assert f"bitfast: {corpus / 'missing.png'}: no such file or folder" in err
    assert "bitfast: *nowhere*: nothing matches" in err
    assert f"{len(GOOD)} classified, {len(BAD) + 2} failed" in err


def test_nothing_to_classify(model: Path, run: Run) -> None:
    status, out, err = run("classify", "nowhere*", "--model", model)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("0 classified, 1 failed, in ")


def test_decompression_bomb(
    model: Path, photo: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb, large = tmp_path / "bomb.png", tmp_path / "large.png"
    picture(size=(100, 100)).save(bomb)
    picture(size=(70, 50)).save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    status, out, err = run("classify", bomb, large, photo, "--model", model, "--json")
    assert status == 1
    first, second, third = lines_of_json(out)
    assert "exceeds limit of 6000 pixels" in first["error"]
    # Between the limit and twice the limit Pillow warns.
    assert "predictions" in second
    assert f"{large}: warning: Image size (3500 pixels) exceeds limit" in err
    assert "predictions" in third


def test_a_line_that_resizing_would_blow_up(
    model: Path, photo: Path, tmp_path: Path, run: Run
) -> None:
    line = tmp_path / "line.png"
    picture(size=(1_000_000, 1)).save(line)  # to be resized to 24 x 24,000,000
    status, out, _ = run("classify", line, photo, "--model", model, "--json")
    assert status == 1
    failed, good = lines_of_json(out)
    assert "1000000x1 pixels would be resized to 24000000x24" in failed["error"]
    assert "predictions" in good


def test_preprocessing_that_fails_within_a_batch(
    model: Path, corpus: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = BitImageProcessor.preprocess

    def fail_for_gray(self: Any, images: Any, **options: Any) -> Any:
        if images.mode == "L":
            raise ValueError("images[0]: too gray")
        return preprocess(self, images, **options)

    monkeypatch.setattr(BitImageProcessor, "preprocess", fail_for_gray)
    paths = [corpus / "rgb.webp", corpus / "gray.png", corpus / "rgba.png"]
    status, out, _ = run("classify", *paths, "--model", model, "--json")
    assert status == 1
    first, second, third = lines_of_json(out)
    assert "predictions" in first
    assert second == {"path": str(corpus / "gray.png"), "error": "too gray"}
    assert "predictions" in third


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (MemoryError(), "not enough memory"),
        (KeyError("palette"), "KeyError: 'palette'"),
        (OSError("broken data stream\nwhen reading"), "broken data stream when reading"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_opening_raises(
    model: Path, photo: Path, run: Run, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    status, out, err = run("classify", photo, "--model", model)
    assert (status, out) == (1, "")
    assert f"bitfast: {photo}: {said}\n" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_named_pipe(model: Path, tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    status, _, err = run("classify", tmp_path / "pipe.png", "--model", model)
    assert status == 1
    assert "not a regular file" in err


def test_images_of_different_sizes_in_a_batch(tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model")
    BitImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(folder)
    sizes = [(40, 30), (30, 40), (40, 30), (64, 64)]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        picture(size=size).save(path)
    status, out, _ = run("classify", *paths, "--model", folder, "--json")
    assert status == 0
    results = lines_of_json(out)
    assert [result["path"] for result in results] == [str(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        best = result["predictions"][0]
        assert best["score"] == pytest.approx(max(scores_from_api(folder, path)), abs=1e-5)


def test_a_model_that_takes_other_images(tmp_path: Path, photo: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", num_channels=1)
    status, out, err = run("classify", photo, "--model", folder, "--json")
    assert status == 1
    assert lines_of_json(out)[0]["error"].startswith("the model fails: ")
    assert "Traceback" not in err


def test_scores_that_are_not_numbers(tmp_path: Path, photo: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model")
    network = BitForImageClassification.from_pretrained(folder)
    torch.nn.init.constant_(network.classifier[1].bias, float("nan"))
    network.save_pretrained(folder)
    status, out, _ = run("classify", photo, "--model", folder, "--json")
    assert status == 1
    assert lines_of_json(out)[0]["error"] == "the model's output in torch.float32 is not finite"


def test_at_most_one_image_is_decoded(
    model: Path, corpus: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    read = classify.read_image

    class Counted(Image.Image):
        def __del__(self) -> None:
            alive.discard(id(self))

    def counted(path: str) -> Image.Image:
        assert not alive
        image = Counted()
        image.__dict__.update(read(path).convert("RGB").__dict__)
        alive.add(id(image))
        return image

    monkeypatch.setattr(classify, "read_image", counted)
    status, out, _ = run("classify", *(corpus / name for name in GOOD), "--model", model, "--json")
    assert status == 0
    assert len(lines_of_json(out)) == len(GOOD)


def test_names_that_would_disturb_a_terminal(model: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "\x1b[31mred\n.png"
    picture().save(path)
    _, out, _ = run("classify", path, "--model", model)
    assert out.splitlines()[0] == f"{tmp_path}/\\x1b[31mred\\n.png"
    _, out, _ = run("classify", path, "--model", model, "--json")
    assert lines_of_json(out)[0]["path"] == str(path)


def test_the_embedded_model_is_the_default(tmp_path: Path, run: Run) -> None:
    from bitfast.digits import held_out_images

    images = held_out_images()[:20]
    for i, (image, _) in enumerate(images):
        image.save(tmp_path / f"{i:02}.png")
    status, out, _ = run("classify", tmp_path, "--json", "--top-k", 1)
    assert status == 0
    labels = [result["predictions"][0]["label"] for result in lines_of_json(out)]
    right = sum(label == str(digit) for label, (_, digit) in zip(labels, images, strict=True))
    assert right >= 18
