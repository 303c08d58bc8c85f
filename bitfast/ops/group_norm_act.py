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
from bitfast.activations import ACTIVATIONS
from bitfast.backends import register_kernel, select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import (
    NATIVE_CPU_DTYPES,
    announce_triton_kernels,
    autocast_dtype,
    check_floating,
    check_nchw,
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

OP = "group_norm_act"
ADD_OP = "add_group_norm_act"

SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, str activation)"
    " -> (Tensor, Tensor, Tensor)"
)
"""What every kernel takes and returns: the result, and the mean and 1/std of each (image, group), in
float32 (float64 for float64 data)."""

IN_PLACE_SIGNATURE = (
    "(Tensor(a!) x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, float eps,"
    " str activation, Tensor? shortcut) -> ()"
)
"""The same in the memory of x, for inference. Only the native backend has it. See :func:`group_norm_act_into`
for the moments and the shortcut."""

INTO_SIGNATURE = (
    "(Tensor x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, float eps, str activation,"
    " Tensor? shortcut, Tensor(a!) result) -> ()"
)
"""The same into memory that is there already."""

ADD_SIGNATURE = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, int num_groups, float eps,"
    " str activation) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""The same with a residual: x + residual, the result, and the statistics of the sum."""

BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
    " int num_groups, str activation) -> (Tensor, Tensor, Tensor)"
)
"""What every backward kernel takes and returns: the gradients of x, weight and bias. For the form with a
residual, x is the sum, and ``grad_total`` what reached the sum by another way, to be added."""


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
        bias: Shape (C,), likewise.
        num_groups: Divides C.
        eps: Added to the (biased) variance of each group.
        activation: "none", "relu", "gelu", "gelu_new" (tanh approximation) or "selu".

    Returns:
        Shape (N, C, H, W), the dtype of x; channels_last if x is, else contiguous.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a wrong shape, ``num_groups`` that does not divide C, an unknown activation.
    """
    _check(OP, x, weight, bias, num_groups, eps, activation)
    backend = select_backend(OP, x.device.type, x.dtype)
    arguments = (x, weight, bias, num_groups, eps, activation)
    with _no_autocast(x):
        if backend == "reference":
            result = reference.group_norm_act_forward(*arguments)[0]
        elif backend == "native" and _is_plain_inference(x):
            result = torch.empty_like(x)
            into = torch.ops.bitfast.group_norm_act_into.native
            run_underived(into, x, None, *arguments[1:], None, result)
        else:
            result = getattr(torch.ops.bitfast.group_norm_act, backend)(*arguments)[0]
    return result.to(autocast_dtype(x) or x.dtype)


def group_norm_act_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
    memory: Tensor | None,
    moments: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """Do what :func:`group_norm_act` does, in memory that may be overwritten, where the backend can.

    It can on the CPU where no gradient is recorded and ``memory`` is like the result.

    Args:
        memory: May be x itself. None: new memory.
        moments: The moments of x, where ``norm_convolution`` has made it. Backends that cannot use them
            compute them again.
        shortcut: Added after the norm, before the activation; like x.

    Returns:
        ``memory``, or another tensor; then ``memory`` is left as it is.
    """
    target = x if memory is None else memory
    overwrites = (
        not torch.is_grad_enabled()
        and target.dtype == x.dtype == (autocast_dtype(x) or x.dtype)
        and (target is x or (target.shape == x.shape and not torch.compiler.is_compiling()))
        and select_backend(OP, x.device.type, x.dtype) == "native"
        and _are_dense(x, target, *(() if shortcut is None else (shortcut,)))
    )
    if shortcut is not None and not (overwrites and shortcut.dtype == x.dtype):
        normalized = group_norm_act(x, weight, bias, num_groups, eps, "none")
        return ACTIVATIONS[activation](normalized + shortcut)
    if not overwrites or (memory is None and moments is None and shortcut is None):
        return group_norm_act(x, weight, bias, num_groups, eps, activation)
    _check(OP, x, weight, bias, num_groups, eps, activation)
    operators = torch.ops.bitfast
    arguments = (x, moments, weight, bias, num_groups, eps, activation, shortcut)
    if memory is x:
        run_underived(operators.group_norm_act_.native, *arguments)
        return x
    result = torch.empty_like(x) if memory is None else memory
    run_underived(operators.group_norm_act_into.native, *arguments, result)
    return result


def add_group_norm_act(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Return x + residual, and :func:`group_norm_act` of that sum (as it was rounded to its dtype).

    What a preactivation network needs between two blocks, reading and writing each tensor once.

    Args:
        x, residual: Shape (N, C, H, W), floating point, of one dtype; any strides.
        weight, bias, num_groups, eps, activation: As in :func:`group_norm_act`.

    Returns:
        Two tensors like x; channels_last if x is, else contiguous.

    Raises:
        TypeError, ValueError: As :func:`group_norm_act`; ``residual`` has another shape, dtype or device.
    """
    _check(ADD_OP, x, weight, bias, num_groups, eps, activation)
    check_nchw(ADD_OP, "residual", residual)
    for name in ("shape", "dtype", "device"):
        ours, theirs = getattr(residual, name), getattr(x, name)
        if ours != theirs:
            raise ValueError(f"{ADD_OP}: residual must have the {name} of x, {theirs}; got {ours}")
    backend = select_backend(OP, x.device.type, x.dtype)
    arguments = (weight, bias, num_groups, eps, activation)
    with _no_autocast(x):
        if backend == "reference":
            total, result, *_ = reference.add_group_norm_act_forward(x, residual, *arguments)
        else:
            operator = getattr(torch.ops.bitfast.add_group_norm_act, backend)
            total, result, *_ = operator(x, residual, *arguments)
    return total, result.to(autocast_dtype(x) or x.dtype)


def _is_plain_inference(x: Tensor) -> bool:
    """Say whether x is dense and no gradient, compiler or tracer has to see the operator.

    Then the form that returns nothing serves, which costs half as much to call.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _are_dense(x)


def _are_dense(*tensors: Tensor) -> bool:
    """Say whether all are contiguous or all channels_last."""
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors) or all(
        x.is_contiguous() for x in tensors
    )


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from the steps in between: they compute in float32, only the result is rounded."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> None:
    check_nchw(op, "x", x)
    channels = x.shape[1]
    if channels == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_floating(op, name, parameter)
        if parameter.dim() != 1 or parameter.shape[0] != channels:
            raise ValueError(
                f"{op}: {name} must have shape ({channels},) to match x, got {tuple(parameter.shape)}"
            )
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(
            f"{op}: num_groups must divide the {channels} channels of x, got {num_groups}"
        )
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {allowed}, got {activation!r}")


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=reference.compute_dtype(x.dtype))
    result = torch.empty_like(x, memory_format=memory_format_of(x))
    return result, statistics, torch.empty_like(statistics)


def _add_fake(
    x: Tensor, residual: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result, mean, rstd = _fake(x, *arguments)
    return torch.empty_like(result), result, mean, rstd


def _fake_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=memory_format_of(x))
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, bias, ctx.num_groups, ctx.eps, ctx.activation = inputs
    *_, mean, rstd = output
    normalized = inputs[0] if len(inputs) == 6 else output[0]  # x, or its sum with the residual
    ctx.save_for_backward(normalized, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def define_kernel(backend: str, forward: Any, add_forward: Any, backward: Any) -> None:
    """Define both operators of a backend and their backward, differentiable and traceable."""
    define_operator(OP, backend, SIGNATURE, forward, _fake)
    define_operator(ADD_OP, backend, ADD_SIGNATURE, add_forward, _add_fake)
    define_operator(f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, _fake_backward)
    _connect_gradients(backend)


def _complete_native_kernel() -> None:
    """Do the same for the operators that csrc/group_norm_act.cpp has defined."""
    complete_operator(OP, "native", SIGNATURE, _fake)
    complete_operator(f"{OP}_", "native", IN_PLACE_SIGNATURE, lambda *_: None)
    complete_operator(f"{OP}_into", "native", INTO_SIGNATURE, lambda *_: None)
    complete_operator(ADD_OP, "native", ADD_SIGNATURE, _add_fake)
    complete_operator(f"{OP}_backward", "native", BACKWARD_SIGNATURE, _fake_backward)
    for in_place in (f"{OP}_", f"{OP}_into"):
        refuse_derivatives(in_place, "native")
    _connect_gradients("native")


def _connect_gradients(backend: str) -> None:
    """Tell autograd how the operators of one backend belong together."""
    backward_op = getattr(torch.ops.bitfast.group_norm_act_backward, backend)
    refuse_derivatives(f"{OP}_backward", backend)

    def gradients(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> Sequence[Tensor | None]:
        if grad is None:
            return grad_total, None, None
        if wants_numbers_only(grad, grad_total):
            return run_underived(
                backward_op, grad, grad_total, *ctx.saved_tensors, ctx.num_groups, ctx.activation
            )
        return _differentiable_gradients(ctx, grad, grad_total)

    def run_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, grad, None), None, None, None)

    def run_add_backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        grad_x, *others = gradients(ctx, grad, grad_total)
        return (grad_x, grad_x, *others, None, None, None)

    connect_derivatives(OP, backend, _setup_context, run_backward, reference.group_norm_act_forward)
    connect_derivatives(
        ADD_OP, backend, _setup_context, run_add_backward, reference.add_group_norm_act_forward
    )


def _differentiable_gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None
) -> list[Tensor | None]:
    """Return the gradients of x (or its sum with the residual), weight and bias, differentiable again."""

    def composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.group_norm_act_forward(
            x, weight, bias, ctx.num_groups, ctx.eps, ctx.activation
        )[0]

    grad_x, *others = differentiable_gradients(composite, ctx.saved_tensors[:3], grad)
    if grad_x is not None and grad_total is not None:
        grad_x = grad_x + grad_total
    return [grad_x, *others]


define_kernel(
    "reference",
    reference.group_norm_act_forward,
    reference.add_group_norm_act_forward,
    reference.group_norm_act_backward,
)


# ---- Triton ---------------------------------------------------------------------------------------


def _triton_add_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bitfast.kernels import group_norm_act as kernels

    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    total = x
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
        total = torch.empty_like(x)
    result = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    launches = kernels.forward_launches(
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        eps,
        activation,
        memory_format == torch.channels_last,
        total=total,
        result=result,
        mean=mean,
        rstd=rstd,
    )
    run_launches(launches, x)
    return total, result, mean, rstd


def _triton_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, result, mean, rstd = _triton_add_forward(x, None, *arguments)
    return result, mean, rstd


def _triton_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from bitfast.kernels import group_norm_act as kernels

    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    if grad_total is not None:
        grad_total = grad_total.contiguous(memory_format=memory_format)
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    launches = kernels.backward_launches(
        grad.contiguous(memory_format=memory_format),
        grad_total,
        x,
        weight.contiguous(),
        bias.contiguous(),
        mean,
        rstd,
        activation,
        memory_format == torch.channels_last,
        grad_x=grads[0],
        grad_weight=grads[1],
        grad_bias=grads[2],
    )
    run_launches(launches, x)
    return grads


define_kernel("triton", _triton_forward, _triton_add_forward, _triton_backward)
show_launches(OP, _triton_forward)
show_launches(ADD_OP, _triton_add_forward)
show_launches(f"{OP}_backward", _triton_backward)
announce_triton_kernels(OP)


# ---- native ---------------------------------------------------------------------------------------

register_kernel(OP, "native", "cpu", NATIVE_CPU_DTYPES, lambda: extension.CPU.problem)
if extension.CPU.problem is None:
    _complete_native_kernel()
