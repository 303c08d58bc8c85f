"""Pairs of models for the tests of training, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitfast.ops import residual_block
from tests.model_pairs import assert_close, pair

TINY: dict[str, Any] = {"hidden_sizes": [8, 16, 16], "depths": [1, 2, 1]}
KINDS: dict[str, dict[str, Any]] = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "preactivation, same": {"global_padding": "same", "hidden_act": "gelu"},
    "bottleneck, same": {
        "layer_type": "bottleneck",
        "global_padding": "same",
        "embedding_dynamic_padding": True,
    },
    "preactivation, drop path": {"drop_path_rate": 0.5},
    "bottleneck, drop path": {"layer_type": "bottleneck", "drop_path_rate": 0.5},
}
"""Models of which every block is one node."""
OTHERS: dict[str, dict[str, Any]] = {
    "valid": {"global_padding": "valid"},
    "valid bottleneck": {"global_padding": "valid", "layer_type": "bottleneck"},
    "dilated": {"output_stride": 8, "layer_type": "bottleneck"},
    "undilated": {"output_stride": 16},
    "gelu_new": {"hidden_act": "gelu_new", "layer_type": "bottleneck"},
    "a stage of no blocks": {"depths": [1, 0, 2], "hidden_sizes": [16, 16, 32]},
    "equal widths": {"hidden_sizes": [8, 8, 8]},
}
BLOCKS = sum(TINY["depths"])
SIZE = 20
SOME = ["preactivation", "bottleneck", "preactivation, drop path"]
PATHS = [
    "bit.encoder.stages.1.layers.0",
    "bit.encoder.stages.1.layers.1.norm2",
    "bit.encoder.stages.0.layers.0.conv2",
    "bit.encoder.stages.2",
]
"""Modules that are hooked."""


def models(
    kind: str = "preactivation",
    name: str = "BitForImageClassification",
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[Any, Any]:
    """Return our model and theirs, in training mode."""
    ours, theirs = pair(name, **{**TINY, **{**KINDS, **OTHERS}[kind], **settings})
    return ours.to(dtype), theirs.to(dtype)


def images(
    batch: int = 3, height: int = SIZE, width: int = SIZE, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype)


def objective(x: Tensor, seed: int = 3) -> Callable[[nn.Module], Tensor]:
    """Return a function of a model that is one number; the same branches are dropped each time."""

    def of_model(model: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        output = model(x)
        features = output[-1] if not hasattr(output, "feature_maps") else output.feature_maps[-1]
        ramp = torch.linspace(0.5, 1.5, features.numel(), dtype=torch.float64)
        return (ramp.view(features.shape) * features.double().square()).sum()

    return of_model


def gradients(model: nn.Module, of_model: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return the gradient for each parameter that has one."""
    model.zero_grad()
    of_model(model).backward()
    return gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Hold gradients of float64 models to each other, a small one to the size of the others."""
    assert list(actual) == list(expected), what
    largest = max(each.norm() for each in expected.values())
    for name, wanted in expected.items():
        difference = (actual[name] - wanted).norm()
        assert difference <= 1e-10 * max(wanted.norm(), 1e-2 * largest), f"{what} {name}"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Hold results to the bit."""
    assert list(actual) == list(expected), what
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), f"{what} {name}"


class Passes:
    """How many blocks were computed as nodes."""

    forward = backward = 0


@contextmanager
def counted_nodes() -> Iterator[Passes]:
    """Count the forward and the backward passes of nodes inside the block."""
    passes = Passes()
    node = residual_block._ResidualBlock
    forward, backward = node.forward, node.backward

    def count_forward(*arguments: Any) -> Any:
        passes.forward += 1
        return forward(*arguments)

    def count_backward(*arguments: Any) -> Any:
        passes.backward += 1
        return backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "forward", staticmethod(count_forward))
        patch.setattr(node, "backward", staticmethod(count_backward))
        yield passes


class Watch(TorchDispatchMode):
    """Sees each operator, and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


__all__ = [
    "BLOCKS",
    "KINDS",
    "OTHERS",
    "Passes",
    "Watch",
    "assert_alike",
    "assert_close",
    "assert_same",
    "counted_nodes",
    "gradients",
    "gradients_of",
    "images",
    "models",
    "objective",
]
