"""Reading the arguments of the image processors: every form that they accept is converted to one."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from enum import Enum
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast.images.pillow_memory import pixels_of


class ChannelDimension(str, Enum):
    """Where an image array has its channels."""

    FIRST = "channels_first"
    LAST = "channels_last"


Size = dict[str, int]

SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
)
"""The sets of keys that a size may have, as in the configuration files of transformers."""

INFERRED_CHANNELS = (1, 3)
"""The numbers of channels by which the channel axis of an array is recognised."""


# ---- images -------------------------------------------------------------------------------------


def list_images(images: Any, dimensions: int = 3) -> list[Any]:
    """Return a list of the images: given one image, a list or tuple of images, or a batch (one dimension more).

    Raises:
        ValueError: there is no image.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images must hold at least one image, got an empty list")
        return list(images)
    if _is_batch(images, dimensions):
        if len(images) == 0:
            raise ValueError(
                f"images must hold at least one image, got shape {tuple(images.shape)}"
            )
        return list(images)
    return [images]


def flatten_images(images: Any, dimensions: int = 3) -> list[Any]:
    """Return a list of all images, also of those in entries that are lists or batches themselves.

    Args:
        images: The images.
        dimensions: The number of dimensions of an array that is one image; a batch has one more.
    """
    return [
        image
        for entry in list_images(images, dimensions)
        for image in (
            list_images(entry, dimensions)
            if isinstance(entry, (list, tuple)) or _is_batch(entry, dimensions)
            else [entry]
        )
    ]


def _is_batch(images: Any, dimensions: int) -> bool:
    return not isinstance(images, Image.Image) and getattr(images, "ndim", None) == dimensions + 1


def is_image(image: Any) -> bool:
    """Whether this may be an image or a batch: a PIL image, or anything that numpy converts to an array."""
    return isinstance(image, Image.Image) or hasattr(image, "__array__")


def raise_named(i: int, error: Exception) -> NoReturn:
    """Raise the error of an image again, with the image's index in the batch in its message.

    "image must ..." becomes "images[3] must ...", and "images[1] must ..." becomes "images[3][1] must ...".
    Errors that this library does not raise itself stay as they are.
    """
    if type(error) not in (OSError, TypeError, ValueError):
        raise error
    rest = re.fullmatch(r"images?(\b.*)", str(error), flags=re.DOTALL)
    raise type(error)(f"images[{i}]{rest[1] if rest else f': {error}'}") from error


def read_images(
    images: list[Any], convert_rgb: bool, input_data_format: Any
) -> tuple[list[np.ndarray], list[ChannelDimension]]:
    """Return each image as an array of shape (H, W, C), and the layout that it came in.

    Args:
        images: PIL images, or numpy arrays or torch tensors (or anything that numpy converts) of
            shape (H, W, C), (C, H, W) or (H, W).
        convert_rgb: Whether to convert PIL images to mode "RGB"; arrays stay as they are.
        input_data_format: Layout of the arrays, or None: the one that the shape of the first array
            shows by a first or last axis of 1 or 3 (channels_first, with a warning, if both).

    Raises:
        OSError: a PIL image cannot be decoded.
        ValueError: an image that is none, has no pixels or another layout; the message says which.
    """
    arrays = [_read_image(f"images[{i}]", image, convert_rgb) for i, image in enumerate(images)]
    explicit = parse_channel_dimension("input_data_format", input_data_format, two_dimensional=True)
    layout = explicit
    result, layouts = [], []
    for i, (image, array) in enumerate(zip(images, arrays, strict=True)):
        if isinstance(image, Image.Image) or array.ndim == 2:
            own = ChannelDimension.LAST
            array = array[:, :, None] if array.ndim == 2 else array
        else:
            layout = layout or infer_channel_dimension(array.shape, f"images[{i}]")
            own = layout
            if explicit is None:
                _check_layout(i, array.shape, layout)
        if 0 in array.shape:
            raise ValueError(f"images[{i}] must have pixels, got shape {array.shape}")
        result.append(to_channels_last(array, own))
        layouts.append(own)
    return result, layouts


def _read_image(name: str, image: Any, convert_rgb: bool) -> np.ndarray:
    if isinstance(image, Image.Image):
        return read_pil_image(name, image, convert_rgb)
    if isinstance(image, torch.Tensor):
        # numpy has no bfloat16; float32 holds each of its values.
        image = image.detach().cpu()
        array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    elif hasattr(image, "__array__"):
        array = np.asarray(image)
    else:
        hint = "; fetch_images opens files and addresses" if isinstance(image, str) else ""
        raise ValueError(
            f"{name} must be a PIL.Image.Image, numpy.ndarray or torch.Tensor, "
            f"got {type(image).__name__}{hint}"
        )
    if array.ndim not in (2, 3):
        raise ValueError(
            f"{name} must have shape (H, W, C), (C, H, W) or (H, W), got {array.shape}"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return array


def read_pil_image(name: str, image: Image.Image, convert_rgb: bool) -> np.ndarray:
    """Return the pixels of a PIL image, (H, W, C) or (H, W), which may be its own memory.

    Raises:
        OSError: it cannot be decoded.
    """
    try:
        return pixels_of(image.convert("RGB") if convert_rgb and image.mode != "RGB" else image)
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise OSError(f"{name} cannot be decoded: {error}") from error


def check_finite(i: int, image: np.ndarray) -> None:
    """Raise ValueError if an image has NaN or infinite pixels.

    Raises:
        ValueError: it has some.
    """
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"images[{i}] must hold finite numbers, got {_first_other(image)}")


def _first_other(image: np.ndarray) -> str:
    place = tuple(int(n) for n in np.argwhere(~np.isfinite(image))[0])
    return f"{image[place]} at {place}"


def read_tensor(image: Any, input_data_format: Any) -> Tensor:
    """Return an image as a tensor of shape (C, H, W), on its device, without a copy if possible.

    Args:
        image: As for :func:`read_images`.
        input_data_format: Its layout if it is an array; None: inferred from its shape.

    Raises:
        OSError: a PIL image cannot be decoded.
        ValueError: an image that is none, has no pixels, or on the CPU NaN or infinite ones.
    """
    explicit = parse_channel_dimension("input_data_format", input_data_format, two_dimensional=True)
    if isinstance(image, torch.Tensor):
        pixels = image if torch.is_grad_enabled() else image.detach()
        if pixels.dim() not in (2, 3) or pixels.is_complex():
            raise ValueError(
                "image must be real and have shape (H, W, C), (C, H, W) or (H, W),"
                f" got {pixels.dtype} of shape {tuple(pixels.shape)}"
            )
    else:
        pixels = to_tensor(_read_image("image", image, convert_rgb=False))
    if pixels.dim() == 2:
        pixels = pixels[None]
    elif isinstance(image, Image.Image):
        pixels = pixels.permute(2, 0, 1)
    else:
        layout = explicit or infer_channel_dimension(pixels.shape)
        pixels = pixels.permute(2, 0, 1) if layout == ChannelDimension.LAST else pixels
    if 0 in pixels.shape:
        raise ValueError(f"image must have pixels, got shape {tuple(pixels.shape)}")
    if pixels.is_floating_point() and pixels.device.type == "cpu":
        low, high = (float(v) for v in pixels.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"image must hold finite numbers, got {low} to {high}")
    return pixels


def need_no_reading(images: Sequence[Any], input_data_format: Any) -> bool:
    """Whether :func:`read_tensor` would certainly return each image as it is: tensors of bytes (C, H, W)."""
    if set(map(type, images)) != {Tensor} or {image.dtype for image in images} != {torch.uint8}:
        return False
    shapes = {image.shape for image in images}
    if set(map(len, shapes)) != {3} or min(map(min, shapes)) < 1:
        return False
    if input_data_format == ChannelDimension.FIRST:
        return True
    return input_data_format is None and all(
        shape[0] in INFERRED_CHANNELS and shape[2] not in INFERRED_CHANNELS for shape in shapes
    )


def to_tensor(image: np.ndarray) -> Tensor:
    """Return an array as a tensor, without a copy if possible; not to be written to."""
    if not image.dtype.isnative or min(image.strides, default=0) < 0:
        image = image.astype(image.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(image if image.flags.writeable else np.asarray(_Unlocked(image)))


class _Unlocked:
    """Presents a read-only array as a writable one, because torch warns of read-only ones."""

    def __init__(self, image: np.ndarray) -> None:
        self.owner = image
        interface = image.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _check_layout(i: int, shape: tuple[int, ...], layout: ChannelDimension) -> None:
    """Raise ValueError if an image's shape shows the other layout than the first image's."""
    first, last = shape[0] in INFERRED_CHANNELS, shape[-1] in INFERRED_CHANNELS
    is_possible, is_other = (first, last) if layout == ChannelDimension.FIRST else (last, first)
    if is_other and not is_possible:
        raise ValueError(
            f"images[{i}] must be {layout.value}, as the first array is, got shape {shape}"
        )


def infer_channel_dimension(shape: Sequence[int], name: str = "image") -> ChannelDimension:
    """Return the layout of an image (or of a batch of them) by its axis of 1 or 3 channels.

    Raises:
        ValueError: there is no such axis.
    """
    first = len(shape) >= 3 and shape[-3] in INFERRED_CHANNELS
    last = len(shape) >= 3 and shape[-1] in INFERRED_CHANNELS
    if first and last:
        warnings.warn(
            f"{name} of shape {tuple(shape)} may be channels_first or channels_last; it is taken as "
            "channels_first. Pass input_data_format to say which.",
            stacklevel=2,
        )
    if first or last:
        return ChannelDimension.FIRST if first else ChannelDimension.LAST
    raise ValueError(
        f"{name} must have 1 or 3 channels on its first or last axis, or input_data_format must say "
        f"which axis holds the channels, got shape {tuple(shape)}"
    )


def to_channels_last(image: np.ndarray, layout: ChannelDimension) -> np.ndarray:
    """Return a view of shape (..., H, W, C)."""
    return np.moveaxis(image, -3, -1) if layout == ChannelDimension.FIRST else image


def from_channels_last(image: np.ndarray, layout: ChannelDimension) -> np.ndarray:
    """Return a view of an image of shape (..., H, W, C) in the layout asked for."""
    return np.moveaxis(image, -1, -3) if layout == ChannelDimension.FIRST else image


DEEPEST = 2.0**32
"""The largest value of a pixel to be rescaled."""


def check_range(ranges: Sequence[tuple[int, float, float]], factor: float, stacklevel: int) -> None:
    """Warn, once, of pixels outside of the range from 0 to 255, or to 1 / ``factor`` if that is larger.

    Args:
        ranges: The number of an image, its lowest and its highest pixel.
        factor: By which they are to be rescaled.
        stacklevel: Of the warning, seen from here.

    Raises:
        ValueError: pixels are larger than those of any image.
    """
    most = max(255.0, abs(1 / factor)) if factor else math.inf
    unusual = [entry for entry in ranges if not 0 <= entry[1] <= entry[2] <= most]
    for i, low, high in unusual:
        if max(-low, high) > DEEPEST:
            raise ValueError(
                f"images[{i}] must hold numbers of at most {DEEPEST:g} to be rescaled by {factor:g}, "
                f"got {low:g} to {high:g}"
            )
    if unusual:
        i, low, high = unusual[0]
        warnings.warn(
            f"images[{i}] holds numbers from {low:g} to {high:g}, not from 0 to {most:g}; they are rescaled "
            f"by {factor:g} as they are",
            stacklevel=stacklevel + 1,
        )


def is_scaled(image: np.ndarray) -> bool:
    """Whether the pixels seem to be from 0 to 1, not from 0 to 255."""
    return image.dtype != np.uint8 and image.min() >= 0 and image.max() <= 1


# ---- arguments ----------------------------------------------------------------------------------


def parse_channel_dimension(
    name: str, value: Any, two_dimensional: bool = False
) -> ChannelDimension | None:
    """Return the layout that a string or an enumeration's member names; None for None.

    ``two_dimensional`` also admits "none", which says that images are (H, W).
    """
    value = getattr(value, "value", value)
    if value is None or (two_dimensional and value == "none"):
        return None
    if value in list(ChannelDimension):
        return ChannelDimension(value)
    raise ValueError(f'{name} must be "channels_first", "channels_last" or None, got {value!r}')


def parse_resampling(name: str, value: Any) -> Image.Resampling:
    """Return the Pillow filter that a number, a name or a member of an enumeration stands for.

    Members of torchvision's ``InterpolationMode`` are understood by their names.
    """
    value = getattr(value, "value", value)
    if isinstance(value, str):
        key = value.upper().removesuffix("-EXACT")
        if key in Image.Resampling.__members__:
            return Image.Resampling[key]
    elif not isinstance(value, bool) and value in list(Image.Resampling):
        return Image.Resampling(value)
    allowed = ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling)
    raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def parse_factor(value: Any) -> float:
    """Return a ``rescale_factor``.

    Raises:
        ValueError: it is no finite number.
    """
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"rescale_factor must be a finite number, got {value!r}")
    return float(value)


def parse_size(name: str, value: Any, default_to_square: bool) -> Size:
    """Return a size as a dictionary.

    Args:
        name: The argument's, for messages.
        value: A dictionary whose keys are one of :data:`SIZE_KEYS`, a SizeDict of this library or of
            transformers, (height, width), or one integer.
        default_to_square: Whether one integer means height and width, or the shortest edge.

    Raises:
        ValueError: anything else, or an edge that is no positive integer.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a SizeDict
        size: Any = {key: v for key, v in vars(value).items() if v is not None}
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        size = {"height": value[0], "width": value[1]}
    elif isinstance(value, Real):
        size = dict.fromkeys(
            ("height", "width") if default_to_square else ("shortest_edge",), value
        )
    else:
        size = value
    if not isinstance(size, dict) or set(size) not in SIZE_KEYS:
        allowed = " or ".join(str(sorted(keys)) for keys in SIZE_KEYS)
        raise ValueError(
            f"{name} must be an integer, (height, width) or a dict with the keys {allowed}, "
            f"got {value!r}"
        )
    for key, edge in size.items():
        whole = isinstance(edge, Real) and not isinstance(edge, bool) and float(edge).is_integer()
        if not whole or edge < 1:
            raise ValueError(f"{name}: {key} must be an integer of at least 1, got {edge!r}")
    return {key: int(edge) for key, edge in size.items()}


def size_with_aspect_ratio(
    height: int, width: int, shortest_edge: int, longest_edge: int
) -> tuple[int, int]:
    """Return (height, width) after resizing the shorter edge, less if the longer one got too long.

    The shorter edge is then rounded to the nearest, the longer one down.
    """
    short, long = float(min(height, width)), float(max(height, width))
    exact: float = shortest_edge
    if long / short * shortest_edge > longest_edge:
        exact = longest_edge * short / long
    edge = round(exact)
    if (height if height <= width else width) == edge:
        return height, width
    if width < height:
        return int(exact * height / width), edge
    return edge, int(exact * width / height)


def size_within(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """Return the largest (height, width) of this ratio that fits, rounded down."""
    scale = min(max_height / height, max_width / width)
    return int(height * scale), int(width * scale)


def resized_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """Return (height, width) after resizing: as given, or by the shortest edge, keeping the ratio.

    The longer edge is rounded down. A "longest_edge" beside "shortest_edge" has no effect.

    Raises:
        ValueError: ``size`` has neither "shortest_edge" nor "height" and "width".
    """
    if "height" in size:
        return size["height"], size["width"]
    if "shortest_edge" not in size:
        raise ValueError(
            f"size must hold shortest_edge, or height and width, to resize by, got {size!r}"
        )
    edge = size["shortest_edge"]
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)
