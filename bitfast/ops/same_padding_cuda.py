"""The CUDA kernels of same_padding (``csrc/same_padding.cu``), called past torch's dispatcher."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.memory_format import format_for, is_channels_last
from bitfast.ops.derivatives import call_without_autograd, can_use_backward_kernel
from bitfast.ops.eager import PLAIN_TYPES, current_stream, has_unusual_memory, is_unwatched
from bitfast.ops.native_cuda import ADDRESS, DTYPES, entry
from bitfast.reference import Ints

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

NO_WINDOW: Window = ((1, 1), (1, 1), (1, 1))

NUMBERS = (
    "images", "channels", "height", "width", "result_height", "result_width",
    "image_stride", "channel_stride", "row_stride", "pixel_stride", "top", "left",
    "kernel_height", "kernel_width", "stride_height", "stride_width", "dilation_height", "dilation_width",
)  # fmt: skip


class Call(ctypes.Structure):
    """``SamePaddingCall`` of ``csrc/same_padding_cuda.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("value", ctypes.c_float),
        ("dtype", ctypes.c_int),
        ("channels_last", ctypes.c_int),
    )


def new_call(
    shape: Ints,
    strides: Ints,
    dtype: torch.dtype,
    channels_last: bool,
    size: Ints,
    window: Window,
    sides: Ints,
    value: float,
) -> Call:
    """Return what a kernel must know besides addresses.

    Args:
        shape, strides: Of x.
        dtype: Of x.
        channels_last: Whether x is; then the results are, too.
        size: (height, width) of x when it is padded, or pooled.
        window: Kernel size, stride and dilation of a pool.
        sides: The padding.
        value: What the padding holds.
    """
    kernel_size, stride, dilation = window
    return Call(
        *shape, *size, *strides, sides[0], sides[2], *kernel_size, *stride, *dilation,
        value, DTYPES[dtype], channels_last,
    )  # fmt: skip


class _Prepared:
    """What the calls for maps of one shape, layout, dtype and device have in common."""

    def __init__(self, x: Tensor, size: Ints, window: Window, sides: Ints, value: float) -> None:
        self.device, self.dtype, self.is_last = x.device, x.dtype, is_channels_last(x)
        self.memory_format = format_for(self.is_last)
        self.shape = (*x.shape[:2], *size)
        self.strides = self._strides_of(self.shape)
        self._call = new_call(
            x.shape, x.stride(), x.dtype, self.is_last, size, window, sides, value
        )
        self._told = ctypes.byref(self._call)

    def _strides_of(self, shape: Ints) -> tuple[int, ...]:
        return torch.empty(shape, device="meta", memory_format=self.memory_format).stride()

    def as_current(self) -> Any:
        """Return a context in which the device of the maps is the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class PreparedPad(_Prepared):
    """Pads maps of one shape, layout, dtype and device."""

    def __init__(self, x: Tensor, sides: Ints, value: float) -> None:
        super().__init__(x, reference.padded_size(x.shape[2:], sides), NO_WINDOW, sides, value)
        self._launch = entry("bitfast_same_pad", *(ADDRESS,) * 4)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x, padded; no gradient is recorded."""
        stream = current_stream(self.device)
        if stream is None:
            with self.as_current():
                return self(x)
        result = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        self._launch(self._told, stream, x.data_ptr(), result.data_ptr())
        return result


class PreparedMaxPool(_Prepared):
    """Pools maps of one shape, layout, dtype and device, and hands gradients back."""

    def __init__(self, x: Tensor, window: Window, sides: list[int], value: float) -> None:
        super().__init__(
            x, reference.pooled_size(x.shape[2:], *window, sides), window, sides, value
        )
        self.input_shape, self.window, self.sides = tuple(x.shape), window, sides
        self.input_strides = self._strides_of(self.input_shape)
        self.tap_dtype = reference.dtype_of_taps(window[0])
        self._launch = entry("bitfast_same_max_pool", *(ADDRESS,) * 5)
        self._launch_backward = entry("bitfast_same_max_pool_backward", *(ADDRESS,) * 5)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x, padded and pooled; a gradient is recorded where x requires one."""
        if x.requires_grad and torch.is_grad_enabled():
            pooled: Tensor = SameMaxPool.apply(self, x)
            return pooled
        return self.forward(x, False)[0]

    def forward(self, x: Tensor, with_taps: bool) -> tuple[Tensor, Tensor | None]:
        """Return x, padded and pooled, and if they are wanted the taps."""
        stream = current_stream(self.device)
        if stream is None:
            with self.as_current():
                return self.forward(x, with_taps)
        result = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        taps, taps_at = None, 0
        if with_taps:
            taps = torch.empty_strided(
                self.shape, self.strides, dtype=self.tap_dtype, device=self.device
            )
            taps_at = taps.data_ptr()
        self._launch(self._told, stream, x.data_ptr(), result.data_ptr(), taps_at)
        return result, taps

    def backward(self, grad: Tensor, taps: Tensor) -> Tensor:
        """Return the gradient of x from that of the result."""
        if not torch.is_grad_enabled() and self._takes(grad):
            return self.gather(grad, taps)
        arguments = (grad, taps, self.input_shape[2:], *self.window, self.sides)
        if can_use_backward_kernel(grad):
            return call_without_autograd(
                torch.ops.bitfast.same_max_pool_backward.native, *arguments
            )
        return reference.same_max_pool_backward(*arguments)

    def _takes(self, grad: Tensor) -> bool:
        """Whether the kernel can take a gradient, and nobody has to see an operator."""
        return (
            type(grad) in PLAIN_TYPES
            and is_unwatched()
            and not has_unusual_memory(grad)
            and grad.dtype == self.dtype
            and grad.is_contiguous(memory_format=self.memory_format)
        )

    def gather(self, grad: Tensor, taps: Tensor) -> Tensor:
        """Return the gradient of x by the kernel. ``grad`` has the layout and the dtype of the result."""
        stream = current_stream(self.device)
        if stream is None:
            with self.as_current():
                return self.gather(grad, taps)
        result = torch.empty_strided(
            self.input_shape, self.input_strides, dtype=self.dtype, device=self.device
        )
        self._launch_backward(
            self._told, stream, grad.data_ptr(), taps.data_ptr(), result.data_ptr()
        )
        return result


class SameMaxPool(torch.autograd.Function):
    """``same_max_pool`` as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: PreparedMaxPool, x: Tensor) -> Tensor:
        """Return the result."""
        result, taps = call.forward(x, True)
        ctx.call = call
        ctx.save_for_backward(taps)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        return None, ctx.call.backward(grad, *ctx.saved_tensors)


# ---- first use ----------------------------------------------------------------------------------

CHECKED: tuple[tuple[tuple[int, int, int, int], Window, list[int]], ...] = (
    ((2, 16, 11, 14), ((3, 3), (2, 2), (1, 1)), [1, 1, 1, 1]),
    ((2, 16, 12, 9), ((3, 3), (2, 2), (1, 1)), [0, 1, 0, 1]),
    ((2, 3, 9, 8), ((3, 2), (2, 3), (1, 2)), [0, 2, 1, 1]),
)
"""Shapes, windows and paddings: for the kernels of the stem's pool, and for those of any window."""


def check_first_use(device: torch.device) -> str | None:
    """Run all kernels on small maps; return how one differs from plain PyTorch, or None.

    The numbers are such that no dtype rounds them, so that nothing may differ.
    """
    for shape, window, sides in CHECKED:
        for dtype in DTYPES:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = _small_numbers(shape).contiguous(memory_format=memory_format)
                for name, result, expected in _results(x, dtype, device, window, sides):
                    if not torch.equal(result.double().cpu(), expected.double()):
                        return f"{name} of {dtype}, {memory_format}, window {window}"
    return None


def _results(
    x: Tensor, dtype: torch.dtype, device: torch.device, window: Window, sides: list[int]
) -> list[tuple[str, Tensor, Tensor]]:
    """Return by name what the kernels make of x, and what is right."""
    on_device, value = x.to(device, dtype), -0.5
    pool = PreparedMaxPool(on_device, window, sides, value)
    pooled, taps = pool.forward(on_device, True)
    assert taps is not None
    right, right_taps = reference.same_max_pool_forward(x, *window, sides, value, True)
    grad = _small_numbers(right.shape).contiguous(memory_format=pool.memory_format)
    grad_x = pool.gather(grad.to(device, dtype), taps)
    right_grad_x = reference.same_max_pool_backward(grad, right_taps, x.shape[2:], *window, sides)
    padded = PreparedPad(on_device, sides, value)(on_device)
    return [
        ("same_pad", padded, reference.same_pad_forward(x, sides, value)),
        ("same_max_pool", pool.forward(on_device, False)[0], right),
        ("same_max_pool with taps", pooled, right),
        ("the taps of same_max_pool", taps, right_taps),
        ("same_max_pool_backward", grad_x, right_grad_x),
    ]


def _small_numbers(shape: Ints) -> Tensor:
    """Return multiples of a quarter between -2 and 2, many of them equal, in float64."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.float64).mul(7919).remainder(101).remainder(17)
    return ((numbers - 8) / 4).view(shape)


__all__ = [
    "Call",
    "PreparedMaxPool",
    "PreparedPad",
    "SameMaxPool",
    "check_first_use",
    "new_call",
]
