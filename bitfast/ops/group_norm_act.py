"""GroupNorm followed by an activation, as one op.

Wu & He, "Group Normalization", 2018 (https://arxiv.org/abs/1803.08494).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.backends import select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import (
    LIBRARY,
    autocast_dtype,
    check_floating,
    check_nchw,
    define_operator,
)

OP = "group_norm_act"

SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, str activation)"
    " -> (Tensor, Tensor, Tensor)"
)
"""What every kernel takes and returns: the result, and the mean and 1/std of each (image, group), in
float32 (float64 for float64 data)."""

BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
    " int num_groups, str activation) -> (Tensor, Tensor, Tensor)"
)
"""What every backward kernel takes and returns: the gradients of x, weight and bias."""


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
    _check(x, weight, bias, num_groups, eps, activation)
    target = autocast_dtype(x)
    backend = select_backend(OP, x.device.type, x.dtype)
    if target is None:
        return _run(backend, x, weight, bias, num_groups, eps, activation)
    with torch.autocast(x.device.type, enabled=False):
        return _run(backend, x, weight, bias, num_groups, eps, activation).to(target)


def _run(backend: str, *arguments: Any) -> Tensor:
    if backend == "reference":
        return reference.group_norm_act_forward(*arguments)[0]
    return getattr(torch.ops.bitfast.group_norm_act, backend)(*arguments)[0]


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> None:
    check_nchw(OP, "x", x)
    channels = x.shape[1]
    if channels == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{OP}: x must have C, H and W of at least 1, got shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_floating(OP, name, parameter)
        if parameter.dim() != 1 or parameter.shape[0] != channels:
            raise ValueError(
                f"{OP}: {name} must have shape ({channels},) to match x, got {tuple(parameter.shape)}"
            )
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(
            f"{OP}: num_groups must divide the {channels} channels of x, got {num_groups}"
        )
    if eps < 0:
        raise ValueError(f"{OP}: eps must be at least 0, got {eps}")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"{OP}: activation must be one of {allowed}, got {activation!r}")


# ---- the contract of the kernels ----------------------------------------------------------------


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=reference.compute_dtype(x.dtype))
    result = torch.empty_like(x, memory_format=memory_format_of(x))
    return result, statistics, torch.empty_like(statistics)


def _fake_backward(
    grad: Tensor,
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
    x, weight, bias, ctx.num_groups, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def define_kernel(backend: str, forward: Any, backward: Any) -> None:
    """Define ``bitfast::group_norm_act.<backend>`` and its backward, differentiable and traceable."""
    define_operator(OP, backend, SIGNATURE, forward, _fake)
    backward_op = define_operator(
        f"{OP}_backward", backend, BACKWARD_SIGNATURE, backward, _fake_backward
    )

    def run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = backward_op(grad, *ctx.saved_tensors, ctx.num_groups, ctx.activation)
        return (*gradients, None, None, None)

    torch.library.register_autograd(
        f"bitfast::{OP}.{backend}",
        run_backward,
        setup_context=_setup_context,
        lib=LIBRARY,
    )


define_kernel("reference", reference.group_norm_act_forward, reference.group_norm_act_backward)
