"""What every backend of group_norm_act takes, returns and refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import check_floating, check_nchw
from bitfast.ops.derivatives import differentiable_gradients

OP = "group_norm_act"
ADD_OP = "add_group_norm_act"

SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, str activation)"
    " -> (Tensor, Tensor, Tensor)"
)
"""Of every backend's ``group_norm_act``. Returns the result, and the mean and 1/std of each (image, group), in
float32 (float64 for float64 data)."""

IN_PLACE_SIGNATURE = (
    "(Tensor(a!) x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, float eps,"
    " str activation, Tensor? shortcut) -> ()"
)
"""Of ``group_norm_act_``, for inference: the result overwrites x. Only the native backend has it.
csrc/group_norm_act.cpp describes ``moments`` and ``shortcut``."""

INTO_SIGNATURE = (
    "(Tensor x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, float eps, str activation,"
    " Tensor? shortcut, Tensor(a!) result) -> ()"
)
"""Of ``group_norm_act_into``, for inference: fills ``result``. Only the native backend has it."""

ADD_SIGNATURE = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, int num_groups, float eps,"
    " str activation) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""Of every backend's ``add_group_norm_act``. Returns x + residual, the result, and the sum's statistics."""

BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
    " int num_groups, str activation) -> (Tensor, Tensor, Tensor)"
)
"""Of every backend's ``group_norm_act_backward``. Returns the gradients of x, weight and bias. With a residual,
x is the sum, and ``grad_total`` the gradient that reached the sum directly, which is added."""

RECOMPUTE_SIGNATURE = BACKWARD_SIGNATURE.replace(
    "-> (Tensor, Tensor, Tensor)", "-> (Tensor, Tensor, Tensor, Tensor)"
)
"""Of every backend's ``group_norm_act_recompute``, for a forward pass that did not keep its result. Returns
what the backward returns, and the result again: what the forward returned for x."""


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``op`` can take these."""
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


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise TypeError or ValueError unless ``residual`` can be added to x."""
    check_nchw(ADD_OP, "residual", residual)
    for name in ("shape", "dtype", "device"):
        ours, theirs = getattr(residual, name), getattr(x, name)
        if ours != theirs:
            raise ValueError(f"{ADD_OP}: residual must have the {name} of x, {theirs}; got {ours}")


def fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``group_norm_act`` returns."""
    statistics = x.new_empty((x.shape[0], num_groups), dtype=reference.compute_dtype(x.dtype))
    result = torch.empty_like(x, memory_format=memory_format_of(x))
    return result, statistics, torch.empty_like(statistics)


def add_fake(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``add_group_norm_act`` returns."""
    result, mean, rstd = fake(x, *arguments)
    return torch.empty_like(result), result, mean, rstd


def fake_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``group_norm_act_backward`` returns."""
    grad_x = torch.empty_like(x, memory_format=memory_format_of(x))
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def fake_recompute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors without contents, like those that ``group_norm_act_recompute`` returns."""
    grad_x, grad_weight, grad_bias = fake_backward(*arguments)
    return grad_x, grad_weight, grad_bias, torch.empty_like(grad_x)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward pass needs."""
    *_, weight, bias, ctx.num_groups, ctx.eps, ctx.activation = inputs
    *_, mean, rstd = output
    normalized = inputs[0] if len(inputs) == 6 else output[0]  # x, or its sum with the residual
    ctx.save_for_backward(normalized, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def differentiable_norm_gradients(
    inputs: Sequence[Tensor],
    num_groups: int,
    eps: float,
    activation: str,
    grad: Tensor,
    grad_total: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of x (or its sum with the residual), weight and bias, differentiable again.

    Args:
        inputs: x (or the sum), weight and bias.
        num_groups, eps, activation: As in the op.
        grad: The gradient of the result.
        grad_total: The gradient that reached x (or the sum) directly; None if there is none.
    """

    def composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.group_norm_act_forward(x, weight, bias, num_groups, eps, activation)[0]

    grad_x, *others = differentiable_gradients(composite, inputs, grad)
    if grad_x is not None and grad_total is not None:
        grad_x = grad_x + grad_total
    return [grad_x, *others]
