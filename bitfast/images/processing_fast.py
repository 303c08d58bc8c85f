"""BitImageProcessorFast: what transformers' processor of this name computes with torchvision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from bitfast.images import tensor_steps
from bitfast.images.batch_feature import BatchFeature, parse_tensor_type
from bitfast.images.inputs import (
    ChannelDimension,
    flatten_images,
    need_no_reading,
    parse_channel_dimension,
    parse_size,
    raise_named,
    read_tensor,
)
from bitfast.images.parameters import (
    DefaultFastImageProcessorKwargs,
    Options,
    SizeDict,
    check_given,
    parse_options,
    torchvision_mode,
)
from bitfast.images.processing_base import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageProcessor,
    replaced,
)
from bitfast.images.tensor_steps import TensorSteps
from bitfast.images.tensor_tasks import sizes_after_resizing
from bitfast.ops.staging import upload


class BitImageProcessorFast(TensorSteps, ImageProcessor):
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
        data_format: "channels_first" or None, which both mean (C, H, W).
        input_data_format: Layout of the arrays among the images; None: seen from each one's axis of 1 or 3
            channels. "none" says (H, W).
        device: Where to work, and where the results lie; None: where the images are. From the CPU to a
            GPU all images go together, in asynchronous copies.
        disable_grouping: Whether a step that a subclass replaces is called for each image, as a batch of one,
            rather than for all images of one size. Has no other effect.
        **kwargs: Unknown parameters are kept as attributes and saved.

    A subclass may have other defaults, more parameters (``valid_kwargs``) and its own steps: the methods below
    are called where transformers calls them, with the same arguments. All those steps of a batch that are not
    replaced are one op.

    Raises:
        ValueError: a ``size`` or ``crop_size`` that is none; an unknown parameter with the name of a method.
    """

    is_fast = True
    valid_kwargs: ClassVar[Any] = DefaultFastImageProcessorKwargs
    unused_kwargs: ClassVar[list[str] | None] = None

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
        super().__init__(**kwargs)
        self._valid_kwargs_names = list(self.valid_kwargs.__annotations__)
        kwargs = self.filter_out_unused_kwargs(kwargs)
        for name in self._valid_kwargs_names:
            value = kwargs[name] if name in kwargs else copy.deepcopy(getattr(self, name, None))
            setattr(self, name, value)
        if self.size is not None:
            self.size = parse_size("size", self.size, bool(self.default_to_square))
        if self.crop_size is not None:
            self.crop_size = parse_size("crop_size", self.crop_size, True)

    def to_dict(self) -> dict[str, Any]:
        """Return every parameter and attribute, and the class's name under "image_processor_type"."""
        content = super().to_dict()
        del content["_valid_kwargs_names"]
        return content

    @classmethod
    def _parameter_names(cls) -> set[str]:
        return set(cls.valid_kwargs.__annotations__)

    def filter_out_unused_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the parameters that ``unused_kwargs`` names out of a dictionary, with a warning; return it."""
        for name in self.unused_kwargs or ():
            if name in kwargs:
                del kwargs[name]
                warnings.warn(f"{type(self).__name__} does not use {name}", stacklevel=3)
        return kwargs

    # ---- one call -------------------------------------------------------------------------------

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess one image or a batch of images.

        Args:
            images: A PIL image, a numpy array or torch tensor of shape (H, W, C), (C, H, W) or (H, W), text
                that :meth:`fetch_images` reads (a path or an address), a list of those (or of such lists),
                or an array of shape (N, H, W, C) or (N, C, H, W). The sizes in a list may differ. Pixels to
                be rescaled are from 0 to 255 or, if that is more, to ``1 / rescale_factor``; others are
                computed with after a warning. (Neither that nor whether they are finite is looked at on a
                GPU: the host would wait for it.)
            *args: Passed to ``_preprocess``.
            **kwargs: Override the attributes of the same name; see the class. Others are ignored, with a
                warning, unless a subclass's ``_preprocess`` takes them.

        Returns:
            :class:`BatchFeature` with ``pixel_values``: a tensor (N, C, H, W), or a list of tensors
            (C, H, W). The dtype is float32 after normalization or rescaled integers; else the input's.
            Normalized images of one channel get the channels of ``image_mean`` and ``image_std``. A gradient
            reaches floating tensors that require one.

        Raises:
            OSError: an image cannot be fetched or decoded; the message names its index in the batch.
            TypeError: something else than images and text.
            ValueError: any argument that is not as described; where one image is the cause, the message
                names its index in the batch.
        """
        unknown = [name for name in kwargs if name not in self._valid_kwargs_names]
        if unknown:
            names = ", ".join(map(repr, unknown))
            warnings.warn(
                f"{type(self).__name__}.preprocess ignores the arguments {names}", stacklevel=3
            )
        for name in self._valid_kwargs_names:
            kwargs.setdefault(name, getattr(self, name, None))
        reading = {
            name: kwargs.pop(name) for name in ("do_convert_rgb", "input_data_format", "device")
        }
        kwargs = self._further_process_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)
        del kwargs["data_format"]
        return self._preprocess_image_like_inputs(images, *args, **reading, **kwargs)

    def _further_process_kwargs(
        self,
        size: Any = None,
        crop_size: Any = None,
        default_to_square: bool | None = None,
        image_mean: Any = None,
        image_std: Any = None,
        data_format: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the parameters in the form that the steps take them."""
        if size is not None:
            size = SizeDict(**parse_size("size", size, bool(default_to_square)))
        if crop_size is not None:
            crop_size = SizeDict(**parse_size("crop_size", crop_size, True))
        resample = kwargs.pop("resample")
        return {
            **kwargs,
            "size": size,
            "crop_size": crop_size,
            "image_mean": tuple(image_mean) if isinstance(image_mean, list) else image_mean,
            "image_std": tuple(image_std) if isinstance(image_std, list) else image_std,
            "data_format": ChannelDimension.FIRST if data_format is None else data_format,
            # Only a subclass has use for torchvision's enumeration, the import of which takes a second.
            "interpolation": torchvision_mode(resample) if replaced(self, METHODS) else resample,
        }

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        """Raise ValueError if parameters contradict each other.

        Raises:
            ValueError: the message names one of them.
        """
        check_given(kwargs)
        tensor_type = parse_tensor_type(kwargs["return_tensors"])
        if tensor_type not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt' or None, got {tensor_type!r}")
        if parse_channel_dimension("data_format", kwargs["data_format"]) == ChannelDimension.LAST:
            raise ValueError("data_format must be 'channels_first', got 'channels_last'")

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        do_convert_rgb: bool,
        input_data_format: Any,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Read the images and preprocess them; a subclass may take masks and the like here."""
        tensors = self._prepare_image_like_inputs(
            images=images,
            do_convert_rgb=do_convert_rgb,
            input_data_format=input_data_format,
            device=device,
        )
        return self._preprocess(tensors, *args, **kwargs)

    # ---- reading images -------------------------------------------------------------------------

    def _prepare_image_like_inputs(
        self,
        images: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        expected_ndims: int = 3,
    ) -> list[Any]:
        """Return images as tensors (C, H, W) on the device asked for, in lists where they are in lists."""
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        nested = [isinstance(image, (list, tuple)) for image in images]
        # All images go to a device together, unless a subclass replaces the method that reads one.
        together = not any(nested) and not replaced(self, READING)
        at_once = device is not None and together
        is_usual = together and not replaced(self, {**METHODS, **CONVERTING})
        if is_usual and need_no_reading(images, input_data_format):
            return upload(images, torch.device(device)) if at_once else images
        how: dict[str, Any] = {
            "do_convert_rgb": do_convert_rgb,
            "input_data_format": input_data_format,
        }
        read: Callable[[Any], Tensor]
        if together:
            read = partial(self._read_image, copies=replaced(self, METHODS), **how)
        else:
            read = partial(self._process_image, device=device, **how)
        tensors: list[Any] = []
        try:
            for image, is_list in zip(images, nested, strict=True):
                tensors.append([read(part) for part in image] if is_list else read(image))
        except Exception as error:
            raise_named(len(tensors), error)
        return upload(tensors, torch.device(device)) if at_once else tensors

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """Return the images as one list, those that are paths and the like read."""
        return flatten_images(self.fetch_images(images), expected_ndims)

    def _process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
    ) -> Tensor:
        """Return one image as a tensor (C, H, W) on the device asked for."""
        # Methods of a subclass may write into it, and it may be Pillow's memory.
        copies = replaced(self, METHODS)
        pixels = self._read_image(image, do_convert_rgb, input_data_format, copies)
        return pixels if device is None else pixels.to(device)

    def _read_image(
        self, image: Any, do_convert_rgb: bool | None, input_data_format: Any, copies: bool
    ) -> Tensor:
        pixels = read_tensor(
            self.convert_to_rgb(image) if do_convert_rgb else image, input_data_format
        )
        return pixels.clone(memory_format=torch.contiguous_format) if copies else pixels

    def convert_to_rgb(self, image: Any) -> Any:
        """Return a PIL image in mode "RGB", and anything else as it is.

        Raises:
            OSError: the image cannot be decoded.
        """
        if not isinstance(image, Image.Image) or image.mode == "RGB":
            return image
        try:
            return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything
            raise OSError(f"image cannot be decoded: {error}") from error

    # ---- the steps: TensorSteps has each one ----------------------------------------------------

    def _preprocess(
        self,
        images: Sequence[Tensor],
        do_resize: bool,
        size: SizeDict,
        interpolation: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        disable_grouping: bool | None,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Take the steps: those that a subclass has replaced by its methods, all others at once.

        Args:
            images: Shape (C, H, W) each.
            do_resize: This and the next arguments are as :meth:`preprocess` takes them.
            size: What :meth:`resize` takes.
            interpolation: What :meth:`resize` takes.
            do_center_crop: Whether to crop.
            crop_size: What :meth:`center_crop` takes.
            do_rescale: Whether to rescale.
            rescale_factor: What :meth:`rescale_and_normalize` takes.
            do_normalize: Whether to normalize.
            image_mean: What :meth:`rescale_and_normalize` takes.
            image_std: What :meth:`rescale_and_normalize` takes.
            disable_grouping: Whether to call a replaced step for each image alone.
            return_tensors: "pt" for one tensor; None for a list.
            **kwargs: Ignored; more parameters of a subclass.
        """
        options = parse_options(
            {
                "do_resize": do_resize,
                "size": size,
                "interpolation": interpolation,
                "do_center_crop": do_center_crop,
                "crop_size": crop_size,
                "do_rescale": do_rescale,
                "rescale_factor": rescale_factor,
                "do_normalize": do_normalize,
                "image_mean": image_mean,
                "image_std": image_std,
            }
        )
        tensor_steps.check_pixels(images, options, stacklevel=5)
        recorded = torch.is_grad_enabled() and any(image.requires_grad for image in images)
        if do_resize and (recorded or replaced(self, RESIZING)):
            images = tensor_steps.call_by_shape(
                images,
                [image.shape for image in images],
                lambda stack: self.resize(image=stack, size=size, interpolation=interpolation),
                disable_grouping,
            )
            options = options._replace(size=None)
        crops = do_center_crop and (recorded or replaced(self, CROPPING))
        rescales = recorded or replaced(self, RESCALING)
        if crops or rescales:

            def crop_and_rescale(stack: Tensor) -> Tensor:
                if crops:
                    stack = self.center_crop(stack, crop_size)
                if rescales:
                    stack = self.rescale_and_normalize(
                        stack, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                    )
                return stack

            shapes = sizes_after_resizing(images, options)
            before = Options(*options[:3], crop=None if crops else options.crop)
            images = list(tensor_steps.process_at_once(images, before))
            images = tensor_steps.call_by_shape(images, shapes, crop_and_rescale, disable_grouping)
            options = Options() if rescales else options._replace(size=None, crop=None)
        pixel_values = tensor_steps.process_at_once(images, options)
        if not return_tensors:
            pixel_values = list(pixel_values)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def _methods(*names: str) -> dict[str, Any]:
    return {name: getattr(BitImageProcessorFast, name) for name in names}


RESIZING = _methods("resize")
CROPPING = _methods("center_crop")
RESCALING = _methods(
    "rescale", "normalize", "rescale_and_normalize", "_fuse_mean_std_and_rescale_factor"
)
CONVERTING = _methods("convert_to_rgb")
READING = _methods("_process_image")
METHODS = _methods(
    *(*RESIZING, *CROPPING, *RESCALING, *READING),
    "_further_process_kwargs",
    "_prepare_image_like_inputs",
    "_preprocess",
    "_preprocess_image_like_inputs",
    "_validate_preprocess_kwargs",
)
"""The methods that take tensors or torchvision's enumerations, as this class defines them."""
