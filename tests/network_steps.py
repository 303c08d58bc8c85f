"""Networks of all kinds, and what is read of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitfast.execution.steps import (
    CallModule,
    Steps,
    steps_of,
)
from tests.tiny_models import ours

DEPTHS = {"depths": [2, 1], "hidden_sizes": [16, 32]}
SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "same": {"global_padding": "same"},
    "dynamic pool": {"global_padding": "same", "embedding_dynamic_padding": True},
    "valid": {"global_padding": "valid"},
    "valid bottleneck": {"global_padding": "valid", "layer_type": "bottleneck"},
    "drop path": {"drop_path_rate": 0.3},
    "gelu": {"hidden_act": "gelu", "layer_type": "bottleneck"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "selu": {"hidden_act": "selu"},
    "dilated": {"output_stride": 8, "layer_type": "bottleneck"},
    "wide": {"width_factor": 2},
    "a stage of no blocks": {"depths": [1, 0], "hidden_sizes": [16, 16]},
}


def model_of(kind: str = "preactivation", **settings: Any) -> Any:
    return ours("BitModel", **{**DEPTHS, **SETTINGS[kind], **settings}).eval()


def read(model: Any) -> Steps | None:
    return steps_of(model.embedder, list(model.encoder.stages), model.norm, [model.encoder])


def steps(model: Any) -> Steps:
    result = read(model)
    assert result is not None
    return result


def calls(model: Any) -> list[nn.Module]:
    """The modules that are called."""
    return [step.module for step in steps(model).all() if isinstance(step, CallModule)]


def blocks(model: Any) -> list[Any]:
    return [block for stage in model.encoder.stages for block in stage.layers]


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)
