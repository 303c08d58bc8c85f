"""Labelled images that packages ship, as folders on disk: scikit-learn's digits, scikit-image's photographs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_digits

FACES_FILE = Path(skimage.__file__).parent / "data" / "lfw_subset.npy"
"""200 photographs (25x25, gray, float from 0 to 1) of Labeled Faces in the Wild: 100 faces, then 100 others."""


def digits() -> list[tuple[Image.Image, str]]:
    """1,797 handwritten digits of 8x8 pixels and their names, "0" to "9"."""
    data = load_digits()
    pixels = (255 * data.images / 16).round().astype(np.uint8)
    names = [str(label) for label in data.target]
    return [(Image.fromarray(image), name) for image, name in zip(pixels, names, strict=True)]


def faces() -> list[tuple[Image.Image, str]]:
    """200 small photographs and their names, "face" or "other"."""
    pixels = (255 * np.load(FACES_FILE)).round().astype(np.uint8)
    names = ["face"] * 100 + ["other"] * 100
    return [(Image.fromarray(image), name) for image, name in zip(pixels, names, strict=True)]


def save_by_class(pairs: Iterable[tuple[Image.Image, str]], folder: Path) -> Path:
    """Write images as PNG files into a folder for each name; return the folder of these folders."""
    for number, (image, name) in enumerate(pairs):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{number:05}.png")
    return folder
