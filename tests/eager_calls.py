"""Calls of ops by themselves and under a mode that sees each operator, to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.ops import group_norm_act_eager, weight_standardization_eager
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from tests.interpreter import DEVICE
from tests.operator_calls import OperatorCalls

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPE, GROUPS = (2, 8, 5, 3), 4


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """Demand Triton, and leave no plan of a call to others: for modules that import this."""
    for module in (group_norm_act_eager, weight_standardization_eager):
        module.forget_calls()
    with use_backend("triton"):
        yield
    for module in (group_norm_act_eager, weight_standardization_eager):
        module.forget_calls()


def alone_and_watched(function: Callable[..., Any], *tensors: Tensor) -> tuple[Any, Any, list[str]]:
    """Return what a function gives alone and what it gives under a mode, and our operators that this sees."""
    itself = function(*tensors)
    with OperatorCalls() as calls:
        watched = function(*tensors)
    ours = [n.removeprefix("bitfast.") for n in calls.noted if n.startswith("bitfast.")]
    return itself, watched, ours


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def assert_same(itself: Any, watched: Any) -> None:
    for a, b in zip(flat(itself), flat(watched), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride(), a.shape) == (b.dtype, b.stride(), b.shape)


def inputs(
    layout: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
) -> list[Tensor]:
    """Return x, residual, weight, bias, none of which requires a gradient."""
    maps = [
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    ]
    return [*maps, *(torch.randn(shape[1], device=DEVICE).to(parameter_dtype) for _ in range(2))]


def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_act(x, weight, bias, GROUPS, activation="gelu")


def added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return add_group_norm_act(x, residual, weight, bias, GROUPS, activation="gelu")


FORMS = {"group_norm_act": norm, "add_group_norm_act": added}


def gradients_of(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Return what gives the results and all gradients of a function."""

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        results = flat(function(*leaves))
        grads = [torch.cos(r.detach().float()).to(r) for r in results]
        found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
        return [*results, *(g for g in found if g is not None)]

    return run


def shifted(x: Tensor) -> Tensor:
    """Return the same numbers at an address that is no multiple of 16."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


class Watched(Tensor):
    """A subclass, which may want to see what is done with it."""


def filters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    weights = [
        torch.randn(shape, device=DEVICE).to(dtype)
        for shape in ((4, 3, 3, 3), (8, 4, 1, 1), (4, 16, 3, 3))
    ]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    return weights
