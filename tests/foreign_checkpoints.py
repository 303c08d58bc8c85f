"""Small BiT models of timm with random weights, and a writer of the files that Google released."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import resnetv2, save_for_hf
from torch import Tensor, nn

from tests.model_pairs import assert_as_exact, assert_close, move_weights

SMALL: dict[str, Any] = {
    "layers": (1, 2, 1, 3),
    "channels": (128, 256, 128, 256),
    "stem_chs": 32,
    "num_classes": 7,
}


def timm_model(architecture: str = "resnetv2_50x1_bit", **changes: Any) -> Any:
    """Return a model as timm builds the released ones, but small, in evaluation mode.

    No weight has the value that it starts with, which would hide mistakes.
    """
    model = resnetv2._create_resnetv2_bit(architecture, **{**SMALL, **changes})
    return randomized(model)


@torch.no_grad()
def randomized(model: nn.Module) -> Any:
    """Draw the weights that timm starts with a constant, or with tiny numbers."""
    move_weights(model)
    head = getattr(model.head, "fc", None)
    if isinstance(head, nn.Conv2d):
        head.weight.normal_(std=0.1)
        head.bias.normal_()
    return model.eval()


def released_model(architecture: str, num_classes: int) -> nn.Module:
    """Return a model of full size without memory for its parameters."""
    with torch.device("meta"):
        return timm.create_model(architecture, num_classes=num_classes)


def without_memory(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return tensors of these shapes that are views of one number each."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def save_folder(folder: Path, model: Any, safe: bool = True, **options: Any) -> Path:
    """Save a model as timm does for the Hub."""
    save_for_hf(model, str(folder), safe_serialization=safe, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def google_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return the arrays that Google's file of a timm model's weights would hold, by name."""
    arrays = {
        "root_block/standardized_conv2d/kernel": _kernel(model.stem.conv),
        **_affine("group_norm", model.norm),
    }
    for stage, blocks in enumerate(model.stages, start=1):
        for number, block in enumerate(blocks.blocks, start=1):
            unit = f"block{stage}/unit{number:02d}"
            for letter, norm, convolution in (
                ("a", block.norm1, block.conv1),
                ("b", block.norm2, block.conv2),
                ("c", block.norm3, block.conv3),
            ):
                arrays.update(_affine(f"{unit}/{letter}/group_norm", norm))
                arrays[f"{unit}/{letter}/standardized_conv2d/kernel"] = _kernel(convolution)
            if block.downsample is not None:
                name = f"{unit}/a/proj/standardized_conv2d/kernel"
                arrays[name] = _kernel(block.downsample.conv)
    if isinstance(model.head.fc, nn.Conv2d):
        arrays["head/conv2d/kernel"] = _kernel(model.head.fc)
        arrays["head/conv2d/bias"] = model.head.fc.bias.detach().numpy()
    return {f"resnet/{name}": array for name, array in arrays.items()}


def _kernel(convolution: nn.Conv2d) -> np.ndarray:
    """Return a kernel as (height, width, inputs, outputs)."""
    return convolution.weight.detach().permute(2, 3, 1, 0).contiguous().numpy()


def _affine(name: str, norm: nn.Module) -> dict[str, np.ndarray]:
    return {
        f"{name}/gamma": norm.weight.detach().numpy(),
        f"{name}/beta": norm.bias.detach().numpy(),
    }


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def assert_as_timm(load: Any, model: Any, size: tuple[int, int] = (65, 70)) -> None:
    """Hold the logits of what ``load`` returns for a dtype to a timm model's, in float64 and in float32."""
    channels = model.stem.conv.in_channels
    images = torch.randn(2, channels, *size)
    with torch.no_grad():
        plain = model(images)
        exact = copy.deepcopy(model).double()(images.double())
        assert_close(load(torch.float64)(images.double()).logits, exact)
        assert_as_exact(load(torch.float32)(images).logits, plain, exact)
