"""BitImageProcessor: from photographs to the ``pixel_values`` that a BiT model takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast.images import transforms
from bitfast.images.batch_feature import BatchFeature, parse_tensor_type
from bitfast.images.batches import Kind, Recipe, Task, check_resized_size, parse_crop_size, process
from bitfast.images.inputs import (
    ChannelDimension,
    check_finite,
    check_range,
    from_channels_last,
    infer_channel_dimension,
    is_scaled,
    list_images,
    parse_channel_dimension,
    parse_factor,
    parse_resampling,
    parse_size,
    raise_named,
    read_images,
    resized_size,
    to_channels_last,
    to_tensor,
)
from bitfast.images.parameters import Options
from bitfast.images.processing_base import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageProcessor,
    replaced,
)
from bitfast.ops.resize_normalize import RESAMPLE_NAMES

ALPHA = (2, 4)
"""Numbers of channels for which Pillow takes the last one as alpha, and weights the others by it."""


class BitImageProcessor(ImageProcessor):
    """Resizes, center-crops, rescales and normalizes images, in that order, each step optional.

    A drop-in replacement of the class of this name in transformers 4.56: the same parameters, files and,
    bit for bit, the same numbers. DINOv2, FocalNet and Hiera checkpoints use it too. Every parameter is
    an attribute and can be overridden in each call.

    Args:
        do_resize: Whether to resize.
        size: {"shortest_edge": n} keeps the aspect ratio (the longer edge is rounded down);
            {"height": h, "width": w} does not. An integer n means the former, (h, w) the latter.
            By default {"shortest_edge": 224}.
        resample: Pillow's filter, as ``PIL.Image.Resampling``, its number or its name ("bicubic").
        do_center_crop: Whether to crop the center; a smaller image is surrounded by zeros.
        crop_size: {"height": h, "width": w}, (h, w) or an integer for both. By default 224.
        do_rescale: Whether to multiply by ``rescale_factor``.
        rescale_factor: By default 1/255, for pixels between 0 and 255.
        do_normalize: Whether to subtract ``image_mean`` and divide by ``image_std``.
        image_mean: One number, or one per channel. By default CLIP's.
        image_std: One number, or one per channel, not 0. By default CLIP's.
        do_convert_rgb: Whether to convert PIL images of any other mode to RGB. An orientation in EXIF
            data is not applied.
        **kwargs: Unknown parameters are kept as attributes and saved.

    Raises:
        ValueError: a ``size``, ``crop_size`` or ``resample`` that is none; an unknown parameter with
            the name of a method.
    """

    is_fast = False

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | tuple[int, int] | None = None,
        resample: Image.Resampling | int | str = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | tuple[int, int] | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Collection[float] | None = None,
        image_std: float | Collection[float] | None = None,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = parse_size("size", 224 if size is None else size, default_to_square=False)
        self.resample = parse_resampling("resample", resample)
        self.do_center_crop = do_center_crop
        self.crop_size = parse_size("crop_size", 224 if crop_size is None else crop_size, True)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(OPENAI_CLIP_MEAN) if image_mean is None else image_mean
        self.image_std = list(OPENAI_CLIP_STD) if image_std is None else image_std
        self.do_convert_rgb = do_convert_rgb

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: dict[str, int] | int | tuple[int, int] | None = None,
        resample: Image.Resampling | int | str | None = None,
        do_center_crop: bool | None = None,
        crop_size: dict[str, int] | int | tuple[int, int] | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Collection[float] | None = None,
        image_std: float | Collection[float] | None = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | None = None,
        data_format: ChannelDimension | str | None = ChannelDimension.FIRST,
        input_data_format: ChannelDimension | str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Preprocess one image or a batch of images.

        Where transformers fails on something sensible or takes it for something else, this does not:
        ``data_format=None`` works; a PIL image always has its channels last, even if 1 or 3 pixels high;
        arrays of shape (H, W), PIL images with an alpha channel kept, bfloat16 tensors, and 5 or more
        channels (resized one by one) work; results of different shapes cannot become an array of
        objects under ``return_tensors="np"``.

        Args:
            images: A PIL image, a numpy array or torch tensor of shape (H, W, C), (C, H, W) or (H, W),
                a list of those, or an array of shape (N, H, W, C) or (N, C, H, W). The sizes in a
                list may differ. Pixels to be resized are integers from 0 to 255, or fractions from
                0 to 1, which resizing rounds to 8 bits.
            do_resize: This and the next ten arguments override the attribute of the same name.
            size: See the class.
            resample: See the class.
            do_center_crop: See the class.
            crop_size: See the class.
            do_rescale: See the class.
            rescale_factor: See the class.
            do_normalize: See the class.
            image_mean: See the class.
            image_std: See the class.
            do_convert_rgb: See the class.
            return_tensors: "pt", "np", "tf" or "jax" for one tensor of the whole batch; None for a list
                of numpy arrays, one per image.
            data_format: Layout of the results, "channels_first" or "channels_last"; None: each image's
                own (channels_last for PIL and (H, W) images).
            input_data_format: Layout of the arrays among the images; None: seen from the first array's
                axis of 1 or 3 channels. "none" says (H, W).
            **kwargs: Ignored, with a warning.

        Returns:
            :class:`BatchFeature` with ``pixel_values``: (N, C, H, W) or (N, H, W, C), or the list. The
            dtype is float32 after rescaling; else normalization keeps floating dtypes and makes
            float32 of integers; else it is the input's (uint8 after resizing integers).

        Raises:
            ImportError: the library that ``return_tensors`` asks for is not installed.
            OSError: a PIL image cannot be decoded; the message names its index in the batch.
            ValueError: any argument that is not as described; where one image is the cause, the message
                names its index in the batch.
        """
        if kwargs:
            names = ", ".join(repr(name) for name in kwargs)
            warnings.warn(
                f"BitImageProcessor.preprocess ignores the arguments {names}", stacklevel=2
            )

        def override(name: str, value: Any) -> Any:
            return getattr(self, name) if value is None else value

        parsed_size = parse_size("size", override("size", size), default_to_square=False)
        crop = override("crop_size", crop_size)
        resample = parse_resampling("resample", override("resample", resample))
        rescale_factor = override("rescale_factor", rescale_factor)
        image_mean, image_std = override("image_mean", image_mean), override("image_std", image_std)
        do_rescale = override("do_rescale", do_rescale)
        do_normalize = override("do_normalize", do_normalize)
        tensor_type = parse_tensor_type(return_tensors)
        output_layout = parse_channel_dimension("data_format", data_format)
        _require("rescale_factor", rescale_factor, do_rescale)
        _require("image_mean", image_mean, do_normalize)
        _require("image_std", image_std, do_normalize)
        options = Options(
            size=parsed_size if override("do_resize", do_resize) else None,
            resample=resample,
            crop=parse_crop_size(crop) if override("do_center_crop", do_center_crop) else None,
            factor=parse_factor(rescale_factor) if do_rescale else None,
            mean=image_mean if do_normalize else None,
            std=image_std if do_normalize else None,
        )

        arrays, layouts = read_images(
            list_images(images), override("do_convert_rgb", do_convert_rgb), input_data_format
        )
        if do_rescale and is_scaled(arrays[0]):
            warnings.warn(
                "the pixels of the first image are between 0 and 1 already; if those of the others "
                "are too, pass do_rescale=False",
                stacklevel=3,
            )
        for i, array in enumerate(arrays):
            check_finite(i, array)
            if options.size is not None:
                height, width = array.shape[:2]
                size_after = resized_size(height, width, options.size)
                try:
                    check_resized_size(height, width, size_after)
                except ValueError as error:
                    raise_named(i, error)
        if options.factor is not None and options.size is None:
            others = [(i, array) for i, array in enumerate(arrays) if array.dtype != np.uint8]
            ranges = [(i, float(array.min()), float(array.max())) for i, array in others]
            check_range(ranges, options.factor, stacklevel=3)
        results_in = [output_layout or layout for layout in layouts]
        if replaced(self, STEPS) or not all(_is_made_of_bytes(a, options) for a in arrays):
            results: Any = self._step_by_step(arrays, layouts, results_in, options)
        else:
            results = _all_at_once(arrays, results_in, options)
            if tensor_type is None or not isinstance(results, Tensor):
                results = [result.numpy() for result in results]
            elif tensor_type != "pt":
                results = results.numpy()
        return BatchFeature({"pixel_values": results}, tensor_type)

    def _step_by_step(
        self,
        arrays: list[np.ndarray],
        layouts: list[ChannelDimension],
        results_in: list[ChannelDimension],
        options: Options,
    ) -> list[np.ndarray]:
        """Call the method of each step for each image, (H, W, C), in the layout that it came in."""
        steps: list[Callable[..., np.ndarray]] = []
        if options.size is not None:
            steps.append(partial(self.resize, size=options.size, resample=options.resample))
        if options.crop is not None:
            crop_size = {"height": options.crop[0], "width": options.crop[1]}
            steps.append(partial(self.center_crop, size=crop_size))
        if options.factor is not None:
            steps.append(partial(self.rescale, scale=options.factor))
        if options.mean is not None:
            steps.append(partial(self.normalize, mean=options.mean, std=options.std))
        results = []
        for i, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
            # It may be Pillow's memory, which neither these steps nor the caller may write to.
            given = from_channels_last(array, layout)
            image = given.copy() if replaced(self, STEPS) else given
            try:
                for step in steps:
                    image = step(image=image, input_data_format=layout)
            except Exception as error:
                raise_named(i, error)
            image = image.copy() if np.may_share_memory(image, array) else image
            results.append(from_channels_last(to_channels_last(image, layout), results_in[i]))
        return results

    # ---- the single steps -----------------------------------------------------------------------

    def resize(
        self,
        image: np.ndarray,
        size: dict[str, int] | int | tuple[int, int],
        resample: Image.Resampling | int | str = Image.Resampling.BICUBIC,
        data_format: ChannelDimension | str | None = None,
        input_data_format: ChannelDimension | str | None = None,
        reducing_gap: float | None = None,
    ) -> np.ndarray:
        """Resize one image with Pillow.

        Args:
            image: Shape (H, W, C) or (C, H, W); see :meth:`preprocess` for its pixels.
            size: See the class.
            resample: See the class.
            data_format: Layout of the result; None: the image's.
            input_data_format: Layout of the image; None: inferred.
            reducing_gap: Passed to ``PIL.Image.Image.resize``.
        """
        pixels, layout = _channels_last(image, input_data_format, dimensions=(3,))
        height, width = pixels.shape[:2]
        height, width = resized_size(height, width, parse_size("size", size, False))
        resample = parse_resampling("resample", resample)
        result = transforms.resize(pixels, height, width, resample, reducing_gap)
        return _in_layout(result, data_format, layout)

    def center_crop(
        self,
        image: np.ndarray,
        size: dict[str, int] | int | tuple[int, int],
        data_format: ChannelDimension | str | None = None,
        input_data_format: ChannelDimension | str | None = None,
    ) -> np.ndarray:
        """Cut the center out of an image or batch; zeros surround what is smaller.

        Args:
            image: Shape (..., H, W, C) or (..., C, H, W).
            size: {"height": h, "width": w}, (h, w) or an integer for both.
            data_format: Layout of the result; None: the image's.
            input_data_format: Layout of the image; None: inferred.
        """
        pixels, layout = _channels_last(image, input_data_format)
        result = transforms.center_crop(pixels, *parse_crop_size(size))
        return _in_layout(result, data_format, layout)

    def rescale(
        self,
        image: np.ndarray,
        scale: float,
        data_format: ChannelDimension | str | None = None,
        input_data_format: ChannelDimension | str | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """Multiply an image by a number, in float64, and round to ``dtype``.

        Args:
            image: Any shape if ``data_format`` is None, else as in :meth:`center_crop`.
            scale: The number.
            data_format: Layout of the result; None: the image's.
            input_data_format: Layout of the image; None: inferred.
            dtype: Of the result.
        """
        if data_format is None:
            return transforms.rescale(_array(image), scale, dtype)
        pixels, layout = _channels_last(image, input_data_format)
        return _in_layout(transforms.rescale(pixels, scale, dtype), data_format, layout)

    def normalize(
        self,
        image: np.ndarray,
        mean: float | Collection[float],
        std: float | Collection[float],
        data_format: ChannelDimension | str | None = None,
        input_data_format: ChannelDimension | str | None = None,
    ) -> np.ndarray:
        """Compute (image - mean) / std, in the image's dtype if it is floating, else in float32.

        Args:
            image: Shape (..., H, W, C) or (..., C, H, W).
            mean: One number, or one per channel.
            std: One number, or one per channel, not 0.
            data_format: Layout of the result; None: the image's.
            input_data_format: Layout of the image; None: inferred.
        """
        pixels, layout = _channels_last(image, input_data_format)
        return _in_layout(transforms.normalize(pixels, mean, std), data_format, layout)


STEPS = {
    name: getattr(BitImageProcessor, name)
    for name in ("resize", "center_crop", "rescale", "normalize")
}
"""The methods of the steps as this class defines them, to tell whether a subclass has replaced them."""

# ---- all steps of a batch at once ---------------------------------------------------------------


def _is_made_of_bytes(image: np.ndarray, options: Options) -> bool:
    """Whether the steps of an image are a resizing of bytes, followed by a function of each byte."""
    if options.size is None:
        return image.dtype == np.uint8
    # Pillow 13 has more filters than the op; those are left to Pillow.
    return image.shape[2] not in ALPHA and int(options.resample) < len(RESAMPLE_NAMES)


def _all_at_once(
    arrays: list[np.ndarray], layouts: list[ChannelDimension], options: Options
) -> Tensor | list[Tensor]:
    images, tasks = [], []
    for i, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        try:
            image, task = _task(array, layout, options)
        except ValueError as error:
            raise ValueError(f"images[{i}]: {error}") from error
        images.append(image)
        tasks.append(task)
    return process(images, tasks)


def _task(image: np.ndarray, layout: ChannelDimension, options: Options) -> tuple[Tensor, Task]:
    """Return an image (H, W, C) as a tensor, and the task of taking its steps.

    Raises:
        ValueError: pixels that cannot be bytes; a mean or standard deviation that does not fit.
    """
    height, width, channels = image.shape
    factors: tuple[float, ...] = ()
    size = height, width
    if options.size is not None:
        size = resized_size(height, width, options.size)
        image, is_fraction = transforms.to_bytes(image)
        factors = (1 / 255,) if is_fraction else ()
    if options.factor is not None:
        factors = (*factors, options.factor)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if options.mean is not None:
        statistics = transforms.statistics(
            options.mean, options.std, channels, np.float32, ("image_mean", "image_std")
        )
        mean, std = (tuple(values.tolist()) for values in statistics)
    crop = size if options.crop is None else options.crop
    recipe = Recipe(
        crop,
        int(options.resample) if options.size is not None else 0,
        factors,
        mean,
        std,
        torch.float32 if factors or mean else torch.uint8,
        channels_last=layout == ChannelDimension.LAST,
    )
    # Floor division: an odd remainder leaves the window one pixel nearer to the top and left.
    offset = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    tensor = to_tensor(image)
    return tensor, Task(size, offset, Kind(recipe, channels, tensor.dtype, tensor.device))


# ---- arguments ----------------------------------------------------------------------------------


def _require(name: str, value: Any, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"{name} must be given, got None")


def _array(image: Any) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy.ndarray, got {type(image).__name__}")
    return image


def _channels_last(
    image: Any, input_data_format: Any, dimensions: tuple[int, ...] = (3, 4, 5)
) -> tuple[np.ndarray, ChannelDimension]:
    """Return an image as (..., H, W, C), and the layout that it came in."""
    if _array(image).ndim not in dimensions:
        allowed = " or ".join(map(str, dimensions))
        raise ValueError(f"image must have {allowed} dimensions, got shape {image.shape}")
    layout = parse_channel_dimension("input_data_format", input_data_format)
    layout = layout or infer_channel_dimension(image.shape)
    return to_channels_last(image, layout), layout


def _in_layout(image: np.ndarray, data_format: Any, own: ChannelDimension) -> np.ndarray:
    """Return an image of shape (..., H, W, C) in ``data_format``, or for None in its own layout."""
    return from_channels_last(image, parse_channel_dimension("data_format", data_format) or own)
