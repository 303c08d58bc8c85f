"""Resize, center crop, rescale and normalize: images of any sizes in, one batch out, as one op.

Resampling is Pillow's, bit for bit (https://python-pillow.org, ``src/libImaging/Resample.c``); crop,
rescale and normalize are those of the slow image processors of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL
import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import select_backend
from bitfast.ops.common import check_pair, define_operator

OP = "resize_normalize"

SIGNATURE = (
    "(Tensor[] images, SymInt[] sizes, SymInt[]? crop, int resample, float? rescale_factor,"
    " float[]? mean, float[]? std, ScalarType dtype, bool channels_last, str layout,"
    " int[] first_axes) -> Tensor"
)
"""What every kernel takes and returns. ``sizes`` is flat: height and width of image 0, of image 1, ...
``first_axes`` holds the axis of each image that is resampled first: 0 for height, 1 for width."""

RESAMPLE_NAMES = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")
"""Pillow's filters; each one's number is its position here."""

INSTALLED_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
"""(major, minor) version of the Pillow that is installed."""


def resize_normalize(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    crop: tuple[int, int] | None = None,
    resample: int = 3,
    rescale_factor: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    layout: str = "HWC",
    pillow_version: tuple[int, ...] = INSTALLED_PILLOW,
) -> Tensor:
    """Compute ``(center_crop(resize(image)) * rescale_factor - mean) / std`` for each image.

    uint8 images are resized in Pillow's integer arithmetic and equal ``PIL.Image.resize`` bit for bit.
    Floating images are resized as Pillow's mode "F": each of the two passes sums in float64 and is
    stored in float32 (float64 images: in float64). An axis whose size does not change is not resampled.
    The product with ``rescale_factor`` is taken in float64 and rounded to float32; normalization is in
    float32 (both in float64 if ``dtype`` is float64). So float32 results equal transformers' slow
    processors exactly. Autocast has no influence. There is no gradient: integers have none.

    Args:
        images: At least one tensor of shape (H, W, C) or (C, H, W), by ``layout``; uint8 or floating,
            any strides, H, W and C at least 1. C, dtype and device are the same for all; H and W need
            not be.
        sizes: (height, width) after resizing, one per image; an image's own size leaves it as it is.
        crop: (height, width) cut out of the resized image's center; an odd remainder leaves the
            window one pixel nearer to the top and left. Where the image is smaller, pixels of value 0
            (before rescaling and normalization) surround it. None: no crop, all ``sizes`` are the same.
        resample: Pillow's filter number: 0 NEAREST, 1 LANCZOS, 2 BILINEAR, 3 BICUBIC, 4 BOX, 5 HAMMING.
        rescale_factor: Multiplies the pixels. None: they stay.
        mean: Subtracted, one number per channel. None (as ``std``): no normalization.
        std: Divides, one number per channel, not 0.
        dtype: Of the result; floating, or uint8 for uint8 images neither rescaled nor normalized.
        memory_format: Of the result: ``torch.contiguous_format`` or ``torch.channels_last``.
        layout: "HWC" or "CHW", the layout of every image.
        pillow_version: (major, minor) of the Pillow to equal, by default the installed one. Versions
            differ in whether rows or columns are resampled first (see :func:`first_resampled_axis`).

    Returns:
        Shape (N, C, height, width).

    Raises:
        TypeError: an image that is no tensor or of a wrong dtype, a wrong ``dtype``.
        ValueError: any other argument that is not as described; an image that requires a gradient.
    """
    images = list(images)
    _check_images(images, layout)
    flat_sizes = _check_sizes(images, sizes, crop)
    crop = None if crop is None else check_pair(OP, "crop", crop)
    _check_resample(resample)
    channels = images[0].shape[layout.index("C")]
    mean, std = _check_normalization(mean, std, channels)
    _check_result(images[0].dtype, dtype, memory_format, rescale_factor is None and mean is None)
    backend = select_backend(OP, images[0].device.type, images[0].dtype)
    # Through the dispatcher even for the reference: one call per batch costs nothing, and it keeps
    # the resampling tables, which need numbers, out of what torch.compile traces.
    return getattr(torch.ops.bitfast.resize_normalize, backend)(
        images,
        flat_sizes,
        crop,
        resample,
        rescale_factor,
        mean,
        std,
        dtype,
        memory_format == torch.channels_last,
        layout,
        _first_axes(images, flat_sizes, layout, pillow_version),
    )


def first_resampled_axis(
    height: int, width: int, new_height: int, new_width: int, pillow_version: tuple[int, ...]
) -> int:
    """Return the axis of an (H, W) image that Pillow resamples first, 0 for height or 1 for width.

    Up to version 12.1 the width always comes first. 12.2 makes an exception of images that are more
    than a hundred times as high as wide and lose height. From 13.0 on the height comes first where it
    loses more than twice as many pixels as the width.
    """
    if pillow_version >= (13, 0):
        lost = height - new_height
        return 0 if lost > 0 and lost > 2 * (width - new_width) else 1
    if pillow_version >= (12, 2):
        return 0 if height > 100 * width and new_height < height else 1
    return 1


def _first_axes(
    images: list[Tensor], sizes: list[int], layout: str, pillow_version: tuple[int, ...]
) -> list[int]:
    height, width = layout.index("H"), layout.index("W")
    return [
        first_resampled_axis(
            image.shape[height], image.shape[width], sizes[2 * i], sizes[2 * i + 1], pillow_version
        )
        for i, image in enumerate(images)
    ]


# ---- argument checks ----------------------------------------------------------------------------


def _check_images(images: list[Tensor], layout: str) -> None:
    if layout not in ("HWC", "CHW"):
        raise ValueError(f'{OP}: layout must be "HWC" or "CHW", got {layout!r}')
    if not images:
        raise ValueError(f"{OP}: images must hold at least one image, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"{OP}: images[{i}] must be a torch.Tensor, got {type(image).__name__}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"{OP}: images[{i}] must be uint8 or floating-point, got {image.dtype}")
        if image.dim() != 3 or 0 in image.shape:
            axes = ", ".join(layout)
            raise ValueError(
                f"{OP}: images[{i}] must have shape ({axes}), each at least 1, got {tuple(image.shape)}"
            )
        if image.requires_grad:
            raise ValueError(
                f"{OP}: images[{i}] must not require a gradient, which this op does not compute,"
                " got requires_grad=True; detach() it"
            )
        _check_same(i, image, images[0], layout.index("C"))


def _check_same(i: int, image: Tensor, first: Tensor, channel_axis: int) -> None:
    for what, value, expected in (
        ("dtype", image.dtype, first.dtype),
        ("device", image.device, first.device),
        ("number of channels", image.shape[channel_axis], first.shape[channel_axis]),
    ):
        if value != expected:
            raise ValueError(
                f"{OP}: images[{i}] must have the {what} of images[0], {expected}, got {value}"
            )


def _check_sizes(
    images: list[Tensor], sizes: Sequence[tuple[int, int]], crop: tuple[int, int] | None
) -> list[int]:
    """Return the sizes as one flat list."""
    if len(sizes) != len(images):
        raise ValueError(
            f"{OP}: sizes must hold one (height, width) for each of the {len(images)} images,"
            f" got {len(sizes)}"
        )
    pairs = [check_pair(OP, f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    for i, pair in enumerate(pairs):
        if crop is None and pair != pairs[0]:
            raise ValueError(
                f"{OP}: sizes[{i}] must equal sizes[0], {pairs[0]}, where crop is None, got {pair}"
            )
    return [edge for pair in pairs for edge in pair]


def _check_resample(resample: int) -> None:
    if isinstance(resample, bool) or resample not in range(len(RESAMPLE_NAMES)):
        allowed = ", ".join(f"{number} ({name})" for number, name in enumerate(RESAMPLE_NAMES))
        raise ValueError(f"{OP}: resample must be one of {allowed}, got {resample!r}")


def _check_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float] | None, list[float] | None]:
    if mean is None and std is None:
        return None, None
    checked = []
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels:
            raise ValueError(
                f"{OP}: {name} must hold {channels} numbers, one per channel, got {values!r}"
            )
        checked.append([float(v) for v in values])
    mean, std = checked
    if 0 in std:
        raise ValueError(f"{OP}: std must hold numbers other than 0, got {std}")
    return mean, std


def _check_result(
    image_dtype: torch.dtype, dtype: torch.dtype, memory_format: torch.memory_format, pixels: bool
) -> None:
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{OP}: memory_format must be torch.contiguous_format or torch.channels_last,"
            f" got {memory_format}"
        )
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype == torch.uint8):
        raise TypeError(f"{OP}: dtype must be a floating-point dtype or torch.uint8, got {dtype}")
    if dtype == torch.uint8 and not (pixels and image_dtype == torch.uint8):
        raise TypeError(
            f"{OP}: dtype must be floating-point unless uint8 images are neither rescaled nor"
            " normalized, got torch.uint8"
        )


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake(
    images: list[Tensor],
    sizes: list[int],
    crop: list[int] | None,
    resample: int,
    rescale_factor: float | None,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype,
    channels_last: bool,
    layout: str,
    first_axes: list[int],
) -> Tensor:
    height, width = sizes[:2] if crop is None else crop
    return torch.empty(
        (len(images), images[0].shape[layout.index("C")], height, width),
        dtype=dtype,
        device=images[0].device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def define_kernel(backend: str, forward: Any) -> None:
    """Define ``bitfast::resize_normalize.<backend>``, traceable, without a gradient."""
    define_operator(OP, backend, SIGNATURE, forward, _fake)


define_kernel("reference", reference.resize_normalize_forward)
