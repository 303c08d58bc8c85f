"""What the plans of a network consist of, and whether these compute what its modules do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.execution.plan import Plan
from bitfast.execution.program import Program
from bitfast.ops.packed_convolution import uses_packed_weights, why_not_packed
from tests.tiny_models import ours
from tests.weight_changes import features

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "same": {"global_padding": "same", "embedding_dynamic_padding": True},
    "drop path": {"drop_path_rate": 0.5},
    "gelu": {"hidden_act": "gelu"},
    "bottleneck gelu": {"layer_type": "bottleneck", "hidden_act": "gelu"},
}


NEEDS_PLANS = pytest.mark.skipif(
    not uses_packed_weights("cpu", torch.float32),
    reason=f"no plans here: {why_not_packed(torch.float32)}",
)


@pytest.fixture(name="x")
def some_images() -> Tensor:
    """Two, of odd sizes."""
    return torch.randn(2, 3, 33, 47)


def model_of(kind: str = "preactivation") -> Any:
    """A network of two stages, of two blocks and one."""
    settings = {"depths": [2, 1], "hidden_sizes": [16, 32], **SETTINGS[kind]}
    model = ours("BitModel", **settings).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model


def as_written(model: Any, x: Tensor) -> Tensor:
    """What the modules compute, called one by one without a plan."""
    with use_backend("reference"):
        return model.norm(model.encoder(model.embedder(x))[0])


def assert_right(model: Any, x: Tensor, before: Tensor | None = None) -> Tensor:
    """Hold the next pass, and the one after it, to a fresh copy and to the modules; return its result.

    Args:
        before: An earlier result, which must no longer come out.
    """
    results = []
    for run in (features, features, lambda m, x: features(copy.deepcopy(m), x)):
        torch.manual_seed(3)
        results.append(run(model, x))
    torch.manual_seed(3)
    expected = as_written(copy.deepcopy(model), x)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    if before is not None:
        is_same_shape = results[0].shape == before.shape
        assert not is_same_shape or not torch.allclose(results[0], before, rtol=1e-2, atol=1e-2)
    return results[0]


def plans_of(network: Any) -> list[Plan]:
    """The plans that were made since the network was read last, oldest first."""
    return network.plans.made()


def programs_of(plan: Plan) -> list[Program]:
    """Those for one slice of the images, where they go through in slices."""
    programs: list[Program] = []
    for part in plan.parts:
        adapted = getattr(part, "_programs", {}).values()
        programs += [each.program for each in (part, *adapted) if hasattr(each, "program")]
    return programs


def names_of(plan: Plan) -> list[str]:
    """What the plan's programs call."""
    return [name for program in programs_of(plan) for name in program.names]


def called_by(plan: Plan) -> list[nn.Module]:
    """The modules that are called as they are."""
    return [part.module for part in plan.parts if hasattr(part, "module")]
