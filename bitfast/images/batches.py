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
    """The arguments of ``resize_normalize`` besides the images, their sizes and offsets.

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


class Kind(NamedTuple):
    """What all images of one call of ``resize_normalize`` share: the recipe, and what they are."""

    recipe: Recipe
    channels: int
    dtype: torch.dtype
    device: torch.device


class Task(NamedTuple):
    """How an image is to be processed.

    Attributes:
        size: (height, width) after resizing.
        offset: (top, left) of the crop in the resized image.
        kind: Of the image.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    kind: Kind


def process(
    images: Sequence[Tensor], tasks: Sequence[Task], layout: str = "HWC"
) -> Tensor | list[Tensor]:
    """Return the results: one tensor (N, ...) if all images are of one kind, else a list of tensors.

    Args:
        images: Shape (H, W, C) or (C, H, W), by ``layout``; uint8 or floating.
        tasks: One for each image.
        layout: "HWC" or "CHW".
    """
    first = tasks[0].kind
    if all(task.kind is first for task in tasks):
        return _process_alike(images, tasks, layout)
    kinds: dict[Kind, list[int]] = {}
    for i, task in enumerate(tasks):
        kinds.setdefault(task.kind, []).append(i)
    if len(kinds) == 1:
        return _process_alike(images, tasks, layout)
    results = list(images)
    for members in kinds.values():
        batch = _process_alike([images[i] for i in members], [tasks[i] for i in members], layout)
        for i, result in zip(members, batch, strict=True):
            results[i] = result
    return results


def _process_alike(images: Sequence[Tensor], tasks: Sequence[Task], layout: str) -> Tensor:
    recipe = tasks[0].kind.recipe
    batch = resize_normalize(
        images,
        [task.size for task in tasks],
        recipe.crop,
        recipe.resample,
        recipe.factors,
        recipe.mean or None,
        recipe.std or None,
        offsets=[task.offset for task in tasks],
        dtype=recipe.dtype,
        memory_format=format_for(recipe.channels_last),
        layout=layout,
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
