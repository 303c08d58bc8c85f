"""Models and images for the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitfast import BitConfig, BitForImageClassification, BitImageProcessor

LABELS = ["cat", "dog with a long name", "Möwe"]
SIZE = 24


def save_model(folder: Path, **settings: Any) -> Path:
    config = BitConfig(
        **{
            "embedding_size": 8,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_groups": 2,
            "id2label": dict(enumerate(LABELS)),
            **settings,
        }
    )
    BitForImageClassification(config).save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    processor.save_pretrained(folder)
    return folder


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return random pixels in a mode of Pillow."""
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, size[::-1], dtype=np.uint16))
    return Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


GOOD = [
    "16-bit.png",
    "animation.gif",
    "cmyk.jpg",
    "gray.png",
    "palette.PNG",
    "rgb.webp",
    "rgba.png",
]
BAD = {
    "empty.png": "the file is empty",
    "link.png": "No such file or directory",
    "text.png": "not an image that Pillow can read",
    "truncated.jpg": "image file is truncated",
}


Run = Callable[..., tuple[int, str, str]]


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def scores_from_api(
    model: Path, path: Path, dtype: str = "float32", processor: Any = BitImageProcessor
) -> list[float]:
    network = BitForImageClassification.from_pretrained(model, dtype=dtype)
    pixels = processor.from_pretrained(model)(Image.open(path), return_tensors="pt")
    with torch.no_grad():
        logits = network(pixels["pixel_values"].to(network.dtype)).logits
    return logits.float().softmax(-1)[0].tolist()
