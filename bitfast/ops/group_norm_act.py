"""GroupNorm followed by an activation, as one op.

Wu & He, "Group Normalization", 2018 (https://arxiv.org/abs/1803.08494).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import register_kernel, select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops import group_norm_act_eager as eager
from bitfast.ops import group_norm_act_triton as kernels
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
    refuse_derivatives,
)
from bitfast.ops.eager import may_launch
from bitfast.ops.first_use import register_first_use, why_unusable
from bitfast.ops.group_norm_act_backward_cuda import check_backward
from bitfast.ops.group_norm_act_contract import (
    ADD_OP,
    ADD_SIGNATURE,
    BACKWARD_SIGNATURE,
    IN_PLACE_SIGNATURE,
    INTO_SIGNATURE,
    OP,
    RECOMPUTE_SIGNATURE,
    SIGNATURE,
    add_fake,
    check,
    check_residual,
    differentiable_norm_gradients,
    fake,
    fake_backward,
    fake_recompute,
    setup_context,
)
from bitfast.ops.group_norm_act_cuda import check_forward, is_slower_than_triton
from bitfast.ops.native_cuda import DTYPES


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    """Normalize each group of channels of each image, scale and shift each channel, activate.

    Statistics and arithmetic are in float32 (float64 for float64 data) whatever the dtypes given.
    Under autocast the result has the autocast dtype (torch's own ``group_norm`` returns float32 there).

    Args:
        x: Shape (N, C, H, W), floating point, any strides. N may be 0; C, H and W may not.
        weight: Shape (C,), floating point, may differ from x in dtype.
        bias: Shape (C,), floating point, may differ from x in dtype.
        num_groups: Divides C.
        eps: Added to the (biased) variance of each group.
        activation: "none", "relu", "gelu", "gelu_new" (tanh approximation) or "selu".

    Returns:
        Shape (N, C, H, W), the dtype of x; channels_last if x is, else contiguous.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a wrong shape, ``num_groups`` that does not divide C, an unknown activation.
    """
    if may_launch(OP, x):
        launched = eager.launch(x, None, weight, bias, num_groups, eps, activation)
        if launched is not None:
            return launched[1]
    check(OP, x, weight, bias, num_groups, eps, activation)
    backend = select_backend(OP, x.device.type, x.dtype, memory_format_of(x))
    arguments = (x, weight, bias, num_groups, eps, activation)
    with _no_autocast(x):
        if backend == "reference":
            result = reference.group_norm_act_forward(*arguments)[0]
        elif backend == "native" and _is_plain_inference(x):
            result = torch.empty_like(x)
            into = torch.ops.bitfast.group_norm_act_into.native
            call_without_autograd(into, x, None, *arguments[1:], None, result)
        else:
            result = getattr(torch.ops.bitfast.group_norm_act, backend)(*arguments)[0]
    return result.to(autocast_dtype(x) or x.dtype)


def add_group_norm_act(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Return x + residual, and :func:`group_norm_act` of that sum (rounded to its dtype).

    A preactivation network needs both between two blocks. Each tensor is read and written once.

    Args:
        x, residual: Shape (N, C, H, W), floating point, of one dtype; any strides.
        weight, bias, num_groups, eps, activation: As in :func:`group_norm_act`.

    Returns:
        Two tensors like x; channels_last if x is, else contiguous.

    Raises:
        TypeError, ValueError: As :func:`group_norm_act`; ``residual`` has another shape, dtype or device.
    """
    if may_launch(OP, x):
        launched = eager.launch(x, residual, weight, bias, num_groups, eps, activation)
        if launched is not None:
            return launched
    check(ADD_OP, x, weight, bias, num_groups, eps, activation)
    check_residual(x, residual)
    backend = select_backend(OP, x.device.type, x.dtype, memory_format_of(x))
    arguments = (weight, bias, num_groups, eps, activation)
    with _no_autocast(x):
        if backend == "reference":
            total, result, *_ = reference.add_group_norm_act_forward(x, residual, *arguments)
        else:
            operator = getattr(torch.ops.bitfast.add_group_norm_act, backend)
            total, result, *_ = operator(x, residual, *arguments)
    return total, result.to(autocast_dtype(x) or x.dtype)


def _is_plain_inference(x: Tensor) -> bool:
    """Whether x is dense, and neither autograd nor a compiler or tracer has to see the operator.

    Then ``group_norm_act_into``, which returns nothing, can be called: that costs half as much.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _are_dense(x)


def _are_dense(*tensors: Tensor) -> bool:
    """Whether all are contiguous or all channels_last."""
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors) or all(
        x.is_contiguous() for x in tensors
    )


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast: the op computes in float32, and only its result is cast."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


# ---- the operators --------------------------------------------------------------------------------


def define_kernel(
    backend: str, forward: Any, add_forward: Any, backward: Any, recompute: Any
) -> None:
    """Define the operators of a backend, differentiable (forward) and traceable."""
    define_operator(OP, backend, SIGNATURE, forward, fake)
    define_operator(ADD_OP, backend, ADD_SIGNATURE, add_forward, add_fake)
    define_operator(f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, fake_backward)
    define_operator(f"{OP}_recompute", backend, RECOMPUTE_SIGNATURE, recompute, fake_recompute)
    _connect_gradients(backend)


def _complete_native_kernel() -> None:
    """Make the operators that csrc/group_norm_act.cpp defines differentiable and traceable."""
    complete_operator(OP, "native", SIGNATURE, fake)
    complete_operator(f"{OP}_", "native", IN_PLACE_SIGNATURE, lambda *_: None)
    complete_operator(f"{OP}_into", "native", INTO_SIGNATURE, lambda *_: None)
    complete_operator(ADD_OP, "native", ADD_SIGNATURE, add_fake)
    complete_operator(f"{OP}_backward", "native", BACKWARD_SIGNATURE, fake_backward)
    complete_operator(f"{OP}_recompute", "native", RECOMPUTE_SIGNATURE, fake_recompute)
    for in_place in (f"{OP}_", f"{OP}_into"):
        refuse_derivatives(in_place, "native")
    _connect_gradients("native")


def _connect_gradients(backend: str) -> None:
    """Make the forward operators of one backend differentiable by its backward operator."""
    backward_op = getattr(torch.ops.bitfast.group_norm_act_backward, backend)
    for name in ("backward", "recompute"):
        refuse_derivatives(f"{OP}_{name}", backend)

    def gradients(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> Sequence[Tensor | None]:
        if grad is None:
            return grad_total, None, None
        if can_use_backward_kernel(grad, grad_total):
            return call_without_autograd(
                backward_op, grad, grad_total, *ctx.saved_tensors, ctx.num_groups, ctx.activation
            )
        return differentiable_norm_gradients(
            ctx.saved_tensors[:3], ctx.num_groups, ctx.eps, ctx.activation, grad, grad_total
        )

    def run_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, grad, None), None, None, None)

    def run_add_backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        grad_x, *others = gradients(ctx, grad, grad_total)
        return (grad_x, grad_x, *others, None, None, None)

    connect_derivatives(OP, backend, setup_context, run_backward, reference.group_norm_act_forward)
    connect_derivatives(
        ADD_OP, backend, setup_context, run_add_backward, reference.add_group_norm_act_forward
    )


define_kernel(
    "reference",
    reference.group_norm_act_forward,
    reference.add_group_norm_act_forward,
    reference.group_norm_act_backward,
    reference.group_norm_act_recompute,
)


# ---- Triton ---------------------------------------------------------------------------------------

define_kernel("triton", kernels.forward, kernels.add_forward, kernels.backward, kernels.recompute)
show_launches(OP, kernels.forward)
show_launches(ADD_OP, kernels.add_forward)
show_launches(f"{OP}_backward", kernels.backward)
show_launches(f"{OP}_recompute", kernels.recompute)
register_triton_kernels(OP)


# ---- native ---------------------------------------------------------------------------------------

register_kernel(OP, "native", "cpu", NATIVE_CPU_DTYPES, lambda: extension.CPU.problem)
register_kernel(
    OP, "native", "cuda", frozenset(DTYPES), lambda: why_unusable(OP), is_slower_than_triton,
    memory_format=torch.channels_last,
)  # fmt: skip
register_first_use(OP, lambda device: check_forward(device) or check_backward(device))
if extension.CPU.problem is None:
    _complete_native_kernel()
