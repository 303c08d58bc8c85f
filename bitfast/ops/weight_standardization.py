"""Weight standardization of convolution filters.

Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019
(https://arxiv.org/abs/1903.10520).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import register_kernel, select_backend
from bitfast.memory_format import is_channels_last, laid_out, memory_format_of
from bitfast.ops.common import (
    NATIVE_CPU_DTYPES,
    announce_triton_kernels,
    autocast_dtype,
    check_floating,
    complete_operator,
    define_operator,
    run_launches,
    show_launches,
)
from bitfast.ops.derivatives import (
    connect_derivatives,
    differentiable_gradients,
    refuse_derivatives,
    run_underived,
    wants_numbers_only,
)

OP = "weight_standardization"
ALL_OP = "weight_standardization_all"

SIGNATURE = "(Tensor weight, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)"
"""What every kernel takes and returns: the result, and the mean and 1/std of each filter, in float32
(float64 for float64 weights)."""

BACKWARD_SIGNATURE = "(Tensor grad, Tensor weight, Tensor mean, Tensor rstd) -> Tensor"
"""What every backward kernel takes and returns: the gradient of weight."""

ALL_SIGNATURE = (
    "(Tensor[] weights, float eps, ScalarType? dtype, bool channels_last)"
    " -> (Tensor, Tensor, Tensor)"
)
"""The same of several weights: the results in one buffer, as ``starts_of`` says, and the statistics of
all filters one after the other. With ``channels_last`` every result has that layout."""

ALL_BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor[] weights, Tensor mean, Tensor rstd, bool channels_last) -> Tensor"
)
"""What their backward takes and returns: the gradients in one buffer, in the layouts of the weights."""


def weight_standardization(
    weight: Tensor, eps: float = 1e-8, dtype: torch.dtype | None = None
) -> Tensor:
    """Shift and scale each output filter to zero mean and unit (biased) variance.

    Computed in float32 (float64 for float64 weights) whatever the dtypes, then rounded once.

    Args:
        weight: Shape (out, in, kernel height, kernel width), floating point, any strides.
        eps: Added to the variance before the square root.
        dtype: Of the result. Default: under autocast the autocast dtype, else that of ``weight``.

    Returns:
        The shape of ``weight``; channels_last if it is, else contiguous.

    Raises:
        TypeError: ``weight`` or ``dtype`` is not floating point.
        ValueError: ``weight`` is not four-dimensional or is empty, or ``eps`` is negative.
    """
    _check("weight", weight, eps, dtype)
    dtype = dtype or autocast_dtype(weight)
    backend = select_backend(OP, weight.device.type, weight.dtype)
    if backend == "reference":
        return reference.weight_standardization_forward(weight, eps, dtype)[0]
    operator = getattr(torch.ops.bitfast.weight_standardization, backend)
    result = operator(weight, eps, _kernel_dtype(backend, dtype))[0]
    return result.to(dtype or weight.dtype)


def weight_standardization_all(
    weights: Sequence[Tensor],
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> list[Tensor]:
    """Standardize several weights, those of one dtype and device in one launch where there is a GPU.

    Args:
        weights: Each as in :func:`weight_standardization`.
        eps: Added to each variance before the square root.
        dtype: Of the results. Default: under autocast the autocast dtype, else that of each weight.
        channels_last: Return channels_last whatever the layouts of the weights.

    Returns:
        A result for each weight. They may share storage.

    Raises:
        TypeError, ValueError: As :func:`weight_standardization`, with the number of the weight.
    """
    for number, weight in enumerate(weights):
        _check(f"weights[{number}]", weight, eps, dtype)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, weight in enumerate(weights):
        alike.setdefault((weight.device, weight.dtype), []).append(number)
    results: dict[int, Tensor] = {}
    for numbers in alike.values():
        members = [weights[number] for number in numbers]
        results |= zip(numbers, _standardize_alike(members, eps, dtype, channels_last), strict=True)
    return [results[number] for number in range(len(weights))]


def standardizes_together(weight: Tensor) -> bool:
    """Say whether the backend for such a weight gains from :func:`weight_standardization_all`.

    On a GPU it saves launches. On the CPU there are none to save, and one large buffer costs more time than
    it saves: its pages come from the system anew each time.
    """
    return select_backend(OP, weight.device.type, weight.dtype) == "triton"


def _standardize_alike(
    weights: list[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> list[Tensor]:
    """Standardize weights of one dtype on one device."""
    dtype = dtype or autocast_dtype(weights[0])
    backend = select_backend(OP, weights[0].device.type, weights[0].dtype)
    if backend == "reference":
        results = [reference.weight_standardization_forward(w, eps, dtype)[0] for w in weights]
        if channels_last:
            results = [laid_out(r, torch.channels_last) for r in results]
        return results
    operator = getattr(torch.ops.bitfast.weight_standardization_all, backend)
    results = []
    for part in _parts(weights, NATIVE_BUFFER_ELEMENTS) if backend == "native" else [weights]:
        packed, _, _ = operator(part, eps, _kernel_dtype(backend, dtype), channels_last)
        results += unpack(packed.to(dtype or part[0].dtype), part, channels_last)
    return results


NATIVE_BUFFER_ELEMENTS = 4 * 2**20
"""On the CPU a larger buffer is mapped anew in each call, and its fresh pages cost more than the arithmetic."""


def _parts(weights: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """Cut weights into runs of at most so many elements, or of a single weight."""
    parts: list[list[Tensor]] = []
    total = most
    for weight in weights:
        total += weight.numel()
        if total > most:
            parts.append([])
            total = weight.numel()
        parts[-1].append(weight)
    return parts


def _kernel_dtype(backend: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to ask a kernel for: float32 where it cannot write the one that is wanted."""
    if backend == "native" and dtype is not None and dtype not in NATIVE_CPU_DTYPES:
        return torch.float32
    return dtype


def _check(name: str, weight: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    check_floating(OP, name, weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{OP}: {name} must have shape (out, in, height, width), each at least 1,"
            f" got {tuple(weight.shape)}"
        )
    if eps < 0:
        raise ValueError(f"{OP}: eps must be at least 0, got {eps}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{OP}: dtype must be a floating-point dtype, got {dtype}")


# ---- the buffer of several weights ----------------------------------------------------------------

ALIGNMENT = 64
"""Elements. Each weight begins at a multiple: in 16-bit types a cache line of 128 bytes."""


def starts_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where weights of these sizes begin in the buffer, and the buffer's size; in elements."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def unpack(packed: Tensor, weights: Sequence[Tensor], channels_last: bool) -> list[Tensor]:
    """Return views of the buffer in the shapes of the weights, differentiable.

    Each is channels_last if its weight is, or if ``channels_last``; else contiguous.
    """
    starts, end = starts_of([weight.numel() for weight in weights])
    lengths = [b - a for a, b in zip(starts, [*starts[1:], end], strict=True)]
    views = []
    for piece, weight in zip(packed.split(lengths), weights, strict=True):
        out, channels, height, width = weight.shape
        flat = piece if piece.shape[0] == weight.numel() else piece[: weight.numel()]
        if channels_last or is_channels_last(weight):
            views.append(flat.view(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            views.append(flat.view(weight.shape))
    return views


def pack(tensors: Sequence[Tensor], channels_last: bool, like: Sequence[Tensor]) -> Tensor:
    """Return a buffer of which :func:`unpack` gives these tensors, shaped ``like`` the weights."""
    pieces = []
    for tensor, weight in zip(tensors, like, strict=True):
        if channels_last or is_channels_last(weight):
            tensor = tensor.permute(0, 2, 3, 1)
        pieces.append(F.pad(tensor.flatten(), (0, -tensor.numel() % ALIGNMENT)))
    return torch.cat(pieces)


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake(weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    result = torch.empty_like(
        weight, dtype=dtype or weight.dtype, memory_format=memory_format_of(weight)
    )
    mean = weight.new_empty((weight.shape[0],), dtype=reference.compute_dtype(weight.dtype))
    return result, mean, torch.empty_like(mean)


def _fake_backward(grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=memory_format_of(weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, ctx.eps, ctx.dtype = inputs
    _, mean, rstd = output
    ctx.save_for_backward(weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::weight_standardization.<backend>`` and its backward."""
    define_operator(OP, backend, SIGNATURE, forward, _fake)
    define_operator(f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, _fake_backward)
    _connect_gradients(backend)


def _connect_gradients(backend: str) -> None:
    backward_op = getattr(torch.ops.bitfast.weight_standardization_backward, backend)
    refuse_derivatives(f"{OP}_backward", backend)

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if wants_numbers_only(grad):
            return run_underived(backward_op, grad, *ctx.saved_tensors), None, None

        def composite(weight: Tensor) -> Tensor:
            return reference.weight_standardization_forward(weight, ctx.eps, ctx.dtype)[0]

        return *differentiable_gradients(composite, ctx.saved_tensors[:1], grad), None, None

    connect_derivatives(
        OP, backend, _setup_context, run_backward, reference.weight_standardization_forward
    )


def _fake_all(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    like = weights[0]
    _, end = starts_of([weight.numel() for weight in weights])
    packed = like.new_empty((end,), dtype=dtype or like.dtype)
    filters = sum(weight.shape[0] for weight in weights)
    mean = like.new_empty((filters,), dtype=reference.compute_dtype(like.dtype))
    return packed, mean, torch.empty_like(mean)


def _fake_all_backward(
    grad: Tensor, weights: Sequence[Tensor], mean: Tensor, rstd: Tensor, channels_last: bool
) -> Tensor:
    return torch.empty_like(grad, dtype=weights[0].dtype)


def _setup_all_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, ctx.eps, ctx.dtype, ctx.channels_last = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*weights, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_all_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::weight_standardization_all.<backend>`` and its backward."""
    define_operator(ALL_OP, backend, ALL_SIGNATURE, forward, _fake_all)
    define_operator(
        f"{ALL_OP}_backward", backend, ALL_BACKWARD_SIGNATURE, backward, _fake_all_backward
    )
    _connect_all_gradients(backend)


def _connect_all_gradients(backend: str) -> None:
    backward_op = getattr(torch.ops.bitfast.weight_standardization_all_backward, backend)
    refuse_derivatives(f"{ALL_OP}_backward", backend)

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Sequence[Tensor | None] | None, ...]:
        *weights, mean, rstd = ctx.saved_tensors
        if wants_numbers_only(grad):
            packed = run_underived(backward_op, grad, weights, mean, rstd, ctx.channels_last)
            return unpack(packed, weights, channels_last=False), None, None, None

        def composite(*weights: Tensor) -> Tensor:
            return _reference_all(weights, ctx.eps, ctx.dtype, ctx.channels_last)[0]

        return differentiable_gradients(composite, weights, grad), None, None, None

    connect_derivatives(ALL_OP, backend, _setup_all_context, run_backward, _reference_all)


def _reference_all(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    results, means, rstds = zip(
        *(reference.weight_standardization_forward(w, eps, dtype) for w in weights), strict=True
    )
    return pack(results, channels_last, weights), torch.cat(means), torch.cat(rstds)


def _reference_all_backward(
    grad: Tensor, weights: Sequence[Tensor], mean: Tensor, rstd: Tensor, channels_last: bool
) -> Tensor:
    filters = [weight.shape[0] for weight in weights]
    per_weight = zip(
        unpack(grad, weights, channels_last), weights, mean.split(filters), rstd.split(filters),
        strict=True,
    )  # fmt: skip
    gradients = [reference.weight_standardization_backward(*arguments) for arguments in per_weight]
    return pack(gradients, False, weights)


define_kernel(
    "reference",
    reference.weight_standardization_forward,
    reference.weight_standardization_backward,
)
define_all_kernel("reference", _reference_all, _reference_all_backward)


# ---- Triton ---------------------------------------------------------------------------------------


def _triton_forward(
    weight: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    from bitfast.kernels import weight_standardization as kernels

    weight = weight.contiguous(memory_format=memory_format_of(weight))
    result, mean, rstd = _fake(weight, eps, dtype)
    launch = kernels.forward_launch(weight, eps, False, result=result, mean=mean, rstd=rstd)
    run_launches([launch], weight)
    return result, mean, rstd


def _triton_backward(grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    from bitfast.kernels import weight_standardization as kernels

    memory_format = memory_format_of(weight)
    weight = weight.contiguous(memory_format=memory_format)
    grad = grad.contiguous(memory_format=memory_format)
    result = torch.empty_like(weight)
    launch = kernels.backward_launch(grad, weight, mean, rstd, False, grad_weight=result)
    run_launches([launch], weight)
    return result


def _triton_all(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from bitfast.kernels import weight_standardization as kernels

    weights = [w.contiguous(memory_format=memory_format_of(w)) for w in weights]
    result, mean, rstd = _fake_all(weights, eps, dtype, channels_last)
    starts, _ = starts_of([w.numel() for w in weights])
    launches = kernels.forward_all_launches(
        weights, starts, eps, channels_last, result=result, mean=mean, rstd=rstd
    )
    run_launches(launches, weights[0])
    return result, mean, rstd


def _triton_all_backward(
    grad: Tensor, weights: Sequence[Tensor], mean: Tensor, rstd: Tensor, channels_last: bool
) -> Tensor:
    from bitfast.kernels import weight_standardization as kernels

    weights = [w.contiguous(memory_format=memory_format_of(w)) for w in weights]
    result = _fake_all_backward(grad, weights, mean, rstd, channels_last)
    starts, _ = starts_of([w.numel() for w in weights])
    launches = kernels.backward_all_launches(
        grad.contiguous(), weights, starts, mean, rstd, channels_last, grad_weight=result
    )
    run_launches(launches, weights[0])
    return result


define_kernel("triton", _triton_forward, _triton_backward)
define_all_kernel("triton", _triton_all, _triton_all_backward)
# Not those of all weights: their table holds addresses, which exist only when they run.
show_launches(OP, _triton_forward)
show_launches(f"{OP}_backward", _triton_backward)
announce_triton_kernels(OP)


# ---- native ---------------------------------------------------------------------------------------

register_kernel(OP, "native", "cpu", NATIVE_CPU_DTYPES, lambda: extension.CPU.problem)
if extension.CPU.problem is None:  # then csrc/weight_standardization.cpp has defined the schemas
    complete_operator(OP, "native", SIGNATURE, _fake)
    complete_operator(f"{OP}_backward", "native", BACKWARD_SIGNATURE, _fake_backward)
    complete_operator(ALL_OP, "native", ALL_SIGNATURE, _fake_all)
    complete_operator(f"{ALL_OP}_backward", "native", ALL_BACKWARD_SIGNATURE, _fake_all_backward)
    _connect_gradients("native")
    _connect_all_gradients("native")
