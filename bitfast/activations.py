"""The activations that ``BitConfig.hidden_act`` can name, and "none"."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "selu": F.selu,
}

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, x: grad,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "gelu_new": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "selu": lambda grad, x: torch.ops.aten.elu_backward(
        grad, _SELU_ALPHA, _SELU_SCALE, 1, False, x
    ),
}
"""Functions that return the gradient of the input, given that of the result, and the input."""

MODULES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "selu": nn.SELU,
}


def activation_name(module: nn.Module) -> str | None:
    """Return the name of the activation that a module computes; None if it is none of these."""
    cls = type(module)
    if cls is nn.ReLU:
        return "relu"
    if cls is nn.Identity:
        return "none"
    if cls is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_new"
    return "selu" if cls is nn.SELU else None


__all__ = ["ACTIVATIONS", "ACTIVATION_GRADIENTS", "MODULES", "activation_name"]
