"""The steps of BitImageProcessorFast on tensors: all at once for a batch, or one after the other.

Images are (C, H, W), of any sizes, dtypes and devices; the single steps also take (..., C, H, W).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.images.batches import Task, parse_crop_size, process
from bitfast.images.inputs import check_range
from bitfast.images.parameters import Options, parse_resize
from bitfast.images.tensor_tasks import (
    WIDTH_FIRST,
    center_offset,
    size_after_resizing,
    tasks_of,
)
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize

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
        if image.dtype != torch.uint8 and image.is_cpu:
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
    given = tasks_of(images, options)
    tasks = [task.task for task in given]
    if any(task.changes_image for task in given):
        pairs = zip(images, given, strict=True)
        images = [_changed(i, t.task, options) if t.changes_image else i for i, t in pairs]
    images = [image.detach() if image.requires_grad else image for image in images]
    results = process(images, tasks, layout="CHW")
    if isinstance(results, Tensor) and {task.dtype for task in given} == {results.dtype}:
        return results
    return [result.to(task.dtype) for result, task in zip(results, given, strict=True)]


def _changed(image: Tensor, task: Task, options: Options) -> Tensor:
    """Return an image (C, H, W) as ``resize_normalize`` takes it, resized already where that does not do it."""
    image = image.detach().expand(task.kind.channels, -1, -1)
    given = image.dtype
    image = image.to(task.kind.dtype)
    if task.size == tuple(image.shape[1:]):
        return image
    if options.nearest_mode is not None:
        return F.interpolate(image[None], task.size, mode=options.nearest_mode)[0]
    if image.dtype != given:
        return _resize_integers(image, task.size, options.resample, given)
    return image


def _resize_integers(
    image: Tensor, size: tuple[int, int], resample: int, dtype: torch.dtype
) -> Tensor:
    """Resize integers that are no bytes, shape (C, H, W) of float64, which have been of ``dtype``.

    As in torchvision, they are floating numbers meanwhile, and then rounded (:data:`TRUNCATED` toward 0).
    Where cubes overshoot the dtype's range they stop at its ends, while torchvision lets them wrap around.
    """
    (resized,) = resize_normalize(
        [image.float()], [size], resample=resample, layout="CHW", pillow_version=WIDTH_FIRST
    )
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    whole = resized.trunc() if dtype in TRUNCATED else resized.round()
    return whole.double().clamp(low, high)


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
    return images.requires_grad and torch.is_grad_enabled()


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Cut (height, width) out of the center of images (..., C, H, W); zeros surround what is smaller."""
    top, left = (
        center_offset(have, want)
        for have, want in zip(images.shape[-2:], (height, width), strict=True)
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
