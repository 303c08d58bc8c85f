"""The steps of BitImageProcessorFast on tensors: all at once for a batch, or one after the other.

Images are (C, H, W), of any sizes, dtypes and devices; the single steps also take (..., C, H, W).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.images import transforms
from bitfast.images.batches import Job, Recipe, check_resized_size, parse_crop_size, process
from bitfast.images.inputs import (
    check_range,
    raise_named,
    resized_size,
    size_with_aspect_ratio,
    size_within,
)
from bitfast.images.parameters import Options, parse_resize
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize

WIDTH_FIRST = (12, 1)
"""The last version of Pillow that always resamples along the width first, as torchvision does."""

TRUNCATED = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Integer dtypes that torchvision truncates, not rounds, after it has resized them as floating numbers."""


def check_pixels(images: Sequence[Tensor], options: Options, stacklevel: int) -> None:
    """Warn of unusual values of pixels that are to be rescaled, except on a GPU.

    Raises:
        ValueError: no image has such pixels.
    """
    if options.factor is None:
        return
    ranges = []
    for i, image in enumerate(images):
        if image.device.type == "cpu" and image.dtype != torch.uint8:
            # torch compares neither bool nor unsigned integers of more than 8 bits.
            pixels = image.detach() if image.is_floating_point() else image.double()
            low, high = (float(value) for value in pixels.aminmax())
            ranges.append((i, low, high))
    check_range(ranges, options.factor, stacklevel + 1)
    if (
        ranges
        and ranges[0][0] == 0
        and images[0].is_floating_point()
        and 0 <= ranges[0][1] <= ranges[0][2] <= 1
    ):
        warnings.warn(
            "the pixels of the first image are between 0 and 1 already; if those of the others "
            "are too, pass do_rescale=False",
            stacklevel=stacklevel + 1,
        )


# ---- all steps at once --------------------------------------------------------------------------


def process_at_once(images: Sequence[Tensor], options: Options) -> Tensor | list[Tensor]:
    """Take the steps of images; return one tensor (N, C, H, W) if all are of one kind, else a list.

    Raises:
        ValueError: a size or a mean that does not fit an image; the message says which.
    """
    if options[3:] == Options()[3:] and options.size is None:
        return list(images)
    jobs: list[Job] = []
    try:
        for image in images:
            jobs.append(_job(image.detach().permute(1, 2, 0), options))
    except ValueError as error:
        raise_named(len(jobs), error)
    dtypes = [_result_dtype(image.dtype, options) for image in images]
    results = process(jobs)
    if isinstance(results, Tensor) and set(dtypes) == {results.dtype}:
        return results
    return [result.to(dtype) for result, dtype in zip(results, dtypes, strict=True)]


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


def _job(image: Tensor, options: Options) -> Job:
    """Return the job of taking the steps of an image (H, W, C)."""
    height, width, channels = image.shape
    if options.mean is not None and channels == 1:
        channels = max(_length(options.mean), _length(options.std))
        image = image.expand(height, width, channels)
    factors, mean, std = _rescaling(channels, image.dtype, options)
    size = size_after_resizing(height, width, options)
    given = image.dtype
    are_integers = not image.is_floating_point() and given != torch.uint8
    if are_integers:
        image = image.double()  # exact
    if size != (height, width):
        if options.nearest_mode is not None:
            batch = image.permute(2, 0, 1)[None]
            image = F.interpolate(batch, size, mode=options.nearest_mode)[0].permute(1, 2, 0)
        elif are_integers:
            image = _resize_integers(image, size, options.resample, given)
    crop = size if options.crop is None else options.crop
    dtype = _computed_dtype(image.dtype, bool(factors or mean), bool(mean))
    recipe = Recipe(crop, options.resample, factors, mean, std, dtype, pillow_version=WIDTH_FIRST)
    return Job(image, size, (_offset(size[0], crop[0]), _offset(size[1], crop[1])), recipe)


def _resize_integers(
    image: Tensor, size: tuple[int, int], resample: int, dtype: torch.dtype
) -> Tensor:
    """Resize integers that are no bytes, shape (H, W, C) of float64, which have been of ``dtype``.

    As in torchvision, they are floating numbers meanwhile, and then rounded (:data:`TRUNCATED` toward 0).
    Where cubes overshoot the dtype's range they stop at its ends, while torchvision lets them wrap around.
    """
    (resized,) = resize_normalize(
        [image.float()], [size], resample=resample, pillow_version=WIDTH_FIRST
    )
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    whole = resized.trunc() if dtype in TRUNCATED else resized.round()
    return whole.double().clamp(low, high).permute(1, 2, 0)


def _offset(have: int, want: int) -> int:
    """Return where a window of ``want`` pixels begins in ``have``; negative: zeros come first.

    As torchvision has it: halves go to the even number, and a smaller image stands nearer to the top and
    left in its window.
    """
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


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


# ---- single steps -------------------------------------------------------------------------------


def call_by_shape(
    images: Sequence[Tensor],
    keys: Sequence[Hashable],
    step: Callable[[Tensor], Tensor],
    disable_grouping: bool | None,
) -> list[Tensor]:
    """Return the results of a step that is called once for all images of one key, stacked to (N, C, H, W).

    Args:
        images: The images.
        keys: One per image. Images of one key have one shape.
        step: Returns as many images as it is given.
        disable_grouping: True: call it for each image, as a batch of one.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (image, key) in enumerate(zip(images, keys, strict=True)):
        kind = i if disable_grouping else (key, image.shape[0], image.dtype, image.device)
        groups.setdefault(kind, []).append(i)
    results: list[Tensor] = list(images)
    for members in groups.values():
        # Stacked even if there is only one: a step may write to its copy.
        for i, result in zip(members, step(torch.stack([images[i] for i in members])), strict=True):
            results[i] = result
    return results


def resize(images: Tensor, options: Options, antialias: bool) -> Tensor:
    """Return images (..., C, H, W) resized as ``options`` say.

    Raises:
        ValueError: a filter that torch has no form of, where it is needed: without antialiasing, and
            where a gradient is recorded.
    """
    size = size_after_resizing(images.shape[-2], images.shape[-1], options)
    if size == tuple(images.shape[-2:]):
        return images
    flat = images.flatten(0, -4) if images.dim() > 3 else images[None]
    if is_recorded(images) or not (antialias or options.nearest_mode):
        resized = _interpolate(flat, size, options, antialias)
    else:
        results = process_at_once(list(flat), options)
        resized = results if isinstance(results, Tensor) else torch.stack(results)
    return resized.view(*images.shape[:-2], *size)


def _interpolate(
    images: Tensor, size: tuple[int, int], options: Options, antialias: bool
) -> Tensor:
    if options.nearest_mode is not None:
        return F.interpolate(images, size, mode=options.nearest_mode)
    mode = RESAMPLE_NAMES[options.resample].lower()
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(
            "interpolation must be nearest, bilinear or bicubic without antialiasing and where a gradient "
            f"is recorded, got {mode}"
        )
    exact = images.dtype in (torch.float32, torch.float64)
    pixels = images if exact else images.float()
    pixels = F.interpolate(pixels, size, mode=mode, align_corners=False, antialias=antialias)
    if images.is_floating_point():
        return pixels.to(images.dtype)
    if images.dtype == torch.uint8:
        pixels = pixels.clamp(0, 255)
    return (pixels if images.dtype in TRUNCATED else pixels.round()).to(images.dtype)


def is_recorded(images: Tensor) -> bool:
    """Whether autograd records operations on these images."""
    return torch.is_grad_enabled() and images.requires_grad


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Cut (height, width) out of the center of images (..., C, H, W); zeros surround what is smaller."""
    top, left = (
        _offset(have, want) for have, want in zip(images.shape[-2:], (height, width), strict=True)
    )
    inside = images[..., max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[-2:] == (height, width):
        return inside
    result = images.new_zeros((*images.shape[:-2], height, width))
    rows, columns = max(-top, 0), max(-left, 0)
    result[..., rows : rows + inside.shape[-2], columns : columns + inside.shape[-1]] = inside
    return result


def normalize(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Return (images - mean) / std for floating images (..., C, H, W), in their dtype.

    Raises:
        TypeError: the images are not floating.
        ValueError: they have no channels; a ``std`` of 0.
    """
    if not images.is_floating_point():
        raise TypeError(f"image must be floating to be normalized, got {images.dtype}")
    if images.dim() < 3:
        raise ValueError(f"image must have shape (..., C, H, W), got {tuple(images.shape)}")
    means, stds = (
        values.view(-1, 1, 1) if values.dim() == 1 else values
        for values in (
            torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (mean, std)
        )
    )
    if not isinstance(std, Tensor) and not stds.all():  # a tensor may be on a GPU: not waited for
        raise ValueError(f"std must hold numbers other than 0, got {std!r}")
    return (images - means) / stds


class TensorSteps:
    """The steps as methods, which a subclass may replace."""

    def resize(
        self,
        image: Tensor,
        size: Any,
        interpolation: Any = None,
        antialias: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Resize images.

        Args:
            image: Shape (..., C, H, W).
            size: A :class:`SizeDict`, or as the class takes it.
            interpolation: A filter as ``resample``; by default bilinear.
            antialias: False: read at most 2x2 (bilinear) or 4x4 pixels (bicubic) for one, whatever the scale.
            **kwargs: Ignored.

        Returns:
            Shape (..., C, height, width), of the same dtype.

        Raises:
            ValueError: another filter than nearest, bilinear and bicubic without antialiasing, or where a
                gradient is recorded; a size that is none.
        """
        return resize(image, parse_resize(size, interpolation), antialias)

    def center_crop(self, image: Tensor, size: Any, **kwargs: Any) -> Tensor:
        """Cut the center out of images; zeros surround what is smaller.

        Args:
            image: Shape (..., H, W).
            size: A :class:`SizeDict` of height and width, or as the class takes it.
            **kwargs: Ignored.
        """
        return center_crop(image, *parse_crop_size(size))

    def rescale(self, image: Tensor, scale: float, **kwargs: Any) -> Tensor:
        """Return ``image * scale``, integers as float32."""
        return image * scale

    def normalize(self, image: Tensor, mean: Any, std: Any, **kwargs: Any) -> Tensor:
        """Return ``(image - mean) / std`` in the image's dtype.

        Args:
            image: Shape (..., C, H, W), floating.
            mean: One number, or one per channel.
            std: One number, or one per channel, not 0.
            **kwargs: Ignored.

        Raises:
            TypeError: the image is not floating.
            ValueError: a ``std`` of 0.
        """
        return normalize(image, mean, std)

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> Tensor:
        """Rescale images and normalize them in float32, by :meth:`rescale` and :meth:`normalize`.

        Where both are asked for it is :meth:`normalize` alone, with statistics divided by ``rescale_factor``.

        Args:
            images: Shape (..., C, H, W).
            do_rescale: Whether to rescale.
            rescale_factor: What pixels are multiplied by.
            do_normalize: Whether to normalize.
            image_mean: One number, or one per channel.
            image_std: One number, or one per channel, not 0.
        """
        image_mean, image_std, rescales = self._fuse_mean_std_and_rescale_factor(
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            device=images.device,
        )
        if do_normalize:
            return self.normalize(images.to(dtype=torch.float32), image_mean, image_std)
        if rescales:
            return self.rescale(images, rescale_factor)
        return images

    def _fuse_mean_std_and_rescale_factor(
        self,
        do_normalize: bool | None = None,
        image_mean: Any = None,
        image_std: Any = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        device: Any = None,
    ) -> tuple[Any, Any, bool | None]:
        """Return mean and std, divided by the factor if both steps are taken, and whether rescaling is left."""
        if do_rescale and do_normalize and rescale_factor is not None:
            inverse = 1.0 / rescale_factor
            image_mean = torch.tensor(image_mean, device=device) * inverse
            image_std = torch.tensor(image_std, device=device) * inverse
            do_rescale = False
        return image_mean, image_std, do_rescale
