"""Labelled images to fine-tune on: opened, divided into training and validation, read one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

VALID_FRACTION = 0.1
"""Of each class, held out for validation where the data have no split of their own."""


class Problem(NamedTuple):
    """An image that was left out: its name, as in the data, and why."""

    name: str
    reason: str


class Dataset:
    """Images and their labels. Images are decoded when they are read; only names, labels and sizes are kept.

    Pickled, it is opened again by whoever unpickles it (a worker process).

    Attributes:
        labels: Index of each image's class, int64, shape (N,).
        sizes: (height, width) of each image in pixels as it is stored, int32, shape (N, 2).
    """

    labels: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """The name of each image: its path as in the data (relative to them), or file and row."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Return an image, decoded, in mode "RGB".

        It is not turned as its EXIF data say: neither do ``bitfast classify`` nor the image processors,
        given a PIL image.

        Raises:
            Exception: whatever Pillow raises where the image is broken; see ``images.files.describe``.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash of names, labels, sizes and numbers of bytes: other data, another fingerprint."""
        raise NotImplementedError


@dataclass(frozen=True)
class Splits:
    """What a model is trained on and measured with.

    Attributes:
        classes: Names, in the order of the labels.
        training: At least one image.
        validation: May be empty.
        problems: Images left out because they cannot be read or have no label.
        notes: What else the user should know, a line each.
    """

    classes: tuple[str, ...]
    training: Dataset
    validation: Dataset
    problems: list[Problem]
    notes: list[str]


def open_splits(
    data: Path,
    *,
    valid: Path | None = None,
    valid_fraction: float = VALID_FRACTION,
    per_class: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Splits:
    """Open labelled images, look at the header of each, and divide them into training and validation.

    Args:
        data: A folder with a folder of images per class (or ``train`` and, if they exist, ``valid``, ``val``,
            ``validation`` or ``test`` with these in them); a CSV or Parquet file; or a folder that
            ``datasets`` saved.
        valid: The same, for validation.
        valid_fraction: Of each class, held out for validation if neither ``valid`` nor ``data`` has any.
        per_class: Training images of each class, drawn by the seed; None: all.
        seed: Decides what is held out and drawn.
        progress: Called with (images looked at, of how many).

    Raises:
        OSError: ``data`` or ``valid`` cannot be read.
        ValueError: they are not as described, or what they hold is of no use; the message says why.
    """
    raise NotImplementedError
