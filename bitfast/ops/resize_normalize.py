"""Resize, center crop, rescale and normalize: images of any sizes in, one batch out, as one op.

Resampling is Pillow's, bit for bit (https://python-pillow.org, ``src/libImaging/Resample.c``); crop,
rescale and normalize are those of the slow image processors of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import register_kernel, select_backend
from bitfast.memory_format import format_for
from bitfast.ops.common import check_pair, complete_operator, define_operator
from bitfast.ops.derivatives import refuse_derivatives
from bitfast.ops.eager import PLAIN_TYPES, may_launch
from bitfast.torch_state import is_transformed

OP = "resize_normalize"

SIGNATURE = (
    "(Tensor[] images, SymInt[] sizes, SymInt[] crop, SymInt[] offsets, int resample,"
    " float[] rescale_factors, float[] mean, float[] std, ScalarType dtype, bool channels_last,"
    " int[] first_axes) -> Tensor"
)
"""Of every backend. The images are (H, W, C), of any strides. ``sizes`` is flat:
height and width of image 0, of image 1, ...; so is ``offsets``: top and left. ``mean`` and ``std`` are
both empty or hold a number per channel. ``first_axes`` holds the axis of each image that is resampled
first: 0 for height, 1 for width."""

PIXELS_SIGNATURE = (
    "(Tensor[] images, SymInt[] sizes, SymInt[] crop, SymInt[] offsets, int resample, Tensor? values,"
    " bool channels_last, int[] first_axes) -> Tensor"
)
"""Of the extension's operator. For uint8 images ``values`` (256, C) holds the value that each byte stands for;
float32 images, without it, are only resized and cropped."""

NATIVE_DTYPES = frozenset({torch.uint8, torch.float32, torch.bfloat16, torch.float16})

LAYOUTS = ("HWC", "CHW")

RESAMPLE_NAMES = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")
"""Pillow's filters; each one's number is its position here."""

INSTALLED_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
"""(major, minor) version of the Pillow that is installed."""


def resize_normalize(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    crop: tuple[int, int] | None = None,
    resample: int = 3,
    rescale_factor: float | Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    offsets: Sequence[tuple[int, int]] | None = None,
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
        crop: (height, width) cut out of the resized image. Where the window leaves the image, pixels of
            value 0 (before rescaling and normalization) stand. None: no crop, all ``sizes`` are the same.
        resample: Pillow's filter number: 0 NEAREST, 1 LANCZOS, 2 BILINEAR, 3 BICUBIC, 4 BOX, 5 HAMMING.
        rescale_factor: Multiplies the pixels. Several multiply one after the other, each product rounded.
            None: the pixels stay.
        mean: Subtracted, one number per channel. None (as ``std``): no normalization.
        std: Divides, one number per channel, not 0.
        offsets: (top, left) of the window in the resized image, one per image; negative: that many zeros
            come first. By default the window is centered; an odd remainder leaves it one pixel nearer to
            the top and left, and a smaller image within it one pixel nearer to the bottom and right.
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
    are_plain = _are_plain_images(images, layout)
    if not are_plain:
        _check_images(images, layout)
    pairs = _check_sizes(images, sizes, crop)
    window = pairs[0] if crop is None else check_pair(OP, "crop", crop)
    corners = _check_offsets(offsets, pairs, window)
    _check_resample(resample)
    factors = _check_factors(rescale_factor)
    channels = images[0].shape[layout.index("C")]
    mean, std = _check_normalization(mean, std, channels)
    _check_result(images[0].dtype, dtype, memory_format, not factors and not mean)
    axes = first_resampled_axes(images, layout, pairs, pillow_version)
    backend = select_backend(OP, images[0].device.type, images[0].dtype)
    numbers = (
        list(chain.from_iterable(pairs)), list(window), list(chain.from_iterable(corners)), resample, factors,
        mean, std, dtype, memory_format == torch.channels_last, axes,
    )  # fmt: skip
    if backend == "triton" and are_plain and may_launch(OP, images[0]):
        from bitfast.ops import resize_normalize_triton

        return resize_normalize_triton.forward(Arguments(images, *numbers, layout))
    if layout == "CHW":
        images = [image.permute(1, 2, 0) for image in images]
    # Through the dispatcher even for the reference: one call per batch costs nothing, and it keeps
    # the resampling tables, which need numbers, out of what torch.compile traces.
    operator = getattr(torch.ops.bitfast.resize_normalize, backend)
    run = reference.resize_normalize_forward if is_transformed() else operator
    return run(images, *numbers)


def first_resampled_axes(
    images: Sequence[Tensor],
    layout: str,
    sizes: Sequence[tuple[int, int]],
    pillow_version: tuple[int, ...],
) -> list[int]:
    """Return :func:`first_resampled_axis` of each image."""
    if pillow_version < (12, 2):
        return [1] * len(images)
    h, w = layout.index("H"), layout.index("W")
    shapes = (image.shape for image in images)
    return [
        first_resampled_axis(shape[h], shape[w], height, width, pillow_version)
        for shape, (height, width) in zip(shapes, sizes, strict=True)
    ]


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


# ---- argument checks ----------------------------------------------------------------------------
# A batch that is as it should be is seen to be so as a whole; else each image is looked at, for the message.


def _are_plain_images(images: list[Tensor], layout: str) -> bool:
    """Whether these are certainly images as they should be, of no subclass of tensors."""
    if torch.compiler.is_compiling() or layout not in LAYOUTS:
        return False
    if not images or not PLAIN_TYPES.issuperset(map(type, images)):
        return False
    kinds = {(image.shape, image.dtype, image.device, image.requires_grad) for image in images}
    shapes, dtypes, devices, requiring = map(set, zip(*kinds, strict=True))
    axis = layout.index("C")
    return (
        len(dtypes) == len(devices) == 1
        and not any(requiring)
        and all(dtype == torch.uint8 or dtype.is_floating_point for dtype in dtypes)
        and set(map(len, shapes)) == {3}
        and len({shape[axis] for shape in shapes}) == 1
        and min(map(min, shapes)) > 0
    )


def _are_plain_pairs(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether these are certainly tuples of two integers."""
    return (
        not torch.compiler.is_compiling()
        and set(map(type, pairs)) == {tuple}
        and set(map(len, pairs)) == {2}
        and set(map(type, chain.from_iterable(pairs))) == {int}
    )


def _check_images(images: list[Tensor], layout: str) -> None:
    if layout not in LAYOUTS:
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
) -> list[tuple[int, int]]:
    if len(sizes) != len(images):
        raise ValueError(
            f"{OP}: sizes must hold one (height, width) for each of the {len(images)} images,"
            f" got {len(sizes)}"
        )
    pairs = list(sizes)
    if not (_are_plain_pairs(pairs) and min(map(min, pairs)) > 0):
        pairs = [check_pair(OP, f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    for i, pair in enumerate(pairs if crop is None else ()):
        if pair != pairs[0]:
            raise ValueError(
                f"{OP}: sizes[{i}] must equal sizes[0], {pairs[0]}, where crop is None, got {pair}"
            )
    return pairs


def _check_offsets(
    offsets: Sequence[tuple[int, int]] | None,
    sizes: list[tuple[int, int]],
    window: tuple[int, int],
) -> list[tuple[int, int]]:
    if offsets is None:
        # Floor division: an odd remainder puts the window one pixel earlier.
        return [((h - window[0]) // 2, (w - window[1]) // 2) for h, w in sizes]
    if len(offsets) != len(sizes):
        raise ValueError(
            f"{OP}: offsets must hold one (top, left) for each of the {len(sizes)} images,"
            f" got {len(offsets)}"
        )
    if _are_plain_pairs(offsets):
        return list(offsets)
    for i, offset in enumerate(offsets):
        if len(offset) != 2 or not all(isinstance(edge, int) for edge in offset):
            raise ValueError(f"{OP}: offsets[{i}] must be two integers (top, left), got {offset!r}")
    return [(top, left) for top, left in offsets]


def _check_resample(resample: int) -> None:
    if isinstance(resample, bool) or resample not in range(len(RESAMPLE_NAMES)):
        allowed = ", ".join(f"{number} ({name})" for number, name in enumerate(RESAMPLE_NAMES))
        raise ValueError(f"{OP}: resample must be one of {allowed}, got {resample!r}")


def _check_factors(rescale_factor: float | Sequence[float] | None) -> list[float]:
    if rescale_factor is None:
        return []
    if isinstance(rescale_factor, Sequence):
        return [float(factor) for factor in rescale_factor]
    return [float(rescale_factor)]


def _check_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    if mean is None and std is None:
        return [], []
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


class Arguments(NamedTuple):
    """The arguments of a backend, as :data:`SIGNATURE` has them."""

    images: list[Tensor]
    sizes: list[int]
    crop: list[int]
    offsets: list[int]
    resample: int
    rescale_factors: list[float]
    mean: list[float]
    std: list[float]
    dtype: torch.dtype
    channels_last: bool
    first_axes: list[int]
    layout: str = "HWC"
    """Of the images; "CHW" only where the Triton kernels are launched without the dispatcher."""

    @property
    def channels(self) -> int:
        """Of every image."""
        return self.images[0].shape[self.layout.index("C")]

    def empty_result(self) -> Tensor:
        """Return a tensor without contents for the result."""
        return torch.empty(
            (len(self.images), self.channels, *self.crop),
            dtype=self.dtype,
            device=self.images[0].device,
            memory_format=format_for(self.channels_last),
        )

    def rescale_normalize(self, pixels: Tensor) -> Tensor:
        """Rescale and normalize resized pixels, shape (N, C, H, W)."""
        return rescale_normalize(pixels, self.rescale_factors, self.mean, self.std, self.dtype)

    def values_of_bytes(self) -> Tensor:
        """Return the rescaled and normalized value of each byte, shape (256, C), on the CPU."""
        numbers = (tuple(self.rescale_factors), tuple(self.mean), tuple(self.std))
        return values_of_bytes(*numbers, self.channels, self.dtype)


def _fake(*arguments: Any) -> Tensor:
    return Arguments(*arguments).empty_result()


def _define(
    backend: str, implementation: Callable[..., Tensor], tags: tuple[torch.Tag, ...] = ()
) -> None:
    define_operator(OP, backend, SIGNATURE, implementation, _fake, tags=tags)
    refuse_derivatives(OP, backend)


_define("reference", reference.resize_normalize_forward)

# ---- rescaling and normalizing -----------------------------------------------------------------


def rescale_normalize(
    pixels: Tensor,
    rescale_factors: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Compute ``(pixels * factor - mean) / std``, rounded as :func:`resize_normalize` describes.

    Args:
        pixels: Shape (N, C) or (N, C, H, W).
        rescale_factors: Each multiplies, one after the other.
        mean, std: A number per channel, or both empty.
        dtype: Of the result.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in rescale_factors:
        pixels = (pixels.double() * factor).to(compute)
    if mean:
        pixels = pixels.to(compute)
        shape = (1, -1, *[1] * (pixels.dim() - 2))
        pixels = (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)
    return pixels.to(dtype)


@lru_cache(maxsize=64)
def values_of_bytes(
    rescale_factors: tuple[float, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return :func:`rescale_normalize` of each byte, shape (256, C), on the CPU.

    Results that are read from this table are exact, whatever the arithmetic of the device.
    """
    with torch.inference_mode(False):  # the table outlives the mode it is made in
        pixels = torch.arange(256, dtype=torch.uint8, device="cpu")[:, None].expand(256, channels)
        return rescale_normalize(pixels, rescale_factors, mean, std, dtype).contiguous()


# ---- the extension ------------------------------------------------------------------------------


def _native(*arguments: Any) -> Tensor:
    given = Arguments(*arguments)
    images = given.images
    values = None
    if images[0].dtype == torch.uint8:
        values = given.values_of_bytes()
    else:
        images = [image.float() for image in images]
    pixels = torch.ops.bitfast.resize_normalize_pixels.native(
        images, given.sizes, given.crop, given.offsets, given.resample, values,
        given.channels_last, given.first_axes,
    )  # fmt: skip
    return pixels if values is not None else given.rescale_normalize(pixels)


def _fake_pixels(
    images: list[Tensor],
    sizes: list[int],
    crop: list[int],
    offsets: list[int],
    resample: int,
    values: Tensor | None,
    channels_last: bool,
    first_axes: list[int],
) -> Tensor:
    dtype = torch.float32 if values is None else values.dtype
    return _fake(
        images, sizes, crop, offsets, resample, [], [], [], dtype, channels_last, first_axes
    )


register_kernel(OP, "native", "cpu", NATIVE_DTYPES, lambda: extension.CPU.problem)
if extension.CPU.problem is None:  # then csrc/resize_normalize.cpp has defined the schemas
    complete_operator("resize_normalize_pixels", "native", PIXELS_SIGNATURE, _fake_pixels)
    refuse_derivatives("resize_normalize_pixels", "native")
    _define("native", _native)

# ---- Triton -------------------------------------------------------------------------------------


def _triton(*arguments: Any) -> Tensor:
    from bitfast.ops import resize_normalize_triton

    return resize_normalize_triton.forward(Arguments(*arguments))


def _why_no_triton_on(device_type: str) -> str | None:
    from bitfast.ops import resize_normalize_triton as triton

    on_gpu = device_type == "cuda"
    return triton.why_unavailable_on_gpu() if on_gpu else triton.why_unavailable_on_cpu()


for _device in ("cuda", "cpu"):
    register_kernel(
        OP,
        "triton",
        _device,
        frozenset({torch.uint8}),
        partial(_why_no_triton_on, _device),
        on_demand=_device == "cpu",
    )
# Its tables hold the addresses of one batch: compilers leave it out of the CUDA graphs that they record.
_define("triton", _triton, (torch.Tag.cudagraph_unsafe,))
