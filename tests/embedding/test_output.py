"""The vectors that ``bitfast embed`` writes: those of the model's own classes, the same in each format."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

import bitfast
from bitfast import BitForImageClassification, BitImageProcessor, BitModel
from bitfast.embedding import output as output_module
from bitfast.embedding.command import fingerprint_of_model
from bitfast.embedding.embedder import Embedder
from tests.cli.common import BAD, GOOD, Run, save_model
from tests.embedding.common import SUFFIXES, files_in, read_failures, read_vectors, save_pictures
from tests.tolerances import assert_within_contract

LAYERS = ("pooled", "stage1", "stage2", "logits")


def vectors_of_the_classes(
    model: Path, paths: list[Path], layer: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    pixels = BitImageProcessor.from_pretrained(model)(
        [Image.open(path) for path in paths], return_tensors="pt"
    )["pixel_values"].to(dtype)
    with torch.no_grad():
        if layer == "logits":
            network = BitForImageClassification.from_pretrained(model, dtype=dtype)
            return network(pixels).logits.float()
        outputs = BitModel.from_pretrained(model, dtype=dtype)(pixels, output_hidden_states=True)
        if layer == "pooled":
            return outputs.pooler_output.flatten(1).float()
        return outputs.hidden_states[int(layer[-1])].float().mean((2, 3))


def test_a_checkpoint_without_a_classifier(tmp_path: Path, model: Path, run: Run) -> None:
    """It has all layers but one, and no vector or resumed run depends on what it lacks."""
    photos, headless = tmp_path / "photos", tmp_path / "headless"
    save_pictures(photos, 3)
    BitModel.from_pretrained(model).save_pretrained(headless)
    BitImageProcessor.from_pretrained(model).save_pretrained(headless)
    for name, folder in (("whole", model), ("headless", headless)):
        output = tmp_path / f"{name}.npy"
        assert run("embed", photos, "--output", output, "--model", folder)[0] == 0
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "headless.npy").read_bytes()
    fingerprints = {
        fingerprint_of_model(Embedder.load(str(headless), torch.device("cpu"), "float32"))
        for _ in range(2)
    }
    assert len(fingerprints) == 1
    output = tmp_path / "logits.npy"
    arguments = ["embed", photos, "--output", output, "--model", headless, "--layer", "logits"]
    status, _, err = run(*arguments)
    assert status == 2
    assert "cannot be loaded: logits depends on weights that it lacks: classifier.1.bias" in err
    assert not output.exists()


def test_a_model_without_labels(tmp_path: Path, photo: Path, run: Run) -> None:
    model, output = save_model(tmp_path / "model", num_labels=0, id2label={}), tmp_path / "out.npy"
    arguments = ["embed", photo, "--output", output, "--model", model]
    status, _, err = run(*arguments, "--layer", "logits")
    assert status == 2
    assert "cannot be loaded: it has no labels, and so no logits" in err
    assert run(*arguments)[0] == 0
    assert read_vectors(output)[1].shape == (1, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_vectors_are_those_of_the_classes(
    tmp_path: Path, model: Path, run: Run, layer: str, dtype: torch.dtype
) -> None:
    paths, output = save_pictures(tmp_path / "photos", 7), tmp_path / "out.npy"
    name = str(dtype).removeprefix("torch.")
    arguments = ["embed", tmp_path / "photos", "--output", output, "--model", model]
    status, out, err = run(*arguments, "--layer", layer, "--dtype", name, "--batch-size", "3")
    assert (status, out) == (0, "")
    assert err.startswith("7 embedded, 0 failed, in ")
    names, vectors = read_vectors(output)
    assert names == [str(path) for path in paths]
    expected = [
        vectors_of_the_classes(model, paths[begin : begin + 3], layer, dtype) for begin in (0, 3, 6)
    ]
    assert vectors.dtype == np.float32
    assert torch.equal(torch.from_numpy(vectors), torch.cat(expected))


def test_vectors_keep_the_contract(tmp_path: Path, model: Path, run: Run) -> None:
    paths, output = save_pictures(tmp_path / "photos", 8), tmp_path / "out.npy"
    assert run("embed", tmp_path / "photos", "--output", output, "--model", model)[0] == 0
    pixels = transformers.BitImageProcessor.from_pretrained(model)(
        [Image.open(path) for path in paths], return_tensors="pt"
    )["pixel_values"]
    theirs = transformers.BitModel.from_pretrained(model)
    with torch.no_grad():
        plain = theirs(pixels).pooler_output.flatten(1)
        oracle = theirs.double()(pixels.double()).pooler_output.flatten(1)
    assert_within_contract(torch.from_numpy(read_vectors(output)[1]), plain, oracle)


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_formats_agree(
    tmp_path: Path, model: Path, corpus: Path, run: Run, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setattr(output_module, "ROWS_OF_A_GROUP", 3)
    found = []
    for suffix in SUFFIXES:
        output = tmp_path / f"out{suffix}"
        arguments = ["embed", corpus, "nowhere", "--output", output, "--model", model]
        status, _, err = run(*arguments, "--store", store, "--batch-size", "2")
        assert status == 1
        assert err.startswith(
            f"{len(GOOD)} embedded, {len(BAD) + 1} failed (listed in {output}.failed.csv)"
        )
        names, vectors = read_vectors(output)
        assert names == [str(corpus / name) for name in GOOD]
        assert vectors.dtype == store
        failures = read_failures(output)
        assert list(failures) == [*(str(corpus / name) for name in BAD), "nowhere"]
        for name, error in BAD.items():
            assert error in failures[str(corpus / name)]
        found.append(vectors)
    assert all(np.array_equal(found[0], vectors) for vectors in found)
    exact = [vectors_of_the_classes(model, [corpus / name], "pooled")[0] for name in GOOD]
    np.testing.assert_allclose(found[0], torch.stack(exact).numpy(), rtol=2e-3, atol=1e-3)
    assert not [name for name in files_in(tmp_path) if "partial" in name or name.startswith(".")]


def test_what_the_files_say_of_themselves(
    tmp_path: Path, model: Path, photo: Path, run: Run
) -> None:
    for suffix in (".parquet", ".safetensors"):
        output = tmp_path / f"out{suffix}"
        run("embed", photo, "--output", output, "--model", model, "--layer", "stage1")
    about = {"model": str(model), "layer": "stage1", "bitfast": bitfast.__version__}
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert json.loads(schema.metadata[b"bitfast"]) == about
    assert str(schema.field("embedding").type).startswith("fixed_size_list<element: float")
    assert schema.field("embedding").type.list_size == 16
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == about


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_without_a_row(
    tmp_path: Path, model: Path, run: Run, suffix: str, layer: str
) -> None:
    output = tmp_path / f"out{suffix}"
    arguments = ["embed", "nowhere", "--output", output, "--model", model, "--layer", layer]
    assert run(*arguments)[0] == 1
    names, vectors = read_vectors(output)
    width = {"pooled": 32, "stage1": 16, "stage2": 32, "logits": 3}[layer]
    assert (names, vectors.shape) == ([], (0, width))


def test_sizes_that_differ(tmp_path: Path, run: Run) -> None:
    """Without a crop only images of one size go together; the rows stay in order."""
    model = save_model(tmp_path / "model")
    BitImageProcessor(size={"shortest_edge": 24}, do_center_crop=False).save_pretrained(model)
    paths, output = save_pictures(tmp_path / "photos", 6), tmp_path / "out.npy"
    assert run("embed", tmp_path / "photos", "--output", output, "--model", model)[0] == 0
    names, vectors = read_vectors(output)
    assert names == [str(path) for path in paths]
    for first in range(3):  # pictures have three sizes in turn
        expected = vectors_of_the_classes(model, paths[first::3], "pooled")
        assert torch.equal(torch.from_numpy(vectors[first::3]), expected)


# ---- numbers that are none ----------------------------------------------------------------------


def scaled_model(folder: Path, factor: float) -> Path:
    """A model whose logits are so many times larger."""
    network = BitForImageClassification.from_pretrained(save_model(folder))
    with torch.no_grad():
        network.classifier[1].weight.mul_(factor)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("factor", "store", "error"),
    [
        (1e7, "float16", "float16 cannot hold its vector, of numbers up to "),
        (float("inf"), "float32", "the model's output in float32 is not finite"),
        (float("nan"), "float16", "the model's output in float32 is not finite"),
    ],
)
def test_numbers_that_cannot_be_stored(
    tmp_path: Path, photo: Path, run: Run, factor: float, store: str, error: str
) -> None:
    model, output = scaled_model(tmp_path / "model", factor), tmp_path / "out.npy"
    arguments = ["embed", photo, "--output", output, "--model", model, "--store", store]
    assert run(*arguments, "--layer", "logits")[0] == 1
    assert read_failures(output)[str(photo)].startswith(error)
    assert len(read_vectors(output)[1]) == 0


def test_only_the_images_that_overflow_fail(
    tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, output = save_pictures(tmp_path / "photos", 5), tmp_path / "out.npy"
    original = Embedder.vectors

    def with_large_ones(self: Embedder, pixel_values: torch.Tensor) -> torch.Tensor:
        vectors = original(self, pixel_values).clone()
        vectors[1, 0], vectors[3, 2] = -70000, 65519  # which rounds to 65504, the largest one
        return vectors

    monkeypatch.setattr(Embedder, "vectors", with_large_ones)
    arguments = ["embed", tmp_path / "photos", "--output", output, "--model", model]
    assert run(*arguments, "--store", "float16")[0] == 1
    names, vectors = read_vectors(output)
    assert names == [str(paths[index]) for index in (0, 2, 3, 4)]
    assert vectors[2, 2] == 65504
    assert read_failures(output) == {
        str(paths[1]): "float16 cannot hold its vector, of numbers up to 7e+04"
    }


def test_a_model_that_fails(
    tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path / "photos", 4)
    calls = []
    original = Embedder.vectors

    def fail_once(self: Embedder, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(pixel_values)
        if len(calls) == 1:
            raise RuntimeError("a kernel\nfails")
        return original(self, pixel_values)

    monkeypatch.setattr(Embedder, "vectors", fail_once)
    output = tmp_path / "out.npy"
    arguments = ["embed", tmp_path / "photos", "--output", output, "--model", model]
    assert run(*arguments, "--batch-size", "2")[0] == 1
    assert list(read_failures(output).values()) == ["the model fails: a kernel fails"] * 2
    assert len(read_vectors(output)[1]) == 2


def test_too_large_images(
    tmp_path: Path, model: Path, photo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    output = tmp_path / "out.npy"
    assert run("embed", photo, "--output", output, "--model", model)[0] == 1
    assert "exceeds limit of 1000 pixels" in read_failures(output)[str(photo)]


# ---- progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress_on_a_terminal(
    tmp_path: Path,
    model: Path,
    corpus: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    has_tqdm: bool,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = ["embed", corpus, "--output", tmp_path / "out.npy", "--model", model]
    status, out, _ = run(*arguments, "--batch-size", "2")
    assert (status, out) == (1, "")
    shown, _, last = terminal.getvalue().rpartition("\r")
    assert (f"/{len(GOOD) + len(BAD)} [" in shown) is has_tqdm
    assert ("failed=0" in shown) is has_tqdm
    assert last.startswith(f"{len(GOOD)} embedded, {len(BAD)} failed")


def test_progress_without_a_terminal(
    tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitfast.embedding.command.SECONDS_BETWEEN_LINES", 0.0)
    save_pictures(tmp_path / "photos", 3)
    (tmp_path / "photos" / "000.png").write_bytes(b"no image")
    arguments = ["embed", tmp_path / "photos", "--output", tmp_path / "out.npy", "--model", model]
    status, out, err = run(*arguments, "--batch-size", 2)
    assert (status, out) == (1, "")
    lines = ["bitfast: 2 of 3 images, 1 failed", "bitfast: 3 of 3 images, 1 failed"]
    assert err.splitlines()[:2] == lines


FORMATS_BEFORE_THREADS = """
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from bitfast.embedding import pipeline
from bitfast.embedding.embedder import Embedder
from bitfast.embedding.inputs import Item

def read_item(item):
    raise OSError(f"known: {'WEBP' in Image.OPEN}")

pipeline.read_item = read_item
embedder = Embedder.load(sys.argv[1], torch.device("cpu"), "float32")
results = pipeline.embed_batches(embedder, [(0, [Item("a.webp")])], 1, np.dtype("float32"))
print([error for result in results for _, error in result.failures])
"""


def test_formats_are_known_before_threads_decode(model: Path) -> None:
    """Pillow loads them late, and of two threads that need one then, one may find no decoder."""
    command = [sys.executable, "-c", FORMATS_BEFORE_THREADS, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "['known: True']\n", done.stderr
