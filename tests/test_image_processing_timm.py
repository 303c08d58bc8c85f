"""Image processors from timm's checkpoints: they do what timm does, or say why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.checkpoints.files import CheckpointError
from bitfast.modeling import BitModel
from tests.foreign_checkpoints import edit_config, save_folder, timm_model


@pytest.mark.parametrize("name", timm.list_pretrained("resnetv2_*_bit*"))
def test_processors_do_what_timm_does(tmp_path: Path, name: str) -> None:
    model = timm_model()
    cfg = timm.models.get_pretrained_cfg(name)
    settings = resolve_data_config(pretrained_cfg=cfg.to_dict())
    folder = save_folder(tmp_path / "saved", model, data_config=settings)
    # What is cropped is even: where it is odd, transformers and torchvision differ by a pixel.
    image = Image.effect_noise((500, 400), 60).convert("RGB")
    expected = create_transform(**settings)(image)
    for processor_class in (BitImageProcessor, BitImageProcessorFast):
        processor = processor_class.from_pretrained(folder)
        pixels = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        assert pixels.shape == expected.shape
        # The fast processor resizes as torchvision does tensors, up to a level beside Pillow.
        levels = 0.01 if processor_class is BitImageProcessor else 2.01
        assert (pixels - expected).abs().max() <= levels / 127.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_size": [3, 224, 225]}, "must be square"),
        ({"input_size": [3, 224]}, "[channels, height, width]"),
        ({"input_size": 224}, "[channels, height, width]"),
        ({"input_size": [3, 0, 0]}, "[channels, height, width]"),
        ({"input_size": [1, 224, 224]}, "mean must be a list of 1 numbers"),
        ({"crop_pct": 1e-320}, "crop_pct must be in [0.01, 1]"),
        ({"crop_pct": "all"}, "crop_pct must be in [0.01, 1]"),
        ({"crop_mode": "squash"}, "crop_mode must be 'center'"),
        ({"interpolation": "random"}, "interpolation must be one of"),
        ({"mean": [0.5]}, "mean must be a list of 3 numbers"),
        ({"std": [0.5, 0.5, float("nan")]}, "std must be a list of 3 numbers"),
        ({"std": None}, "pretrained_cfg lacks std"),
    ],
    ids=str,
)
def test_images_that_the_processors_cannot_make(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    pretrained = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit_config(folder, pretrained_cfg={**pretrained, **changes})
    with pytest.raises(CheckpointError) as caught:
        BitImageProcessor.from_pretrained(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    BitModel.from_pretrained(folder)  # which is none of the model's business


def test_checkpoints_that_say_nothing_about_images(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    edit_config(folder, pretrained_cfg={})
    with pytest.raises(CheckpointError, match=r"contains no file preprocessor_config\.json"):
        BitImageProcessor.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="bitfast convert"):
        BitImageProcessor.from_pretrained(folder / "model.safetensors")
