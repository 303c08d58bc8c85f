"""BitImageProcessorFast: what transformers' processor of this name computes with torchvision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bitfast import image_transforms
from bitfast.batch_feature import BatchFeature, parse_tensor_type
from bitfast.image_batches import Job, Recipe, check_resized_size, parse_crop_size, process
from bitfast.image_inputs import (
    ChannelDimension,
    Size,
    flatten_images,
    parse_channel_dimension,
    parse_factor,
    parse_resampling,
    parse_size,
    read_tensors,
    resized_size,
    size_with_aspect_ratio,
    size_within,
)
from bitfast.image_processing_base import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageProcessor
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize
from bitfast.staging import upload

NEAREST = 0
"""Pillow's number of its filter that copies pixels."""

WIDTH_FIRST = (12, 1)
"""The last version of Pillow that always resamples along the width first, as torchvision does."""


PARAMETERS = (
    "do_resize",
    "size",
    "default_to_square",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "return_tensors",
    "data_format",
    "input_data_format",
    "device",
    "disable_grouping",
)
"""Of BitImageProcessorFast."""


class _Options(NamedTuple):
    """The parameters of one call, parsed; None: that step is not taken."""

    size: Size | None
    resample: int
    nearest_mode: str | None  # of torch.nn.functional.interpolate, which then resizes
    crop: tuple[int, int] | None
    factor: float | None
    mean: Any
    std: Any


class BitImageProcessorFast(ImageProcessor):
    """Resizes, center-crops, rescales and normalizes images, in that order, each step optional.

    A drop-in replacement of the class of this name in transformers 4.56: the same parameters and files,
    the same sizes and crops, and the same rounding after resizing. Images are resized in Pillow's
    arithmetic, from which torchvision's, with weights of 16 bits, differs in a few bytes per thousand by
    one level of 255, and hardly ever by two (one for each axis). Unlike the slow processor it rounds odd
    remainders of a crop to the nearest even offset, works where the images are, and takes arrays of
    floating pixels as they are, without making bytes of them. Every parameter is an attribute and can be
    overridden in each call; None, here or in a call, means None rather than a default.

    Args:
        do_resize: Whether to resize.
        size: {"shortest_edge": n} keeps the aspect ratio (the longer edge is rounded down), with
            "longest_edge" beside it up to that length; {"height": h, "width": w} does not;
            {"max_height": h, "max_width": w} keeps it within these. (h, w) means height and width, an
            integer what ``default_to_square`` says. By default {"shortest_edge": 224}.
        default_to_square: Whether a ``size`` of one integer means height and width, or the shortest edge.
        resample: Pillow's filter, as ``PIL.Image.Resampling``, its number or its name, or a member of
            torchvision's ``InterpolationMode``. By default bicubic.
        do_center_crop: Whether to crop the center; a smaller image is surrounded by zeros.
        crop_size: {"height": h, "width": w}, (h, w) or an integer for both. By default 224.
        do_rescale: Whether to multiply by ``rescale_factor``.
        rescale_factor: By default 1/255, for pixels between 0 and 255.
        do_normalize: Whether to subtract ``image_mean`` and divide by ``image_std``.
        image_mean: One number, or one per channel. By default CLIP's.
        image_std: One number, or one per channel, not 0. By default CLIP's.
        do_convert_rgb: Whether to convert PIL images of any other mode to RGB.
        return_tensors: "pt" for one tensor of the whole batch; None for a list of tensors.
        data_format: "channels_first", or None for the same.
        input_data_format: Layout of the arrays among the images; None: seen from each one's axis of 1 or 3
            channels. "none" says (H, W).
        device: Where to work, and where the results lie; None: where the images are. From the CPU to a
            GPU all images go in one asynchronous copy.
        disable_grouping: Has no effect: images of all sizes are processed at once in any case.
        **kwargs: Unknown parameters are kept as attributes and saved.

    Raises:
        ValueError: a ``size`` or ``crop_size`` that is none; an unknown parameter with the name of a method.
    """

    is_fast = True

    # The defaults, which a subclass may replace.
    do_resize: Any = True
    size: Any = {"shortest_edge": 224}  # noqa: RUF012 (copied before it becomes an instance's)
    default_to_square: Any = False
    resample: Any = Image.Resampling.BICUBIC
    do_center_crop: Any = True
    crop_size: Any = {"height": 224, "width": 224}  # noqa: RUF012
    do_rescale: Any = True
    rescale_factor: Any = 1 / 255
    do_normalize: Any = True
    image_mean: Any = OPENAI_CLIP_MEAN
    image_std: Any = OPENAI_CLIP_STD
    do_convert_rgb: Any = True
    return_tensors: Any = None
    data_format: Any = ChannelDimension.FIRST
    input_data_format: Any = None
    device: Any = None
    disable_grouping: Any = None

    def __init__(self, **kwargs: Any) -> None:
        values = {
            name: kwargs.pop(name) if name in kwargs else copy.deepcopy(getattr(self, name))
            for name in PARAMETERS
        }
        self._keep_unknown(kwargs)
        if values["size"] is not None:
            values["size"] = parse_size("size", values["size"], bool(values["default_to_square"]))
        if values["crop_size"] is not None:
            values["crop_size"] = parse_size("crop_size", values["crop_size"], True)
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def _parameter_names(cls) -> set[str]:
        return set(PARAMETERS)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Call :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess one image or a batch of images.

        Args:
            images: A PIL image, a numpy array or torch tensor of shape (H, W, C), (C, H, W) or (H, W),
                a list of those (or of such lists), or an array of shape (N, H, W, C) or (N, C, H, W). The
                sizes in a list may differ. Pixels to be rescaled are from 0 to 255 or, if that is more, to
                ``1 / rescale_factor`` (which is not checked on a GPU: the host would wait for it).
            **kwargs: Override the attributes of the same name; see the class. Others are ignored, with a
                warning.

        Returns:
            :class:`BatchFeature` with ``pixel_values``: a tensor (N, C, H, W), or a list of tensors
            (C, H, W). The dtype is float32 after normalization or rescaled integers; else the input's.
            Normalized images of one channel get the channels of ``image_mean`` and ``image_std``.

        Raises:
            OSError: a PIL image cannot be decoded; the message names its index in the batch.
            ValueError: any argument that is not as described; where one image is the cause, the message
                names its index in the batch.
        """
        unknown = [name for name in kwargs if name not in PARAMETERS]
        if unknown:
            names = ", ".join(map(repr, unknown))
            warnings.warn(
                f"{type(self).__name__}.preprocess ignores the arguments {names}", stacklevel=2
            )
        values = {name: kwargs.get(name, getattr(self, name)) for name in PARAMETERS}
        options = _parse(values)
        tensor_type = parse_tensor_type(values["return_tensors"])
        if tensor_type not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt' or None, got {tensor_type!r}")
        if parse_channel_dimension("data_format", values["data_format"]) == ChannelDimension.LAST:
            raise ValueError("data_format must be 'channels_first', got 'channels_last'")

        tensors = read_tensors(
            flatten_images(images), bool(values["do_convert_rgb"]), values["input_data_format"]
        )
        for i, tensor in enumerate(tensors):
            _check_pixels(i, tensor, options)
        if values["device"] is not None:
            tensors = upload(tensors, torch.device(values["device"]))
        jobs, dtypes = [], []
        for i, tensor in enumerate(tensors):
            try:
                jobs.append(_job(i, tensor, options))
            except ValueError as error:
                message = str(error).removeprefix(f"images[{i}]: ")
                raise ValueError(f"images[{i}]: {message}") from error
            dtypes.append(_result_dtype(tensor.dtype, options))
        results = process(jobs)
        if isinstance(results, Tensor) and set(dtypes) == {results.dtype}:
            return BatchFeature({"pixel_values": results if tensor_type else list(results)})
        converted = [r.to(dtype) for r, dtype in zip(results, dtypes, strict=True)]
        return BatchFeature({"pixel_values": converted}, tensor_type)


# ---- arguments ----------------------------------------------------------------------------------


def _parse(values: dict[str, Any]) -> _Options:
    """Return the parameters of a call in the form that the steps take."""
    size = crop = factor = mean = std = None
    resample, nearest_mode = NEAREST, None
    if values["do_resize"]:
        given = _required(values, "size")
        size = parse_size("size", given, bool(values["default_to_square"]))
        resample, nearest_mode = _parse_resampling(_required(values, "resample"))
    if values["do_center_crop"]:
        crop = parse_crop_size(_required(values, "crop_size"))
    if values["do_rescale"]:
        factor = parse_factor(_required(values, "rescale_factor"))
        if values["do_normalize"] and factor == 0:
            raise ValueError("rescale_factor must not be 0 where pixels are normalized, got 0")
    if values["do_normalize"]:
        mean, std = _required(values, "image_mean"), _required(values, "image_std")
    return _Options(size, resample, nearest_mode, crop, factor, mean, std)


def _required(values: dict[str, Any], name: str) -> Any:
    if values[name] is None:
        raise ValueError(f"{name} must be given, got None")
    return values[name]


def _parse_resampling(resample: Any) -> tuple[int, str | None]:
    """Return Pillow's filter number, and for its nearest pixel torch's mode, which computes positions."""
    number = int(parse_resampling("resample", resample))
    if number >= len(RESAMPLE_NAMES):
        raise ValueError(
            f"resample must be one of Pillow's first six filters, 0 to 5, got {number}"
        )
    if number != NEAREST:
        return number, None
    # In torchvision's enumeration "nearest" is another filter, without the half pixel.
    is_theirs = type(resample).__name__ == "InterpolationMode"
    return number, resample.value if is_theirs else "nearest-exact"


def _check_pixels(i: int, image: Tensor, options: _Options) -> None:
    """Refuse pixels that no processing makes sense of; those on a GPU are not looked at.

    Raises:
        ValueError: an image that holds NaN or infinity, or is to be rescaled and holds numbers out of the
            range that :meth:`BitImageProcessorFast.preprocess` describes.
    """
    is_floating = image.is_floating_point()
    if image.device.type != "cpu" or image.dtype == torch.uint8:
        return
    if not is_floating and options.factor is None:
        return
    # torch compares neither bool nor unsigned integers of more than 8 bits.
    low, high = (float(v) for v in (image if is_floating else image.double()).aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"images[{i}] must hold finite numbers, got {low} to {high}")
    if options.factor is None:
        return
    most = max(255.0, abs(1 / options.factor)) if options.factor else np.inf
    if not 0 <= low <= high <= most:
        raise ValueError(
            f"images[{i}] must hold numbers from 0 to {most:g} to be rescaled by {options.factor:g},"
            f" got {image.dtype} from {low:g} to {high:g}"
        )
    if is_floating and high <= 1 and i == 0:
        warnings.warn(
            "the pixels of the first image are between 0 and 1 already; if those of the others "
            "are too, pass do_rescale=False",
            stacklevel=3,
        )


# ---- one image ----------------------------------------------------------------------------------


def _job(i: int, image: Tensor, options: _Options) -> Job:
    """Describe an image (H, W, C) and what the steps make of it."""
    height, width, channels = image.shape
    size = height, width
    if options.mean is not None and channels == 1:
        channels = max(_length(options.mean), _length(options.std))
        image = image.expand(height, width, channels)
    factors, mean, std = _rescaling(channels, image.dtype, options)
    if options.size is not None:
        size = _resized(height, width, options.size)
        check_resized_size(i, height, width, size)
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

    As in torchvision, they are floating numbers meanwhile, and then rounded. Where cubes overshoot the
    dtype's range they stop at its ends, while torchvision lets them wrap around.
    """
    (resized,) = resize_normalize(
        [image.float()], [size], resample=resample, pillow_version=WIDTH_FIRST
    )
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return resized.round().double().clamp(low, high).permute(1, 2, 0)


def _length(values: Any) -> int:
    return len(values) if isinstance(values, Collection) else 1


def _resized(height: int, width: int, size: Size) -> tuple[int, int]:
    """Return (height, width) after resizing."""
    if set(size) == {"shortest_edge", "longest_edge"}:
        result = size_with_aspect_ratio(height, width, size["shortest_edge"], size["longest_edge"])
    elif "max_height" in size:
        result = size_within(height, width, size["max_height"], size["max_width"])
    else:
        result = resized_size(height, width, size)
    if min(result) < 1:
        raise ValueError(f"{width}x{height} pixels would be resized to {result[1]}x{result[0]}")
    return result


def _offset(have: int, want: int) -> int:
    """Return where a window of ``want`` pixels begins in ``have``; negative: zeros come first.

    As torchvision has it: halves go to the even number, and a smaller image stands nearer to the top and
    left in its window.
    """
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def _rescaling(
    channels: int, dtype: torch.dtype, options: _Options
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
    mean, std = image_transforms.statistics(
        _one_for_all(options.mean),
        _one_for_all(options.std),
        channels,
        np.float32,
        ("image_mean", "image_std"),
    )
    return (), tuple((mean * inverse).tolist()), tuple((std * inverse).tolist())


def _one_for_all(values: Any) -> Any:
    """Return the only number of a list, which stands for every channel, or what there is."""
    return next(iter(values)) if _length(values) == 1 and isinstance(values, Collection) else values


def _computed_dtype(image: torch.dtype, is_scaled: bool, is_normalized: bool) -> torch.dtype:
    """Return the dtype in which the op returns an image of this dtype."""
    if is_normalized or (is_scaled and not image.is_floating_point):
        return torch.float32
    return image


def _result_dtype(image: torch.dtype, options: _Options) -> torch.dtype:
    """Return the dtype of the result for an image that was given in this one."""
    return _computed_dtype(
        image, options.factor is not None or options.mean is not None, options.mean is not None
    )
