"""TensorFlow's "same" padding, computed from the input's size, and max-pooling that pads as it reads.

The rule is that of https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2: the output has
ceil(size / stride) pixels along each axis, and of an odd number of zeros the extra one comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import register_kernel, requested_backend, select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops import first_use
from bitfast.ops import same_padding_cuda as cuda
from bitfast.ops.common import check_nchw, check_pair, complete_operator, define_operator
from bitfast.ops.derivatives import (
    call_without_autograd,
    can_use_backward_kernel,
    connect_derivatives,
    refuse_derivatives,
)
from bitfast.ops.eager import BoundedCache, has_unusual_memory, may_launch
from bitfast.ops.same_padding_cuda import Window
from bitfast.reference import Ints
from bitfast.torch_state import is_exporting

OP = "same_padding"

PAD_SIGNATURE = "(Tensor x, SymInt[] padding, float value) -> Tensor"
"""Of every backend's ``same_pad``. ``padding`` is (top, bottom, left, right); a negative
number crops, so that the gradient of a pad is the pad by the negated numbers."""

MAX_POOL_SIGNATURE = (
    "(Tensor x, int[] kernel_size, int[] stride, int[] dilation, SymInt[] padding, float value,"
    " bool with_taps) -> (Tensor, Tensor)"
)
"""Of every backend's ``same_max_pool``. Returns the result, and if ``with_taps`` the tap of each of its pixels:
the number, row by row from 0, of the window's pixel that was the maximum, uint8 in windows of up to 256
pixels, else int16 (otherwise shape (0,)). Of equal pixels the first counts; a NaN is larger than anything."""

MAX_POOL_BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor taps, SymInt[] size, int[] kernel_size, int[] stride, int[] dilation,"
    " SymInt[] padding) -> Tensor"
)
"""Of every backend's ``same_max_pool_backward``. Returns the gradient of x, whose (height, width) is ``size``.
Gradients of pixels of the padding are dropped."""

Function = Callable[[Tensor], Tensor]

MAX_WINDOW = torch.iinfo(torch.int16).max
"""Pixels of a pooling window, at most."""

NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def same_pad(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    value: float = 0.0,
) -> Tensor:
    """Pad so that a convolution or pooling of this geometry gives ceil(size / stride) pixels per axis.

    Autocast has no influence: the result has the dtype of x.

    Args:
        x: Shape (N, C, H, W), floating point, any strides.
        kernel_size: Of the window to come; one integer or (height, width), as the next two.
        stride: Of the window to come.
        dilation: Of the window to come.
        value: What the padding holds.

    Returns:
        Shape (N, C, H', W'), channels_last if x is, else contiguous; x itself where it needs no padding
        (while tracing, only where no size would).

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: another shape of ``x``, a geometry that is not positive.
    """
    if may_launch(OP, x) and not (x.requires_grad and torch.is_grad_enabled()):
        pad = _find_call(_new_pad, x, kernel_size, stride, dilation, "same", value)
        if pad is not None:
            return pad(x)
    check_nchw(OP, "x", x)
    window = _check_window(kernel_size, stride, dilation)
    if window[0] == (1, 1):
        return x
    padding = same_padding(x.shape[2:], *window)
    # While tracing, whether a symbolic size needs padding must not decide what is traced.
    if not torch.compiler.is_compiling() and not any(padding):
        return x
    backend = _select(x)
    if backend == "reference":
        return reference.same_pad_forward(x, padding, value)
    return getattr(torch.ops.bitfast.same_pad, backend)(x, padding, value)


def same_max_pool(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    *,
    padding: str | Sequence[int] = "same",
    value: float = 0.0,
) -> Tensor:
    """Max-pool an input that is padded with ``value``, which takes part in the maximum.

    Autocast has no influence: the result has the dtype of x.

    Args:
        x: Shape (N, C, H, W), floating point, any strides, H and W at least 1.
        kernel_size: Of the window, of at most 32,767 pixels; one integer or (height, width), as the
            next two.
        stride: Of the window.
        dilation: Of the window.
        padding: "same", as :func:`same_pad` does it, or (top, bottom, left, right).
        value: What the padding holds.

    Returns:
        Shape (N, C, H', W'), channels_last if x is, else contiguous.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: another shape of ``x``, a geometry that is not positive, a window that is larger
            than the padded input.
    """
    if may_launch(OP, x):
        launch = _find_call(_new_pool, x, kernel_size, stride, dilation, padding, value)
        if launch is not None:
            return launch(x)
    check_nchw(OP, "x", x)
    window = _check_pool_window(kernel_size, stride, dilation)
    sides = _check_padding(x, padding, window)
    if not torch.compiler.is_compiling():
        _check_output(x.shape, sides, window)
    with_taps = x.requires_grad and torch.is_grad_enabled()
    # The gradient that compilers make of the reference for a CPU takes more than twice as long as the kernels.
    is_trained = with_taps and x.device.type == "cpu" and not is_exporting()
    backend = select_backend(OP, "cpu", x.dtype) if is_trained else _select(x)
    if backend == "reference":
        if padding != "same":
            sides = _padding_read(x.shape[2:], window, sides)
        return reference.same_max_pool(x, *window, sides, value)
    pool = getattr(torch.ops.bitfast.same_max_pool, backend)
    return pool(x, *window, sides, value, with_taps)[0]


def pad_for(
    shape: Ints, window: Window, value: float, device_type: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """Return a function that does what :func:`same_pad` does, for tensors of this shape and type.

    The backend is chosen once. No gradient may be recorded where the function is called.

    Args:
        shape: (N, C, H, W).
        window: Kernel size, stride and dilation.
        value: What the padding holds.
        device_type: Of the tensors.
        dtype: Of the tensors.

    Returns:
        None if they need no padding.
    """
    window = _check_window(*window)
    padding = same_padding(shape[2:], *window)
    if window[0] == (1, 1) or not any(padding):
        return None
    backend = select_backend(OP, device_type, dtype)
    if backend == "reference":
        return lambda x: reference.same_pad_forward(x, padding, value)
    if device_type == "cuda":
        return _by_layout(lambda x: cuda.PreparedPad(x, padding, value))
    operator = getattr(torch.ops.bitfast.same_pad, backend)._op
    return lambda x: operator(x, padding, value)


def max_pool_for(
    shape: Ints,
    window: Window,
    padding: Sequence[int] | None,
    value: float,
    device_type: str,
    dtype: torch.dtype,
) -> Callable[[Tensor], Tensor]:
    """Return a function that does what :func:`same_max_pool` does, for tensors of this shape and type.

    The backend is chosen once. No gradient may be recorded where the function is called.

    Args:
        shape, window, value, device_type, dtype: As in :func:`pad_for`.
        padding: (top, bottom, left, right); None: "same".

    Raises:
        ValueError: As :func:`same_max_pool`.
    """
    window, size = _check_pool_window(*window), shape[2:]
    sides = same_padding(size, *window) if padding is None else list(padding)
    _check_output(shape, sides, window)
    backend = select_backend(OP, device_type, dtype)
    if backend == "reference":
        read = sides if padding is None else _padding_read(size, window, sides)
        return lambda x: reference.same_max_pool(x, *window, read, value)
    if device_type == "cuda":
        return _by_layout(lambda x: cuda.PreparedMaxPool(x, window, sides, value))
    operator = getattr(torch.ops.bitfast.same_max_pool, backend)._op
    return lambda x: operator(x, *window, sides, value, False)[0]


def _by_layout(prepare: Callable[[Tensor], Function]) -> Function:
    """Return a function of maps of one shape that prepares the kernels once for each layout and device."""
    known: dict[Any, Function] = {}

    def run(x: Tensor) -> Tensor:
        key = (x.stride(), x.device)
        call = known.get(key)
        if call is None:
            call = known[key] = prepare(x)
        return call(x)

    return run


def same_padding(size: Ints, kernel_size: Ints, stride: Ints, dilation: Ints) -> list[int]:
    """Return (top, bottom, left, right) of the "same" padding of an input of (height, width) ``size``."""
    sides = []
    for n, k, s, d in zip(size, kernel_size, stride, dilation, strict=True):
        reach = (k - 1) * d
        # The pixels that the last window lacks. Written with %, torch.export could not bound the padded size,
        # and Inductor would need minutes for it.
        total = (n - 1) // s * s + reach + 1 - n
        if reach < s - 1:
            total = torch.sym_max(total, 0)
        sides += [total // 2, total - total // 2]
    return sides


def _padding_read(size: Ints, window: Window, padding: Ints) -> list[int]:
    """Return the padding without the last rows and columns that no window reads; negative where x is cropped.

    A pool that reads every row and column needs no guard when it is traced with a symbolic size.
    """
    sides = []
    pooled = reference.pooled_size(size, *window, padding)
    for axis, (n, k, s, d) in enumerate(zip(size, *window, strict=True)):
        before, after = padding[2 * axis : 2 * axis + 2]
        span = (k - 1) * d + 1
        if before <= span:  # else windows may lie in the padding alone, and x has less to crop
            after = (pooled[axis] - 1) * s + span - before - n
        sides += [before, after]
    return sides


# ---- eager calls without torch's dispatcher -----------------------------------------------------

_calls: BoundedCache[Function | None] = BoundedCache(most=256)
"""By the metadata of the arguments; None where an operator is needed."""

_UNKNOWN: Any = object()


def _find_call(make: Callable[..., Function | None], x: Tensor, *arguments: Any) -> Function | None:
    """Return what computes such a call without torch's dispatcher; None where an operator is needed.

    The caller has asked :func:`may_launch` about x.
    """
    try:
        key = (make, x.shape, x.stride(), x.dtype, x.device, arguments, requested_backend(OP))
        call = _calls.get(key, _UNKNOWN)
    except (RuntimeError, TypeError):  # a tensor without strides, lists
        return None
    if call is _UNKNOWN:
        call = _calls.keep(key, make(x, *arguments) if _is_for_cuda(x) else None)
    return None if call is None or has_unusual_memory(x) else call


def _is_for_cuda(x: Tensor) -> bool:
    return x.dim() == 4 and select_backend(OP, x.device.type, x.dtype) == "native"


def _new_pad(
    x: Tensor, kernel_size: Any, stride: Any, dilation: Any, padding: str, value: float
) -> Function | None:
    window = _check_window(kernel_size, stride, dilation)
    sides = same_padding(x.shape[2:], *window)
    if window[0] == (1, 1) or not any(sides):
        return None  # x itself comes back
    return cuda.PreparedPad(x, sides, value)


def _new_pool(
    x: Tensor, kernel_size: Any, stride: Any, dilation: Any, padding: Any, value: float
) -> Function | None:
    window = _check_pool_window(kernel_size, stride, dilation)
    sides = _check_padding(x, padding, window)
    _check_output(x.shape, sides, window)
    return cuda.PreparedMaxPool(x, window, sides, value)


def _select(x: Tensor) -> str:
    """Choose the backend. For a compiler, which can fuse it, that is the reference if none is demanded."""
    if torch.compiler.is_compiling() and requested_backend(OP) is None:
        return "reference"
    return select_backend(OP, x.device.type, x.dtype)


# ---- argument checks ----------------------------------------------------------------------------


def _check_window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    return (
        check_pair(OP, "kernel_size", kernel_size),
        check_pair(OP, "stride", stride),
        check_pair(OP, "dilation", dilation),
    )


def _check_pool_window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    window = _check_window(kernel_size, stride, dilation)
    if window[0][0] * window[0][1] > MAX_WINDOW:
        raise ValueError(
            f"{OP}: kernel_size must cover at most {MAX_WINDOW} pixels, got {kernel_size!r}"
        )
    return window


def _check_padding(x: Tensor, padding: str | Sequence[int], window: Window) -> list[int]:
    if isinstance(padding, str):
        if padding == "same":
            return same_padding(x.shape[2:], *window)
    elif len(padding) == 4 and all(isinstance(side, int) and side >= 0 for side in padding):
        return list(padding)
    raise ValueError(
        f'{OP}: padding must be "same" or four integers >= 0 (top, bottom, left, right),'
        f" got {padding!r}"
    )


def _check_output(shape: Ints, padding: list[int], window: Window) -> None:
    if 0 in shape[2:] or min(reference.pooled_size(shape[2:], *window, padding)) < 1:
        raise ValueError(
            f"{OP}: x must be at least as large as the window once it is padded, got shape"
            f" {tuple(shape)} for kernel_size {window[0]}, dilation {window[2]} and padding {padding}"
        )


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake_pad(x: Tensor, padding: Ints, value: float) -> Tensor:
    height, width = reference.padded_size(x.shape[2:], padding)
    return _new_empty(x, height, width)


def _fake_max_pool(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
    value: float,
    with_taps: bool,
) -> tuple[Tensor, Tensor]:
    height, width = reference.pooled_size(x.shape[2:], kernel_size, stride, dilation, padding)
    result = _new_empty(x, height, width)
    dtype = reference.dtype_of_taps(kernel_size)
    if with_taps:
        return result, torch.empty_like(result, dtype=dtype)
    return result, x.new_empty((0,), dtype=dtype)


def _fake_max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    size: Ints,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    padding: Ints,
) -> Tensor:
    return _new_empty(taps, *size).to(grad.dtype)


def _new_empty(like: Tensor, height: int, width: int) -> Tensor:
    return torch.empty(
        (like.shape[0], like.shape[1], height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format_of(like),
    )


def _save_padding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.padding, _ = inputs


def _save_taps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.window, ctx.padding, _, ctx.with_taps = inputs
    _, taps = output
    ctx.size = x.shape[2:]
    ctx.save_for_backward(taps)
    ctx.mark_non_differentiable(taps)


def _connect_gradients(backend: str) -> None:
    """Make the operators of one backend differentiable."""
    pad = getattr(torch.ops.bitfast.same_pad, backend)
    pool_backward = getattr(torch.ops.bitfast.same_max_pool_backward, backend)
    refuse_derivatives("same_max_pool_backward", backend)

    def backward_of_pad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = pad if can_use_backward_kernel(grad) else reference.same_pad_forward
        return run(grad, [-side for side in ctx.padding], 0.0), None, None

    def backward_of_pool(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if not ctx.with_taps:
            raise RuntimeError("same_max_pool has no gradient unless it ran with with_taps=True")
        arguments = (grad, *ctx.saved_tensors, ctx.size, *ctx.window, ctx.padding)
        # The taps do not depend on the gradient, in which the result is linear.
        if can_use_backward_kernel(grad):
            grad_x = call_without_autograd(pool_backward, *arguments)
        else:
            grad_x = reference.same_max_pool_backward(*arguments)
        return grad_x, *(None,) * 6

    connect_derivatives(
        "same_pad", backend, _save_padding, backward_of_pad, reference.same_pad_forward
    )
    connect_derivatives(
        "same_max_pool", backend, _save_taps, backward_of_pool, reference.same_max_pool_forward
    )


define_operator("same_pad", "reference", PAD_SIGNATURE, reference.same_pad_forward, _fake_pad)
define_operator(
    "same_max_pool",
    "reference",
    MAX_POOL_SIGNATURE,
    reference.same_max_pool_forward,
    _fake_max_pool,
)
define_operator(
    "same_max_pool_backward",
    "reference",
    MAX_POOL_BACKWARD_SIGNATURE,
    reference.same_max_pool_backward,
    _fake_max_pool_backward,
)
_connect_gradients("reference")

register_kernel(OP, "native", "cpu", NATIVE_DTYPES, lambda: extension.CPU.problem)
register_kernel(OP, "native", "cuda", NATIVE_DTYPES, lambda: first_use.why_unusable(OP))
first_use.register_first_use(OP, cuda.check_first_use)
if extension.CPU.problem is None:  # then csrc/same_padding.cpp has defined the schemas
    complete_operator("same_pad", "native", PAD_SIGNATURE, _fake_pad)
    complete_operator("same_max_pool", "native", MAX_POOL_SIGNATURE, _fake_max_pool)
    complete_operator(
        "same_max_pool_backward", "native", MAX_POOL_BACKWARD_SIGNATURE, _fake_max_pool_backward
    )
    _connect_gradients("native")
