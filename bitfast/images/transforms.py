"""The steps of image processing on numpy arrays of shape (..., H, W, C), as transformers rounds them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    resample: Image.Resampling,
    reducing_gap: float | None = None,
) -> np.ndarray:
    """Resize an (H, W, C) image with Pillow, in 8 bits per channel.

    2 and 4 channels are taken as colour and alpha (Pillow weights colour by alpha while it resamples);
    any other number of channels is resized one by one.

    Returns:
        uint8; float32 with values between 0 and 1 if the image had fractions between 0 and 1.

    Raises:
        ValueError: pixels that are neither integers from 0 to 255 nor fractions from 0 to 1.
    """
    pixels, is_fraction = to_bytes(image)

    def resize_with_pillow(part: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(part).resize((width, height), resample, reducing_gap=reducing_gap)
        return np.array(resized)

    channels = pixels.shape[2]
    if channels in (2, 3, 4):
        result = resize_with_pillow(pixels)
    else:
        result = np.stack([resize_with_pillow(pixels[:, :, c]) for c in range(channels)], axis=-1)
    return rescale(result, 1 / 255) if is_fraction else result


def to_bytes(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the pixels as uint8, and whether fractions from 0 to 1 were scaled to get there.

    Raises:
        ValueError: pixels that are neither integers from 0 to 255 nor fractions from 0 to 1.
    """
    if image.dtype == np.uint8:
        return image, False
    low, high = image.min(), image.max()
    if 0 <= low <= high <= 255 and np.allclose(image, image.astype(int)):
        return image.astype(np.uint8), False
    if 0 <= low <= high <= 1:
        return rescale(image, 255).astype(np.uint8), True
    raise ValueError(
        "an image to be resized must hold integers from 0 to 255 or fractions from 0 to 1, "
        f"got {image.dtype} from {low} to {high}"
    )


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut (height, width) out of the center; where the image is smaller, zeros surround it.

    An odd remainder leaves a window within the image one pixel nearer to the top and left, and an
    image within the window one pixel nearer to the bottom and right.
    """
    rows = _overlap(image.shape[-3], height)
    columns = _overlap(image.shape[-2], width)
    inside = image[..., rows[0], columns[0], :]
    if inside.shape[-3:-1] == (height, width):
        return inside
    result = np.zeros((*image.shape[:-3], height, width, image.shape[-1]), dtype=image.dtype)
    result[..., rows[1], columns[1], :] = inside
    return result


def _overlap(have: int, want: int) -> tuple[slice, slice]:
    """Return where the image and its centered window overlap, in the image's and the window's pixels."""
    start = (have - want) // 2
    first, last = max(start, 0), min(start + want, have)
    return slice(first, last), slice(first - start, last - start)


def rescale(image: np.ndarray, scale: float, dtype: Any = np.float32) -> np.ndarray:
    """Multiply in float64, then round to ``dtype``."""
    return (image.astype(np.float64) * scale).astype(dtype)


def normalize(
    image: np.ndarray, mean: float | Collection[float], std: float | Collection[float]
) -> np.ndarray:
    """Subtract the mean and divide by the standard deviation, in the image's dtype if that is floating,
    else in float32.

    Raises:
        ValueError: ``mean`` or ``std`` is neither a number nor one per channel; a ``std`` of 0.
    """
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
    mean, std = statistics(mean, std, image.shape[-1], image.dtype)
    return (image - mean) / std


def statistics(
    mean: float | Collection[float],
    std: float | Collection[float],
    channels: int,
    dtype: Any,
    names: tuple[str, str] = ("mean", "std"),
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation, one number per channel each, in this dtype.

    Raises:
        ValueError: one of them, by these ``names``, is neither a finite number nor one per channel; a
            ``std`` of 0.
    """
    means = _per_channel(names[0], mean, channels, dtype)
    stds = _per_channel(names[1], std, channels, dtype)
    if not stds.all():
        raise ValueError(
            f"{names[1]} must hold numbers other than 0 in {np.dtype(dtype)}, got {stds.tolist()}"
        )
    return means, stds


def _per_channel(
    name: str, values: float | Collection[float], channels: int, dtype: Any
) -> np.ndarray:
    if not isinstance(values, Collection):
        values = [values] * channels
    elif len(values) != channels or isinstance(values, str):
        raise ValueError(
            f"{name} must be a number or hold one for each of the {channels} channels, got {values!r}"
        )
    numbers = np.array(values, dtype=dtype)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must hold finite numbers, got {numbers.tolist()}")
    return numbers
