"""Small models whose convolutions are fused with norms, and what their plans consist of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.execution.plan import Plan
from tests.norm_convolution_kernels import Kernels, serve
from tests.test_execution_cuda import plans
from tests.tiny_models import ours
from tests.tolerances import relative_error

SMALL = {"depths": [2, 1], "hidden_sizes": [32, 64], "embedding_size": 32}

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": SMALL,
    "bottleneck": {**SMALL, "layer_type": "bottleneck"},
    "same": {**SMALL, "global_padding": "same", "embedding_dynamic_padding": True},
    "bottleneck same": {**SMALL, "global_padding": "same", "layer_type": "bottleneck"},
    "one group": {**SMALL, "num_groups": 1},
    "32 groups": {"depths": [1], "hidden_sizes": [256], "embedding_size": 64, "num_groups": 32},
    "groups of 3": {"depths": [2], "hidden_sizes": [96], "embedding_size": 24, "num_groups": 8},
    "odd channels": {"depths": [2, 1], "hidden_sizes": [20, 32], "embedding_size": 12},
    "drop path": {**SMALL, "drop_path_rate": 0.5},
    "dilated": {**SMALL, "depths": [1, 2], "layer_type": "bottleneck", "output_stride": 4},
    "valid": {**SMALL, "depths": [1], "hidden_sizes": [32], "global_padding": "valid"},
    "gelu": {**SMALL, "hidden_act": "gelu"},
}


@contextmanager
def everything_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Within the block, in inference, every convolution is to be fused that the kernels suit."""
    kernels = serve(monkeypatch)
    with torch.no_grad(), use_backend(norm_convolution="native"):
        yield kernels


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16, name: str = "BitModel") -> Any:
    model = ours(name, **SETTINGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model.to(dtype)


def images(kind: str = "", count: int = 2) -> Tensor:
    size = (15, 15) if kind == "valid" else (16, 18)
    return torch.randn(count, 3, *size).bfloat16()


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    output = model(x, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def names_of(plan: Plan) -> list[str]:
    (part,) = plan.parts
    return list(part.program.names)


def last_plan(model: Any) -> Plan:
    return plans(model)[-1]


def compare(model: Any, x: Tensor, fused: list[Tensor]) -> None:
    """Hold what a fused plan has computed to the plan without, by their errors."""
    with use_backend(norm_convolution="reference"):
        unfused = outputs(model, x)
    with use_backend("reference"):
        oracle = outputs(copy.deepcopy(model).double(), x.double())
    for a, b, c in zip(fused, unfused, oracle, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 2**-8
