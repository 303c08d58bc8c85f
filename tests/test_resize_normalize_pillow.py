"""uint8 images are resized as Pillow resizes them: not one byte differs, in thousands of drawn cases.

BITFAST_RESIZE_CASES draws more than the 5000 per filter and backend:

    BITFAST_RESIZE_CASES=200000 python -m pytest tests/test_resize_normalize_pillow.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from bitfast import extension
from bitfast.backends import use_backend
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize
from tests.image_layouts import LAYOUTS, laid_out

CASES = 5000


@dataclass(frozen=True)
class Case:
    """An image, in one of several layouts, and the window of its resized version that is wanted."""

    pixels: np.ndarray
    layout: str
    size: tuple[int, int]
    crop: tuple[int, int]
    offset: tuple[int, int]
    channels_last: bool

    def __str__(self) -> str:
        return (
            f"{self.pixels.shape} {self.layout} to {self.size}, {self.crop} at {self.offset},"
            f" channels_last={self.channels_last}"
        )


def draw_size(random: np.random.Generator) -> tuple[int, int]:
    """Most edges are short, because that is quick; some images are lines."""
    kind = random.random()
    if kind < 0.03:
        edges = int(random.integers(1, 4)), int(random.integers(300, 3001))
        return edges if random.random() < 0.5 else edges[::-1]
    longest = 301 if kind < 0.2 else 41
    return int(random.integers(1, longest)), int(random.integers(1, longest))


def draw_case(random: np.random.Generator) -> Case:
    height, width = draw_size(random)
    new_height, new_width = draw_size(random)
    if height * new_width > 300_000 or new_height * width > 300_000:  # as an intermediate image
        new_height, new_width = 7, 7
    channels = int(random.choice([1, 3, 3, 3]))
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if (
        random.random() < 0.5
    ):  # of two values only, which overshoots under filters with negative lobes
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    crop, offset = (new_height, new_width), (0, 0)
    if random.random() < 0.7:
        crop = int(random.integers(1, 60)), int(random.integers(1, 60))
        offset = (
            int(random.integers(-20, new_height + 5)),
            int(random.integers(-20, new_width + 5)),
        )
    layout = str(random.choice(LAYOUTS[:-1]))  # not the one that changes the pixels
    return Case(pixels, layout, (new_height, new_width), crop, offset, random.random() < 0.5)


def with_pillow(case: Case, resample: int) -> np.ndarray:
    """Return the window (height, width, C)."""
    pixels = case.pixels if case.pixels.shape[2] == 3 else case.pixels[..., 0]
    resized = np.array(Image.fromarray(pixels).resize(case.size[::-1], resample))
    resized = resized.reshape(*case.size, -1)
    result = np.zeros((*case.crop, resized.shape[2]), np.uint8)
    (top, left), (height, width) = case.offset, case.crop
    part = resized[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    result[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]] = part
    return result


@pytest.mark.parametrize("resample", range(len(RESAMPLE_NAMES)), ids=RESAMPLE_NAMES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_byte_differs(backend: str, resample: int, seed: int) -> None:
    if backend == "native" and extension.CPU.problem is not None:
        pytest.skip(f"no extension: {extension.CPU.problem}")
    random = np.random.default_rng(seed)
    for _ in range(int(os.environ.get("BITFAST_RESIZE_CASES") or CASES)):
        case = draw_case(random)
        with use_backend(backend):
            result = resize_normalize(
                [laid_out(torch.from_numpy(case.pixels), case.layout)],
                [case.size],
                case.crop,
                resample,
                offsets=[case.offset],
                dtype=torch.uint8,
                memory_format=torch.channels_last if case.channels_last else torch.contiguous_format,
            )  # fmt: skip
        assert np.array_equal(result[0].permute(1, 2, 0).numpy(), with_pillow(case, resample)), case
