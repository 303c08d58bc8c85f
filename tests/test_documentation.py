"""What the documentation shows works as it stands there, on a local checkpoint and a photograph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import skimage
import torch
import transformers

import bitfast
import bitfast.transformers
from bitfast.digits import MODEL_PATH
from tests.foreign_checkpoints import google_arrays, save_folder, save_npz, timm_model
from tests.foreign_models import dpt_hybrid
from tests.model_pairs import our_model

ROOT = Path(__file__).parent.parent
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("cat.jpg", {"google/bit-50": MODEL_PATH, "cat.jpg": PHOTOGRAPH})
    assert capsys.readouterr().out.strip() in [str(digit) for digit in range(10)]


def run_example(word: str, files: dict[str, Path], **names: Any) -> dict[str, Any]:
    """Run the README's example that has this word in it, with what is on this machine for what is not.

    Args:
        files: Paths by the names that the example gives them.
        names: What the example takes as given.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = [block for block in python_blocks(text) if word in block]
    for shown, path in files.items():
        assert f'"{shown}"' in example
        example = example.replace(f'"{shown}"', repr(str(path)))
    exec(example, names)
    return names


def test_accelerating_as_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    model = dpt_hybrid()
    text = repr(model)
    run_example("accelerate", {}, bitfast=bitfast, model=model)
    assert "modules are bitfast's now" in capsys.readouterr().out
    assert repr(model) == text


def test_a_pipeline_as_the_readme_shows() -> None:
    files = {"google/bit-50": MODEL_PATH}
    found = run_example("pipeline", files, bitfast=bitfast, transformers=transformers)
    assert type(found["classify"].model) is bitfast.transformers.BitForImageClassification
    assert found["classify"](str(PHOTOGRAPH))


def test_foreign_checkpoints_as_the_readme_shows(tmp_path: Path) -> None:
    model = timm_model()
    files = {
        "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k": save_folder(tmp_path / "timm", model),
        "BiT-M-R50x3.npz": save_npz(tmp_path / "google.npz", google_arrays(model)),
    }
    run_example(".npz", files, BitForImageClassification=bitfast.BitForImageClassification)


def test_the_first_example_of_transformers_documentation() -> None:
    from bitfast import BitConfig, BitModel

    # Initializing a BiT bit-50 style configuration, then a model (with random weights) from it.
    configuration = BitConfig()
    with torch.device("meta"):
        model = BitModel(configuration)
    configuration = model.config
    assert configuration.depths == [3, 4, 6, 3]
    assert model.num_parameters() == 23_500_352


def test_the_last_example_of_transformers_documentation() -> None:
    from PIL import Image
    from transformers import BitForImageClassification as Theirs
    from transformers import BitImageProcessor as TheirProcessor

    from bitfast import BitForImageClassification, BitImageProcessor

    image = Image.open(PHOTOGRAPH)
    labels = []
    for processor_class, model_class in (
        (BitImageProcessor, BitForImageClassification),
        (TheirProcessor, Theirs),
    ):
        image_processor = processor_class.from_pretrained(MODEL_PATH)
        model = model_class.from_pretrained(MODEL_PATH)
        inputs = image_processor(image, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        labels.append(model.config.id2label[logits.argmax(-1).item()])
    assert labels[0] == labels[1]


def test_exporting_as_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = our_model("BitForImageClassification", depths=[1], hidden_sizes=[16]).eval()
    images = torch.randn(2, 3, 64, 50)
    run_example("exportable", {}, bitfast=bitfast, torch=torch, model=model, images=images)
    with torch.no_grad():
        expected = model(images).logits
        (packaged,) = torch._inductor.aoti_load_package("bit.pt2")(images)
    session = onnxruntime.InferenceSession("bit.onnx", providers=["CPUExecutionProvider"])
    (converted,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for actual in (packaged, torch.from_numpy(converted)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alias", ["parameter.data", "parameter.detach().numpy()"])
def test_ways_to_write_that_torch_does_not_count(alias: str) -> None:
    """README names them, and what to do after them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"^- \*\*Standardized weights are kept.*?(?=^- )", text, re.M | re.S)
    assert f"`{alias}`" in paragraph
    assert "`model.eval()`" in paragraph
    model = our_model("BitModel").eval()
    images = torch.randn(1, 3, 64, 64)
    parameter = model.embedder.convolution.weight
    with torch.no_grad():
        before = model(images).last_hidden_state
        version = parameter._version
        eval(alias)[...] *= -1
        assert parameter._version == version
        after = model.eval()(images).last_hidden_state
        assert not torch.equal(before, after)
        parameter.copy_(parameter.clone())  # which torch counts
        assert torch.equal(model(images).last_hidden_state, after)
