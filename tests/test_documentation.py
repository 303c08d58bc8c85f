"""What the documentation shows works as it stands there, on a local checkpoint and a photograph."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import skimage
import torch

from bitfast.digits import MODEL_PATH

ROOT = Path(__file__).parent.parent
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [
        block
        for block in python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
        if "from_pretrained" in block
    ]
    assert '"google/bit-50"' in example
    assert '"cat.jpg"' in example
    example = example.replace('"google/bit-50"', repr(str(MODEL_PATH)))
    exec(example.replace('"cat.jpg"', repr(str(PHOTOGRAPH))), {})
    assert capsys.readouterr().out.strip() in [str(digit) for digit in range(10)]


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
