"""Processing images by ``resize_normalize``, in one call for all images of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from bitfast.images.inputs import parse_size
from bitfast.memory_format import format_for
from bitfast.ops.resize_normalize import INSTALLED_PILLOW, resize_normalize


class Recipe(NamedTuple):
    """The arguments of ``resize_normalize`` that images of one kind share.

    Attributes:
        crop: (height, width) of the result.
        resample: Pillow's filter number.
        factors: What pixels are multiplied by, one after the other.
        mean, std: One number per channel, or none.
        dtype: Of the result.
        channels_last: Whether the result is (H, W, C) rather than (C, H, W).
        pillow_version: Of the Pillow to equal.
    """

    crop: tuple[int, int]
    resample: int
    factors: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    channels_last: bool = False
    pillow_version: tuple[int, ...] = INSTALLED_PILLOW


class Job(NamedTuple):
    """An image to be processed, and how.

    Attributes:
        image: Shape (H, W, C), uint8 or floating.
        size: (height, width) after resizing.
        offset: (top, left) of the crop in the resized image.
        recipe: The other arguments.
    """

    image: Tensor
    size: tuple[int, int]
    offset: tuple[int, int]
    recipe: Recipe


def process(jobs: Sequence[Job]) -> Tensor | list[Tensor]:
    """Return the results: one tensor (N, ...) if all images are of one kind, else a list of tensors."""
    kinds: dict[tuple[Recipe, int, torch.dtype, torch.device], list[int]] = {}
    for i, job in enumerate(jobs):
        kind = job.recipe, job.image.shape[2], job.image.dtype, job.image.device
        kinds.setdefault(kind, []).append(i)
    if len(kinds) == 1:
        return _process_alike(jobs)
    results: list[Tensor] = [jobs[0].image] * len(jobs)
    for members in kinds.values():
        batch = _process_alike([jobs[i] for i in members])
        for i, result in zip(members, batch, strict=True):
            results[i] = result
    return results


def _process_alike(jobs: Sequence[Job]) -> Tensor:
    recipe = jobs[0].recipe
    batch = resize_normalize(
        [job.image for job in jobs],
        [job.size for job in jobs],
        recipe.crop,
        recipe.resample,
        recipe.factors,
        recipe.mean or None,
        recipe.std or None,
        offsets=[job.offset for job in jobs],
        dtype=recipe.dtype,
        memory_format=format_for(recipe.channels_last),
        pillow_version=recipe.pillow_version,
    )
    return batch.permute(0, 2, 3, 1) if recipe.channels_last else batch


def check_resized_size(height: int, width: int, size: tuple[int, int]) -> None:
    """Raise ValueError if the resized image would exceed Pillow's limit, as that of a line of pixels may.

    Args:
        height, width: As it is.
        size: (height, width) after resizing.

    Raises:
        ValueError: the resized image would have more pixels than Pillow opens.
    """
    if _is_too_large(size):
        raise ValueError(
            f"{width}x{height} pixels would be resized to {size[1]}x{size[0]}, {_more_than_the_limit()}"
        )


def parse_crop_size(value: Any) -> tuple[int, int]:
    """Return a ``crop_size`` as (height, width).

    Raises:
        ValueError: it is not a size, or has more pixels than Pillow opens.
    """
    size = parse_size("crop_size", value, default_to_square=True)
    if "height" not in size:
        raise ValueError(f"crop_size must hold height and width, got {size!r}")
    crop = size["height"], size["width"]
    if _is_too_large(crop):
        raise ValueError(f"crop_size: {crop[1]}x{crop[0]} pixels are {_more_than_the_limit()}")
    return crop


def _is_too_large(size: tuple[int, int]) -> bool:
    limit = Image.MAX_IMAGE_PIXELS
    # Where Pillow's warning becomes an error.
    return limit is not None and size[0] * size[1] > 2 * limit


def _more_than_the_limit() -> str:
    assert Image.MAX_IMAGE_PIXELS is not None
    return (
        f"more than the limit of {2 * Image.MAX_IMAGE_PIXELS} pixels"
        " (twice PIL.Image.MAX_IMAGE_PIXELS)"
    )
