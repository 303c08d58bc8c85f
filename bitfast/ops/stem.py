"""The stem: 7x7 convolution of images with stride 2, zero pad, and 3x3 max-pool with stride 2, in one pass.

For inference on GPUs, where libraries convolve three channels slowly (they pad them to eight): a CUDA kernel
multiplies on the tensor cores and pools what it has before anything is written, so that the large map between
the two never exists. float32 images are rounded as they are read. There is no kernel for the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import register_kernel, requested_backend, select_backend
from bitfast.ops import native_cuda
from bitfast.ops.common import check_nchw, define_operator
from bitfast.ops.derivatives import refuse_derivatives
from bitfast.ops.first_use import difference, register_first_use, why_unusable
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.same_padding import OP as SAME_PADDING
from bitfast.reference import Ints

OP = "stem"

SIGNATURE = "(Tensor images, Tensor filters, SymInt[] padding, SymInt[]? pool_padding) -> Tensor"

DTYPES = frozenset({torch.bfloat16, torch.float16})
"""Of filters and result. Images may be float32, too."""

CHANNEL_MULTIPLE = 64
"""Output channels of the kernel are a multiple of this."""

MOST_PADDING, MOST_POOL_PADDING = reference.STEM_KERNEL - 1, reference.STEM_POOL - 1
"""Zeros on a side, at most: a window must not lie in the padding alone."""

Sides = tuple[int, int, int, int]
"""(top, bottom, left, right)."""


def stem(images: Tensor, filters: Tensor, padding: Ints, pool_padding: Ints | None) -> Tensor:
    """Convolve images with stride 2, and max-pool the result: 3x3, stride 2, zeros of the padding included.

    Autocast has no influence: the result has the dtype of ``filters``.

    Args:
        images: Shape (N, 3, H, W), floating point, of any strides. Rounded to the dtype of ``filters``.
        filters: What :func:`prepare_filters` returns for this padding: shape (out, 7, 8, 4).
        padding: Zeros around the images: (top, bottom, left, right), 0 to 6 each.
        pool_padding: Zeros around what the pool reads: (top, bottom, left, right), 0 to 2 each. None: there is
            no pool.

    Returns:
        Shape (N, out, H', W'), channels_last. Where a gradient is recorded, by plain PyTorch.

    Raises:
        TypeError: ``images`` or ``filters`` are not floating-point tensors.
        ValueError: another shape, other numbers for the paddings, images that are too small.
    """
    check_nchw(OP, "images", images)
    check_nchw(OP, "filters", filters)
    if images.shape[1] != 3:
        raise ValueError(f"{OP}: images must have 3 channels, got shape {tuple(images.shape)}")
    if filters.shape[1:] != (7, 8, 4):
        raise ValueError(
            f"{OP}: filters must come from prepare_filters, (out, 7, 8, 4); got shape {tuple(filters.shape)}"
        )
    _check_sides("padding", padding, MOST_PADDING)
    if pool_padding is not None:
        _check_sides("pool_padding", pool_padding, MOST_POOL_PADDING)
    size = reference.stem_size(images.shape[2:], padding, pool_padding)
    if not torch.compiler.is_compiling() and (0 in images.shape[2:] or min(size) < 1):
        raise ValueError(
            f"{OP}: images must be at least as large as the windows once they are padded, got shape"
            f" {tuple(images.shape)} for padding {tuple(padding)} and pool_padding {pool_padding}"
        )
    needs_gradient = torch.is_grad_enabled() and (images.requires_grad or filters.requires_grad)
    if needs_gradient or not _has_kernel(images.device.type, images.dtype, filters):
        return reference.stem_forward(images, filters, padding, pool_padding)
    return torch.ops.bitfast.stem.native(images, filters, padding, pool_padding)


def prepare_filters(standardized: Tensor, padding: Ints) -> Tensor:
    """Lay standardized filters out as :func:`stem` takes them.

    Args:
        standardized: Shape (out, 3, 7, 7).
        padding: (top, bottom, left, right), as in :func:`stem`. Only whether ``left`` is odd plays a role.

    Returns:
        Shape (out, 7, 8, 4), contiguous: rows of the filters, as eight pixels of four channels. The last
        channel is zero, and so is the first pixel where ``left`` is odd, else the last: so the eight begin at
        an even pixel of the image.

    Raises:
        ValueError: another shape.
    """
    if standardized.dim() != 4 or standardized.shape[1:] != (3, 7, 7):
        raise ValueError(
            f"{OP}: filters must have shape (out, 3, 7, 7), got {tuple(standardized.shape)}"
        )
    first = padding[2] % 2
    filters = standardized.new_zeros((standardized.shape[0], 7, 8, 4))
    filters[:, :, first : first + 7, :3] = standardized.permute(0, 2, 3, 1)
    return filters


def uses_stem(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernel may be used for filters of this dtype where no gradient is recorded.

    It does the work of ``same_padding``, too, and is not used where a backend of that is demanded.
    """
    return (
        dtype in DTYPES
        and requested_backend(SAME_PADDING) in (None, "native")
        and select_backend(OP, device_type, dtype) == "native"
    )


def suits_stem(weight: Tensor, geometry: Geometry, dtype: torch.dtype, images: torch.dtype) -> bool:
    """Whether there is a kernel for a convolution.

    Args:
        weight: Not standardized.
        geometry: Stride, padding and dilation.
        dtype: Of the result.
        images: The dtype of the images.
    """
    stride, padding, dilation = geometry
    return (
        weight.shape[1:] == (3, 7, 7)
        and weight.shape[0] > 0
        and weight.shape[0] % CHANNEL_MULTIPLE == 0
        and (stride, dilation) == ((2, 2), (1, 1))
        and max(padding) <= MOST_PADDING
        and dtype in DTYPES
        and images in (dtype, torch.float32)
    )


def stem_for(
    shape: Ints,
    image_dtype: torch.dtype,
    dtype: torch.dtype,
    channels: int,
    padding: Sides,
    pool_padding: Sides | None,
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Return a function of a stream, images and filters that does what :func:`stem` does, by the kernel.

    The function launches on the current device, past torch's dispatcher. No gradient may be recorded there.

    Args:
        shape: Of the images, as the next two for which :func:`suits_stem` is true.
        image_dtype: Of the images.
        dtype: Of filters and result.
        channels: Of the result.
        padding: As in :func:`stem`, as is ``pool_padding``.
        pool_padding: See there.
    """
    size = reference.stem_size(shape[2:], padding, pool_padding)
    result_shape = (shape[0], channels, *size)
    run = native_cuda.entry("bitfast_stem", *[native_cuda.ADDRESS] * 5)
    calls: dict[tuple[int, ...], StemCall] = {}

    def call(stream: int, images: Tensor, filters: Tensor) -> Tensor:
        strides = images.stride()
        prepared = calls.get(strides)
        if prepared is None:
            prepared = calls[strides] = StemCall.of(
                shape, strides, image_dtype, dtype, channels, padding, pool_padding
            )
        result = torch.empty(
            result_shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
        )
        run(
            ctypes.addressof(prepared), stream, images.data_ptr(), filters.data_ptr(), result.data_ptr()
        )  # fmt: skip
        return result

    return call


class StemCall(ctypes.Structure):
    """``bitfast::stem::Call`` of ``csrc/stem_cuda.h``: what stays the same from call to call."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("image_dtype", ctypes.c_int32),
        ("images", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("strides", ctypes.c_int64 * 4),
        ("channels", ctypes.c_int32),
        ("top", ctypes.c_int32),
        ("left", ctypes.c_int32),
        ("conv_size", ctypes.c_int32 * 2),
        ("pools", ctypes.c_int32),
        ("pool_top", ctypes.c_int32),
        ("pool_left", ctypes.c_int32),
        ("result_size", ctypes.c_int32 * 2),
    )

    @classmethod
    def of(
        cls,
        shape: Ints,
        strides: Ints,
        image_dtype: torch.dtype,
        dtype: torch.dtype,
        channels: int,
        padding: Ints,
        pool_padding: Ints | None,
    ) -> StemCall:
        """Return the call for images of this shape and these strides."""
        images, _, height, width = shape
        pool_top, _, pool_left, _ = pool_padding or (0, 0, 0, 0)
        return cls(
            dtype=native_cuda.DTYPES[dtype],
            image_dtype=native_cuda.DTYPES[image_dtype],
            images=images,
            height=height,
            width=width,
            strides=tuple(strides),
            channels=channels,
            top=padding[0],
            left=padding[2],
            conv_size=reference.stem_size((height, width), padding, None),
            pools=pool_padding is not None,
            pool_top=pool_top,
            pool_left=pool_left,
            result_size=reference.stem_size((height, width), padding, pool_padding),
        )


def _check_sides(name: str, sides: Ints, most: int) -> None:
    if len(sides) != 4 or not all(isinstance(n, int) and 0 <= n <= most for n in sides):
        raise ValueError(
            f"{OP}: {name} must be four integers from 0 to {most} (top, bottom, left, right), got {sides!r}"
        )


def _has_kernel(device_type: str, image_dtype: torch.dtype, filters: Tensor) -> bool:
    return (
        image_dtype in (filters.dtype, torch.float32)
        and filters.shape[0] > 0
        and filters.shape[0] % CHANNEL_MULTIPLE == 0
        and uses_stem(device_type, filters.dtype)
    )


# ---- the operator ---------------------------------------------------------------------------------


def _native(images: Tensor, filters: Tensor, padding: Ints, pool_padding: Ints | None) -> Tensor:
    filters = filters.contiguous()
    if filters.data_ptr() % 16:
        filters = filters.clone()
    pooled: Any = None if pool_padding is None else tuple(pool_padding)
    sides: Any = tuple(padding)
    with torch.cuda.device_of(images):
        stream = torch.cuda.current_stream().cuda_stream if images.is_cuda else 0
        run = stem_for(images.shape, images.dtype, filters.dtype, filters.shape[0], sides, pooled)
        return run(stream, images, filters)


def _fake(images: Tensor, filters: Tensor, padding: Ints, pool_padding: Ints | None) -> Tensor:
    size = reference.stem_size(images.shape[2:], padding, pool_padding)
    shape = (images.shape[0], filters.shape[0], *size)
    return filters.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _check(device: torch.device) -> str | None:
    """Compare the kernel with plain PyTorch in float64, on small images."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[torch.dtype, torch.dtype, tuple[int, ...], Sides, Sides | None]] = [
        (torch.bfloat16, torch.bfloat16, (2, 3, 70, 64), (3, 3, 3, 3), (1, 1, 1, 1)),
        (torch.float16, torch.float32, (1, 3, 37, 300), (2, 3, 2, 3), (0, 1, 0, 1)),
        (torch.bfloat16, torch.float32, (2, 3, 33, 31), (3, 3, 3, 3), None),
    ]
    for dtype, image_dtype, shape, padding, pool_padding in cases:
        images = torch.randn(shape, generator=generator).to(device, image_dtype)
        weight = torch.randn((CHANNEL_MULTIPLE, 3, 7, 7), generator=generator)
        filters = prepare_filters(weight.to(device, dtype), padding)
        result = _native(images, filters, padding, pool_padding)
        expected = reference.stem_forward(
            images.to(dtype).double(), filters.double(), padding, pool_padding
        )
        problem = difference("the result", result, expected)
        if problem is not None:
            return problem
    return None


define_operator(OP, "native", SIGNATURE, _native, _fake)
refuse_derivatives(OP, "native")
register_kernel(OP, "native", "cuda", DTYPES, lambda: why_unusable(OP))
register_first_use(OP, _check)

__all__ = ["StemCall", "prepare_filters", "stem", "stem_for", "suits_stem", "uses_stem"]
