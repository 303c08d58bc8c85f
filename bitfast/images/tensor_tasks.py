"""What BitImageProcessorFast does to each image of a batch, worked out from its shape and dtype alone."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitfast.images import transforms
from bitfast.images.batches import Kind, Recipe, Task, check_resized_size
from bitfast.images.inputs import (
    raise_named,
    resized_size,
    size_with_aspect_ratio,
    size_within,
)
from bitfast.images.parameters import Options

WIDTH_FIRST = (12, 1)
"""The last version of Pillow that always resamples along the width first, as torchvision does."""


class ImageTask(NamedTuple):
    """The task of taking the steps of an image.

    Attributes:
        task: Of the image as ``resize_normalize`` takes it.
        changes_image: Whether ``tensor_steps`` makes that of the image.
        dtype: Of the result.
    """

    task: Task
    changes_image: bool
    dtype: torch.dtype


def tasks_of(images: Sequence[Tensor], options: Options) -> list[ImageTask]:
    """Return the task of each image (C, H, W), worked out once for all images of one shape.

    Raises:
        ValueError: a size or a mean that does not fit an image; the message says which.
    """
    makers: dict[Hashable, _TaskMaker] = {}
    known: dict[Hashable, ImageTask] = {}
    tasks: list[ImageTask] = []
    try:
        for image in images:
            shape, dtype, device = image.shape, image.dtype, image.device
            task = known.get((shape, dtype, device))
            if task is None:
                channels, height, width = shape
                kind = channels, dtype, device
                if kind not in makers:
                    makers[kind] = _TaskMaker(*kind, options)
                task = known[shape, dtype, device] = makers[kind].task(height, width)
            tasks.append(task)
    except ValueError as error:
        raise_named(len(tasks), error)
    return tasks


class _TaskMaker:
    """Makes the tasks of images of one number of channels, dtype and device."""

    def __init__(
        self, channels: int, dtype: torch.dtype, device: torch.device, options: Options
    ) -> None:
        """Work out what does not depend on the size.

        Raises:
            ValueError: a mean or a standard deviation that does not fit.
        """
        self._options, self._device = options, device
        self._channels = channels
        if options.mean is not None and channels == 1:
            self._channels = max(_length(options.mean), _length(options.std))
        self._rescaling = _rescaling(self._channels, dtype, options)
        are_integers = not dtype.is_floating_point and dtype != torch.uint8
        self._dtype = torch.float64 if are_integers else dtype  # exact
        self._changes_images = are_integers or self._channels != channels
        self._result_dtype = _result_dtype(dtype, options)
        self._kinds: dict[tuple[int, int], Kind] = {}

    def task(self, height: int, width: int) -> ImageTask:
        """Return the task of an image of this size.

        Raises:
            ValueError: it cannot be resized so.
        """
        size = size_after_resizing(height, width, self._options)
        crop = size if self._options.crop is None else self._options.crop
        kind = self._kinds.get(crop)
        if kind is None:
            kind = self._kinds[crop] = self._kind(crop)
        offset = center_offset(size[0], crop[0]), center_offset(size[1], crop[1])
        is_resized_first = self._options.nearest_mode is not None and size != (height, width)
        return ImageTask(
            Task(size, offset, kind), self._changes_images or is_resized_first, self._result_dtype
        )

    def _kind(self, crop: tuple[int, int]) -> Kind:
        factors, mean, std = self._rescaling
        dtype = _computed_dtype(self._dtype, bool(factors or mean), bool(mean))
        recipe = Recipe(
            crop, self._options.resample, factors, mean, std, dtype, pillow_version=WIDTH_FIRST
        )
        return Kind(recipe, self._channels, self._dtype, self._device)


# ---- sizes and offsets ---------------------------------------------------------------------------


def size_after_resizing(height: int, width: int, options: Options) -> tuple[int, int]:
    """Return (height, width) of an image after it has been resized, if it is to be.

    Raises:
        ValueError: ``options.size`` does not say; a line of the image would vanish, or more pixels come out
            than Pillow opens.
    """
    size = options.size
    if size is None:
        return height, width
    if set(size) == {"shortest_edge", "longest_edge"}:
        result = size_with_aspect_ratio(height, width, size["shortest_edge"], size["longest_edge"])
    elif "max_height" in size:
        result = size_within(height, width, size["max_height"], size["max_width"])
    else:
        result = resized_size(height, width, size)
    if min(result) < 1:
        raise ValueError(f"{width}x{height} pixels would be resized to {result[1]}x{result[0]}")
    check_resized_size(height, width, result)
    return result


def sizes_after_resizing(images: Sequence[Tensor], options: Options) -> list[tuple[int, int]]:
    """Return :func:`size_after_resizing` of each image; an error says of which."""
    sizes: list[tuple[int, int]] = []
    try:
        for image in images:
            sizes.append(size_after_resizing(image.shape[1], image.shape[2], options))
    except ValueError as error:
        raise_named(len(sizes), error)
    return sizes


def center_offset(have: int, want: int) -> int:
    """Return where a window of ``want`` pixels begins in ``have``; negative: zeros come first.

    As torchvision has it: halves go to the even number, and a smaller image stands nearer to the top and
    left in its window.
    """
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


# ---- values ------------------------------------------------------------------------------------------


def _rescaling(
    channels: int, dtype: torch.dtype, options: Options
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return factors, mean and std for an image of this dtype, such that rounding is that of tensors.

    Rescaled and normalized at once, the statistics are divided by the factor, as float32 numbers.
    """
    if options.mean is None:
        if options.factor is None:
            return (), (), ()
        # The op's product is of float64 numbers, and exact if these are float32 numbers.
        exact = dtype == torch.float64
        return (options.factor if exact else float(np.float32(options.factor)),), (), ()
    inverse = np.float32(1) if options.factor is None else np.float32(1.0 / options.factor)
    mean, std = transforms.statistics(
        _one_for_all(options.mean),
        _one_for_all(options.std),
        channels,
        np.float32,
        ("image_mean", "image_std"),
    )
    return (), tuple((mean * inverse).tolist()), tuple((std * inverse).tolist())


def _length(values: Any) -> int:
    return len(values) if isinstance(values, Collection) else 1


def _one_for_all(values: Any) -> Any:
    """Return the number if there is only one, for every channel; otherwise the values as they are."""
    return next(iter(values)) if _length(values) == 1 and isinstance(values, Collection) else values


def _computed_dtype(image: torch.dtype, is_scaled: bool, is_normalized: bool) -> torch.dtype:
    """Return the dtype in which the op returns an image of this dtype."""
    if is_normalized or (is_scaled and not image.is_floating_point):
        return torch.float32
    return image


def _result_dtype(image: torch.dtype, options: Options) -> torch.dtype:
    """Return the dtype of the result for an image that was given in this one."""
    return _computed_dtype(
        image, options.factor is not None or options.mean is not None, options.mean is not None
    )
