"""The model that ships with bitfast: a small BiT trained on scikit-learn's handwritten digits.

``BitForImageClassification.from_pretrained(MODEL_PATH)`` loads it, and
:func:`held_out_images` returns the images that its accuracy was measured on. ``train.py`` made both.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bitfast.digits.sheet import read_sheet

MODEL_PATH = Path(__file__).resolve().parent / "model"
"""Folder of the trained model, its image processor, its model card and the held-out images."""


def held_out_images() -> list[tuple[Image.Image, int]]:
    """Return the 8x8 grayscale images that the model has not seen in training, and their digits."""
    return read_sheet(MODEL_PATH)


__all__ = ["MODEL_PATH", "held_out_images"]
