"""Weight standardization of convolution filters.

Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019
(https://arxiv.org/abs/1903.10520).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import register_kernel, select_backend
from bitfast.memory_format import laid_out
from bitfast.ops import weight_standardization_triton as kernels
from bitfast.ops.common import (
    NATIVE_CPU_DTYPES,
    autocast_dtype,
    complete_operator,
    define_operator,
    register_triton_kernels,
    show_launches,
)
from bitfast.ops.derivatives import (
    call_without_autograd,
    can_use_backward_kernel,
    connect_derivatives,
    differentiable_gradients,
    refuse_derivatives,
)
from bitfast.ops.eager import may_launch
from bitfast.ops.first_use import register_first_use, why_unusable
from bitfast.ops.weight_buffer import ALIGNMENT, pack, starts_of, unpack
from bitfast.ops.weight_standardization_contract import (
    ALL_BACKWARD_SIGNATURE,
    ALL_OP,
    ALL_SIGNATURE,
    BACKWARD_SIGNATURE,
    OP,
    SIGNATURE,
    check,
    fake,
    fake_all,
    fake_all_backward,
    fake_backward,
)
from bitfast.ops.weight_standardization_cuda import NATIVE_CUDA_DTYPES, check_first_use
from bitfast.ops.weight_standardization_eager import launch_all


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
    check("weight", weight, eps, dtype)
    dtype = dtype or autocast_dtype(weight)
    backend = select_backend(OP, weight.device.type, weight.dtype)
    if backend == "reference":
        return reference.weight_standardization_forward(weight, eps, dtype)[0]
    operator = getattr(torch.ops.bitfast.weight_standardization, backend)
    result = operator(weight, eps, _kernel_dtype(backend, weight.device, dtype))[0]
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
    if len(weights) > 0 and may_launch(OP, weights[0]):
        launched = launch_all(weights, eps, dtype, channels_last)
        if launched is not None:
            return launched
    for number, weight in enumerate(weights):
        check(f"weights[{number}]", weight, eps, dtype)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, weight in enumerate(weights):
        alike.setdefault((weight.device, weight.dtype), []).append(number)
    results: dict[int, Tensor] = {}
    for numbers in alike.values():
        members = [weights[number] for number in numbers]
        results |= zip(numbers, _standardize_alike(members, eps, dtype, channels_last), strict=True)
    return [results[number] for number in range(len(weights))]


def standardizes_together(weight: Tensor) -> bool:
    """Whether the backend for such a weight is faster by :func:`weight_standardization_all`.

    On a GPU that saves launches. On the CPU it is slower: the pages of one large buffer come from the system
    anew each time.
    """
    backend = select_backend(OP, weight.device.type, weight.dtype)
    return backend == "triton" or (backend == "native" and weight.is_cuda)


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
    kernel_dtype = _kernel_dtype(backend, weights[0].device, dtype)
    results = []
    in_parts = backend == "native" and not weights[0].is_cuda
    for part in _parts(weights, NATIVE_BUFFER_ELEMENTS) if in_parts else [weights]:
        packed, _, _ = operator(part, eps, kernel_dtype, channels_last)
        results += unpack(packed.to(dtype or part[0].dtype), part, channels_last)
    return results


NATIVE_BUFFER_ELEMENTS = 4 * 2**20
"""On the CPU a larger buffer is mapped anew in each call, and its fresh pages cost more than the arithmetic."""


def _parts(weights: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """Cut weights into lists of at most ``most`` elements, or of a single weight."""
    parts: list[list[Tensor]] = []
    total = most
    for weight in weights:
        total += weight.numel()
        if total > most:
            parts.append([])
            total = weight.numel()
        parts[-1].append(weight)
    return parts


def _kernel_dtype(
    backend: str, device: torch.device, dtype: torch.dtype | None
) -> torch.dtype | None:
    """Return the dtype to ask a kernel for: float32 where it cannot write ``dtype``."""
    if backend != "native" or dtype is None:
        return dtype
    writes = NATIVE_CUDA_DTYPES if device.type == "cuda" else NATIVE_CPU_DTYPES
    return dtype if dtype in writes else torch.float32


# ---- the operators --------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, ctx.eps, ctx.dtype = inputs
    _, mean, rstd = output
    ctx.save_for_backward(weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::weight_standardization.<backend>`` and its backward."""
    define_operator(OP, backend, SIGNATURE, forward, fake)
    define_operator(f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, fake_backward)
    _connect_gradients(backend)


def _connect_gradients(backend: str) -> None:
    backward_op = getattr(torch.ops.bitfast.weight_standardization_backward, backend)
    refuse_derivatives(f"{OP}_backward", backend)

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if can_use_backward_kernel(grad):
            return call_without_autograd(backward_op, grad, *ctx.saved_tensors), None, None

        def composite(weight: Tensor) -> Tensor:
            return reference.weight_standardization_forward(weight, ctx.eps, ctx.dtype)[0]

        return *differentiable_gradients(composite, ctx.saved_tensors[:1], grad), None, None

    connect_derivatives(
        OP, backend, _setup_context, run_backward, reference.weight_standardization_forward
    )


def _setup_all_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, ctx.eps, ctx.dtype, ctx.channels_last = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*weights, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_all_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::weight_standardization_all.<backend>`` and its backward."""
    define_operator(ALL_OP, backend, ALL_SIGNATURE, forward, fake_all)
    define_operator(
        f"{ALL_OP}_backward", backend, ALL_BACKWARD_SIGNATURE, backward, fake_all_backward
    )
    _connect_all_gradients(backend)


def _connect_all_gradients(backend: str) -> None:
    backward_op = getattr(torch.ops.bitfast.weight_standardization_all_backward, backend)
    refuse_derivatives(f"{ALL_OP}_backward", backend)

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Sequence[Tensor | None] | None, ...]:
        *weights, mean, rstd = ctx.saved_tensors
        if can_use_backward_kernel(grad):
            packed = call_without_autograd(
                backward_op, grad, weights, mean, rstd, ctx.channels_last
            )
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


define_kernel("triton", kernels.forward, kernels.backward)
define_all_kernel("triton", kernels.all_forward, kernels.all_backward)
# Not for all weights: their table holds addresses, which exist only when the kernels are launched.
show_launches(OP, kernels.forward)
show_launches(f"{OP}_backward", kernels.backward)
register_triton_kernels(OP)


# ---- native ---------------------------------------------------------------------------------------

register_kernel(OP, "native", "cpu", NATIVE_CPU_DTYPES, lambda: extension.CPU.problem)
register_kernel(OP, "native", "cuda", NATIVE_CUDA_DTYPES, lambda: why_unusable(OP))
register_first_use(OP, check_first_use)
if extension.CPU.problem is None:  # then csrc/weight_standardization.cpp has defined the schemas
    complete_operator(OP, "native", SIGNATURE, fake)
    complete_operator(f"{OP}_backward", "native", BACKWARD_SIGNATURE, fake_backward)
    complete_operator(ALL_OP, "native", ALL_SIGNATURE, fake_all)
    complete_operator(f"{ALL_OP}_backward", "native", ALL_BACKWARD_SIGNATURE, fake_all_backward)
    _connect_gradients("native")
    _connect_all_gradients("native")

__all__ = [
    "ALIGNMENT",
    "ALL_OP",
    "OP",
    "define_all_kernel",
    "define_kernel",
    "pack",
    "standardizes_together",
    "starts_of",
    "unpack",
    "weight_standardization",
    "weight_standardization_all",
]
