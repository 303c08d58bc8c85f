"""Images are read where Pillow keeps them, safely, and copied where that cannot be."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitfast import BitImageProcessor
from bitfast.images import pillow_memory
from bitfast.images.pillow_memory import pixels_of


def random_image(mode: str, width: int = 41, height: int = 23) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def is_in_place(image: Image.Image) -> bool:
    """Whether two readings are of the same memory."""
    return np.shares_memory(pixels_of(image), pixels_of(image))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I", "F", "HSV"])
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (41, 23)])
def test_pixels(mode: str, size: tuple[int, int]) -> None:
    image = random_image(mode, *size) if mode != "LA" else random_image("L", *size).convert("LA")
    expected = np.array(image)
    pixels = pixels_of(image)
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_block_is_read_in_place(mode: str) -> None:
    image = random_image(mode, 640, 427)
    assert is_in_place(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that is locked
        torch.from_numpy(pixels_of(image))


def test_the_memory_outlives_the_image() -> None:
    image = random_image("RGB", 300, 200)
    expected = np.array(image)
    pixels = torch.from_numpy(pixels_of(image))
    del image
    gc.collect()
    others = [random_image("RGB", 300, 200) for _ in range(30)]  # would take the memory over
    assert np.array_equal(pixels.numpy(), expected)
    assert len(others) == 30


def test_several_blocks_are_copied() -> None:
    image = Image.new("RGB", (2500, 2100), (1, 2, 3))  # 21 MB
    image.putpixel((2499, 2099), (4, 5, 6))
    assert not is_in_place(image)
    pixels = pixels_of(image)
    assert pixels.shape == (2100, 2500, 3)
    assert pixels[0, 0].tolist() == [1, 2, 3]
    assert pixels[-1, -1].tolist() == [4, 5, 6]


@pytest.fixture
def aligned_rows() -> Iterator[None]:
    before = Image.core.get_alignment()
    Image.core.set_alignment(64)
    yield
    Image.core.set_alignment(before)


@pytest.mark.usefixtures("aligned_rows")
def test_rows_with_gaps_between_them_are_copied() -> None:
    image = random_image("RGB")
    assert not is_in_place(image)
    assert np.array_equal(pixels_of(image), np.array(image))


def test_memory_that_is_not_pillows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mapped files and arrays, which Pillow before 13 must not be asked for: it would crash."""
    array = np.random.default_rng(0).integers(0, 256, (50, 70), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.pgm")
    foreign = [Image.fromarray(array), Image.open(tmp_path / "image.pgm")]
    turned = Image.frombuffer("L", (60, 50), array.tobytes(), "raw", "L", 70, -1)
    assert np.array_equal(pixels_of(turned), array[::-1, :60])
    if pillow_memory.EXPORTS_ANY_MEMORY:
        for image in foreign:
            assert np.array_equal(pixels_of(image), array)

    monkeypatch.setattr(pillow_memory, "EXPORTS_ANY_MEMORY", False)
    rgb = random_image("RGB")
    assert is_in_place(rgb)
    if hasattr(Image, "fromarrow"):
        borrowed = Image.fromarrow(rgb, "RGB", rgb.size)
        assert not is_in_place(borrowed)
        assert np.array_equal(pixels_of(borrowed), np.array(rgb))
    for image in foreign:
        assert not is_in_place(image)
        assert np.array_equal(pixels_of(image), array)


def test_an_older_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image("RGB")
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert not is_in_place(image)
    assert np.array_equal(pixels_of(image), np.array(image))


def test_another_layout_than_expected_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image("RGB")
    monkeypatch.setitem(pillow_memory.BYTES_PER_PIXEL, "RGB", 3)
    assert not is_in_place(image)
    assert np.array_equal(pixels_of(image), np.array(image))


def test_lazily_opened_and_derived_images(tmp_path: Path) -> None:
    original = random_image("RGB", 50, 40)
    original.save(tmp_path / "image.png")
    opened = Image.open(tmp_path / "image.png")
    assert np.array_equal(pixels_of(opened), np.array(original))
    for derived in (
        original.crop((3, 4, 33, 24)),
        original.transpose(Image.Transpose.ROTATE_90),
        original.copy(),
    ):
        assert np.array_equal(pixels_of(derived), np.array(derived))


def test_what_is_read_is_not_written_to() -> None:
    class Inverted(BitImageProcessor):
        def center_crop(self, image: np.ndarray, *args: object, **kwargs: object) -> np.ndarray:
            image[...] = 255 - image  # as nobody should
            return image

    image = random_image("RGB")
    before = np.array(image)
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    # Beside the other image this one is not processed by the op, which never returns its input.
    results = BitImageProcessor(**steps)([image, before.astype(np.float32)]).pixel_values
    for result in results:
        result[...] = 0
    Inverted(do_resize=False)(image)
    BitImageProcessor()(image)
    assert np.array_equal(np.array(image), before)
