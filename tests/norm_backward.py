"""The backward of group_norm_act: what to compare it with."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfast import reference
from tests.feature_maps import away_from_kinks
from tests.plain_ops import plain_norm

Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, int, str]
"""Those of the operator."""


def drawn_arguments(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    activation: str = "relu",
    *,
    mean: float = 0.0,
    has_total: bool = False,
    weight_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    device: str = "cpu",
) -> Arguments:
    """Return random arguments of ``group_norm_act_backward``, with the statistics of x."""
    x, grad, grad_total = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=layout) for _ in range(3)
    )
    x += mean
    weight = (torch.rand(shape[1], device=device) + 0.5).to(weight_dtype)
    bias = torch.randn(shape[1], device=device).to(bias_dtype)
    grad = away_from_kinks(grad, x, weight, bias, groups, activation)
    _, *statistics = reference.group_norm_act_forward(x, weight, bias, groups, 1e-5, activation)
    return grad, grad_total if has_total else None, x, weight, bias, *statistics, groups, activation


def recomputed_result(backend: str, arguments: Arguments) -> Tensor:
    """Return the result that a backend's ``group_norm_act_recompute`` gives.

    Its gradients must have the bits of those that the backend's backward gives.
    """
    x = arguments[2]
    *gradients, result = getattr(torch.ops.bitfast.group_norm_act_recompute, backend)(*arguments)
    expected = getattr(torch.ops.bitfast.group_norm_act_backward, backend)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert (result.shape, result.dtype) == (x.shape, x.dtype)
    assert result.stride() == gradients[0].stride()
    return result


def plain_gradients(arguments: Arguments, dtype: torch.dtype) -> list[Tensor]:
    """Return the gradients of x, weight and bias that PyTorch computes in a dtype."""
    grad, grad_total, x, weight, bias, _, _, groups, activation = arguments
    leaves = [t.to(dtype).contiguous().requires_grad_() for t in (x, weight, bias)]
    grad_x, *others = torch.autograd.grad(
        plain_norm(*leaves, groups, activation), leaves, grad.to(dtype)
    )
    if grad_total is not None:
        grad_x = grad_x + grad_total.to(dtype)
    return [grad_x, *others]


def plain_result(arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Return the result of the forward pass that PyTorch computes in a dtype."""
    _, _, x, weight, bias, _, _, groups, activation = arguments
    return plain_norm(*(t.to(dtype).contiguous() for t in (x, weight, bias)), groups, activation)
