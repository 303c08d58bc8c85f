"""group_norm_act in Triton: the operators' implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfast.memory_format import memory_format_of
from bitfast.ops.common import launch_kernels


def add_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernels; without a residual, the sum is x itself."""
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
    launch_kernels(launches, x)
    return total, result, mean, rstd


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernels, without a residual."""
    _, result, mean, rstd = add_forward(x, None, *arguments)
    return result, mean, rstd


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels."""
    return _gradients(*arguments, recomputes=False)[:3]


def recompute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels, which store the result of the forward pass again."""
    return _gradients(*arguments, recomputes=True)


def _gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
    *,
    recomputes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bitfast.kernels import group_norm_act as kernels

    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    if grad_total is not None:
        grad_total = grad_total.contiguous(memory_format=memory_format)
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    result = torch.empty_like(x) if recomputes else None
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
        result=result,
    )
    launch_kernels(launches, x)
    return *grads, x if result is None else result


__all__ = ["add_forward", "backward", "forward", "recompute"]
