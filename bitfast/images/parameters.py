"""The parameters of the image processors: their parsed form, and for BitImageProcessorFast their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from PIL import Image

from bitfast.images.batches import parse_crop_size
from bitfast.images.inputs import Size, parse_factor, parse_resampling, parse_size
from bitfast.ops.resize_normalize import RESAMPLE_NAMES
from bitfast.reference import NEAREST


class DefaultFastImageProcessorKwargs(TypedDict, total=False):
    """The parameters, each of them None or as BitImageProcessorFast describes it.

    A subclass with more of them extends this class and names its own as ``valid_kwargs``.
    """

    do_resize: Any
    size: Any
    default_to_square: Any
    resample: Any
    do_center_crop: Any
    crop_size: Any
    do_rescale: Any
    rescale_factor: Any
    do_normalize: Any
    image_mean: Any
    image_std: Any
    do_convert_rgb: Any
    return_tensors: Any
    data_format: Any
    input_data_format: Any
    device: Any
    disable_grouping: Any


PARAMETERS = tuple(DefaultFastImageProcessorKwargs.__annotations__)


@dataclass(frozen=True)
class SizeDict:
    """The size that a step is given: ``size.height`` or ``size["height"]``, None if unset."""

    height: int | None = None
    width: int | None = None
    longest_edge: int | None = None
    shortest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None

    def __getitem__(self, key: str) -> int | None:
        if key in self.__dataclass_fields__:
            return getattr(self, key)
        raise KeyError(f"a size has no key {key!r}; it has {', '.join(self.__dataclass_fields__)}")


class Options(NamedTuple):
    """The parsed parameters of one call of an image processor; None: that step is not taken."""

    size: Size | None = None
    resample: int = NEAREST
    """Pillow's number of the filter."""
    nearest_mode: str | None = None
    """The mode of ``torch.nn.functional.interpolate`` if that resizes instead of Pillow's filter."""
    crop: tuple[int, int] | None = None
    factor: float | None = None
    mean: Any = None
    std: Any = None


NEEDED = {
    "do_resize": ("size", "interpolation"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
"""The parameters that each step requires."""


def check_given(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a required parameter of a step that is taken is None.

    Raises:
        ValueError: the message names the parameter.
    """
    for step, names in NEEDED.items():
        for name in names if values[step] else ():
            if values[name] is None:
                shown = "resample" if name == "interpolation" else name
                raise ValueError(f"{shown} must be given, got None")


def parse_options(values: Mapping[str, Any]) -> Options:
    """Parse ``do_resize``, ``size``, ``interpolation``, ``do_center_crop``...

    Raises:
        ValueError: a parameter of a step that is taken is None, or not as the processor describes.
    """
    check_given(values)
    options = Options()
    if values["do_resize"]:
        size = parse_size("size", values["size"], default_to_square=False)
        options = options._replace(size=size, **_parse_interpolation(values["interpolation"]))
    if values["do_center_crop"]:
        options = options._replace(crop=parse_crop_size(values["crop_size"]))
    if values["do_rescale"]:
        options = options._replace(factor=parse_factor(values["rescale_factor"]))
    if values["do_normalize"]:
        options = options._replace(mean=values["image_mean"], std=values["image_std"])
        if options.factor == 0:
            raise ValueError("rescale_factor must not be 0 where pixels are normalized, got 0")
    return options


def _parse_interpolation(value: Any) -> dict[str, Any]:
    """Return Pillow's filter number, and for NEAREST also the mode of torch's ``interpolate``."""
    number = int(parse_resampling("resample", value))
    if number >= len(RESAMPLE_NAMES):
        raise ValueError(
            f"resample must be one of Pillow's first six filters, 0 to 5, got {number}"
        )
    if number != NEAREST:
        return {"resample": number}
    # In torchvision's enumeration "nearest" is another filter, without the half pixel.
    is_theirs = type(value).__name__ == "InterpolationMode"
    return {"resample": number, "nearest_mode": value.value if is_theirs else "nearest-exact"}


def parse_resize(size: Any, interpolation: Any) -> Options:
    """Return the options of resizing alone, by default bilinear; see :func:`parse_options`."""
    filter_of = Image.Resampling.BILINEAR if interpolation is None else interpolation
    return Options(parse_size("size", size, False), **_parse_interpolation(filter_of))


def torchvision_mode(resample: Any) -> Any:
    """Return torchvision's ``InterpolationMode`` for one of Pillow's filters; None or such a mode as it is.

    Without torchvision, return Pillow's filter, which torchvision's functions take too.
    """
    if resample is None or type(resample).__name__ == "InterpolationMode":
        return resample
    pillow = parse_resampling("resample", resample)
    try:
        from torchvision.transforms import InterpolationMode
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was made for another torch
        return pillow
    name = "NEAREST_EXACT" if pillow == NEAREST else pillow.name
    return getattr(InterpolationMode, name, pillow)
