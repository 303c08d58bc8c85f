"""BitImageProcessor: from photographs to the ``pixel_values`` that a BiT model takes."""

from __future__ import annotations

import copy
import inspect
import json
import os
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from bitfast import image_transforms
from bitfast.batch_feature import BatchFeature, parse_tensor_type
from bitfast.checkpoints.files import (
    CheckpointError,
    locate_file,
    read_json,
    write_text_atomically,
)
from bitfast.checkpoints.hub import PushToHubMixin
from bitfast.image_inputs import (
    ChannelDimension,
    from_channels_last,
    infer_channel_dimension,
    is_scaled,
    list_images,
    parse_channel_dimension,
    parse_resampling,
    parse_size,
    read_images,
    resized_size,
    to_channels_last,
)

OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
"""Mean of the channels of CLIP's training images, in [0, 1]."""

OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
"""Standard deviation of the channels of CLIP's training images."""

CONFIG_NAME = "preprocessor_config.json"
PROCESSOR_CONFIG_NAME = "processor_config.json"


class BitImageProcessor(PushToHubMixin):
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

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
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
        self._keep_unknown(kwargs)
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

    def _keep_unknown(self, parameters: dict[str, Any]) -> None:
        self._processor_class = parameters.pop("processor_class", None)
        # Files name the class that wrote them; the one that is saved next is this one.
        for name in ("image_processor_type", "feature_extractor_type"):
            parameters.pop(name, None)
        for name, value in parameters.items():
            if callable(getattr(type(self), name, None)):
                raise ValueError(
                    f"{type(self).__name__}: {name} is a method and cannot be a parameter, got {value!r}"
                )
            setattr(self, name, value)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Call :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)

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

        size = parse_size("size", override("size", size), default_to_square=False)
        crop_size = parse_size("crop_size", override("crop_size", crop_size), True)
        resample = parse_resampling("resample", override("resample", resample))
        rescale_factor = override("rescale_factor", rescale_factor)
        image_mean, image_std = override("image_mean", image_mean), override("image_std", image_std)
        do_resize, do_rescale = override("do_resize", do_resize), override("do_rescale", do_rescale)
        do_center_crop = override("do_center_crop", do_center_crop)
        do_normalize = override("do_normalize", do_normalize)
        tensor_type = parse_tensor_type(return_tensors)
        output_layout = parse_channel_dimension("data_format", data_format)
        _require("rescale_factor", rescale_factor, do_rescale)
        _require("image_mean", image_mean, do_normalize)
        _require("image_std", image_std, do_normalize)

        arrays, layouts = read_images(
            list_images(images), override("do_convert_rgb", do_convert_rgb), input_data_format
        )
        if do_rescale and is_scaled(arrays[0]):
            warnings.warn(
                "the pixels of the first image are between 0 and 1 already; if those of the others "
                "are too, pass do_rescale=False",
                stacklevel=2,
            )
        steps: list[Callable[..., np.ndarray]] = []
        if do_resize:
            steps.append(partial(self.resize, size=size, resample=resample))
        if do_center_crop:
            steps.append(partial(self.center_crop, size=crop_size))
        if do_rescale:
            steps.append(partial(self.rescale, scale=rescale_factor))
        if do_normalize:
            steps.append(partial(self.normalize, mean=image_mean, std=image_std))
        results = []
        for i, (image, layout) in enumerate(zip(arrays, layouts, strict=True)):
            try:
                for step in steps:
                    image = step(image=image, input_data_format=ChannelDimension.LAST)
            except ValueError as error:
                raise ValueError(f"images[{i}]: {error}") from error
            results.append(from_channels_last(image, output_layout or layout))
        return BatchFeature({"pixel_values": results}, tensor_type)

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
        result = image_transforms.resize(pixels, height, width, resample, reducing_gap)
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
        size = parse_size("size", size, default_to_square=True)
        if "height" not in size:
            raise ValueError(f"crop_size must hold height and width, got {size!r}")
        result = image_transforms.center_crop(pixels, size["height"], size["width"])
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
            return image_transforms.rescale(_array(image), scale, dtype)
        pixels, layout = _channels_last(image, input_data_format)
        return _in_layout(image_transforms.rescale(pixels, scale, dtype), data_format, layout)

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
        return _in_layout(image_transforms.normalize(pixels, mean, std), data_format, layout)

    # ---- the configuration ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return every attribute, and the class's name under "image_processor_type"."""
        return {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}

    def to_json_string(self) -> str:
        """Return what ``preprocessor_config.json`` holds."""
        content = self.to_dict()
        processor_class = content.pop("_processor_class")
        if processor_class is not None:
            content["processor_class"] = processor_class
        return json.dumps(content, indent=2, sort_keys=True, default=_to_json) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json_string` to a file; on any failure the file keeps its content."""
        write_text_atomically(json_file_path, self.to_json_string())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor from its configuration.

        Args:
            image_processor_dict: As :meth:`to_dict` returns it or a file holds it.
            **kwargs: Replace parameters and attributes of the configuration; others are ignored.
                ``return_unused_kwargs=True`` returns (processor, the ignored ones).
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        parameters = set(inspect.signature(cls.__init__).parameters) | set(image_processor_dict)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in parameters}
        processor = cls(**{**image_processor_dict, **overrides})
        return (processor, kwargs) if return_unused_kwargs else processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Make a processor from a configuration file."""
        return cls(**read_json(Path(json_file)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        **kwargs: Any,
    ) -> Any:
        """Load a processor from a local folder or the Hub.

        Args:
            pretrained_model_name_or_path: A folder with ``preprocessor_config.json`` (or, failing that,
                ``processor_config.json``), such a file, or the id of a Hub repository.
            cache_dir: Where downloads are kept.
            force_download: Download again what the cache holds already.
            local_files_only: Look into the cache only.
            token: Hub access token, or True for the stored one.
            revision: Branch, tag or commit of the Hub repository.
            subfolder: Folder inside the repository or the folder.
            **kwargs: See :meth:`from_dict`.

        Raises:
            CheckpointError: the file cannot be found or read.
            ValueError: a parameter in it is not as the class describes.
        """
        options = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        path = _locate_config(pretrained_model_name_or_path, options)
        content = read_json(path)
        content = content.get("image_processor", content)
        try:
            return cls.from_dict(content, **kwargs)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"no image processor can be made of {path}: {error}") from error

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write ``preprocessor_config.json`` into a folder, which is made if need be.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            **kwargs: For :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.

        Returns:
            The paths of the files written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / CONFIG_NAME)]


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


def _to_json(value: Any) -> Any:
    """Return what stands in JSON for arrays and numpy's numbers."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} has no form in JSON")


def _locate_config(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    if os.path.isfile(name_or_path):
        return Path(name_or_path)
    path = locate_file(name_or_path, CONFIG_NAME, required=False, **options)
    path = path or locate_file(name_or_path, PROCESSOR_CONFIG_NAME, required=False, **options)
    if path is not None:
        return path
    missing = locate_file(name_or_path, CONFIG_NAME, **options)  # says what is missing
    assert missing is not None
    return missing
