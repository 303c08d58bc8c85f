"""What becomes of an image in training: resized, cropped and mirrored as bytes, then normalized and mixed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast.finetuning import draws
from bitfast.finetuning.draws import Purpose
from bitfast.finetuning.recipe import Recipe
from bitfast.images.inputs import to_tensor
from bitfast.images.pillow_memory import pixels_of
from bitfast.ops.resize_normalize import resize_normalize

DRAWS_PER_IMAGE = 3
"""For the top and left of its crop, and whether it is mirrored."""

CHANNELS = 3


class View(NamedTuple):
    """How an image is shown to the network.

    Attributes:
        resize: Edge of the square that it is resized to.
        crop: Edge of the square cut out of that.
        top, left: Where.
        is_mirrored: Whether left and right are then exchanged.
    """

    resize: int
    crop: int
    top: int = 0
    left: int = 0
    is_mirrored: bool = False


def training_views(recipe: Recipe, seed: int, step: int, start: int, stop: int) -> list[View]:
    """Return the views of the images from position ``start`` to ``stop`` of a step's whole batch."""
    numbers = draws.bits(seed, Purpose.AUGMENTATION, step, DRAWS_PER_IMAGE * recipe.batch_size)
    numbers = numbers.reshape(-1, DRAWS_PER_IMAGE)[start:stop]
    places = np.uint64(recipe.resize - recipe.crop + 1)
    high = numbers >> np.uint64(32)
    corners = (high[:, :2] * places) >> np.uint64(32)
    is_mirrored = (high[:, 2] >> np.uint64(31)).astype(bool) & recipe.flip
    return [
        View(recipe.resize, recipe.crop, top, left, mirrored)
        for (top, left), mirrored in zip(corners.tolist(), is_mirrored.tolist(), strict=True)
    ]


def evaluation_view(recipe: Recipe) -> View:
    """Return the view of every image in evaluation: resized to the crop's size, and not cropped."""
    return View(recipe.crop, recipe.crop)


def show(image: Image.Image, view: View, resample: int) -> Tensor:
    """Return the view of an image in mode "RGB": uint8, shape (3, crop, crop), channels last in memory.

    The bytes are Pillow's: ``image.resize(...).crop(...)``, and ``ImageOps.mirror`` of that.
    """
    pixels = resize_normalize(
        [to_tensor(pixels_of(image))],
        [(view.resize, view.resize)],
        (view.crop, view.crop),
        resample,
        offsets=[(view.top, view.left)],
        dtype=torch.uint8,
        memory_format=torch.channels_last,
    )[0]
    return pixels.flip(2) if view.is_mirrored else pixels


def normalized(
    images: Tensor, processor: Any, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Return ``pixel_values`` of resized images: rescaled and normalized on the device, in one op.

    Args:
        images: uint8, (n, 3, H, W), n at least 1.
        processor: As :meth:`Recipe.processor` returns it. The values are exactly its.
        device: Where the result is to be.
        dtype: Of the result.

    Returns:
        (n, 3, H, W), in the memory format of ``images``.
    """
    images = images.to(device, non_blocking=True)
    is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    height, width = images.shape[2:]
    # Without resampling the op is a table of what each byte becomes.
    return resize_normalize(
        list(images.unbind()),
        [(height, width)] * len(images),
        rescale_factor=processor.rescale_factor if processor.do_rescale else None,
        mean=_per_channel(processor.image_mean) if processor.do_normalize else None,
        std=_per_channel(processor.image_std) if processor.do_normalize else None,
        dtype=dtype,
        memory_format=torch.channels_last if is_channels_last else torch.contiguous_format,
        layout="CHW",
    )


def _per_channel(values: float | Collection[float]) -> list[float]:
    numbers = list(values) if isinstance(values, Collection) else [values] * CHANNELS
    # The processor computes with them in float32.
    return np.array(numbers, np.float32).tolist()


# ---- MixUp --------------------------------------------------------------------------------------


def lambda_of(seed: int, step: int, alpha: float) -> float:
    """Return MixUp's lambda of a step, drawn from Beta(alpha, alpha); 1 if alpha is 0."""
    if alpha == 0:
        return 1.0
    return np.random.Generator(draws.generator(seed, Purpose.MIXUP, step)).beta(alpha, alpha)


def mix(images: Tensor, labels: Tensor, classes: int, lam: float) -> tuple[Tensor, Tensor]:
    """Mix neighbours: image i becomes ``lam * image[i] + (1 - lam) * image[i ^ 1]``, and so do labels.

    Of an odd number the last image stays as it is. MixUp: Zhang et al., https://arxiv.org/abs/1710.09412.

    Args:
        images: Floating, (n, C, H, W).
        labels: int64, (n,).
        classes: How many there are.
        lam: From 0 to 1.

    Returns:
        The mixed images, and probabilities of classes, float32, (n, classes), for ``cross_entropy``.
    """
    # The order of a batch is random already: neighbours are partners drawn at random.
    count = len(labels)
    partners = torch.arange(count, device=labels.device) ^ 1
    partners = partners.clamp(max=count - 1)
    certain = torch.nn.functional.one_hot(labels, classes).float()
    others = torch.empty_like(images)
    torch.index_select(images, 0, partners.to(images.device), out=others)
    return others.lerp_(images, lam), certain[partners].lerp_(certain, lam)
