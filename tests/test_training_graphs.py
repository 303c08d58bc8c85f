"""What a training step does while a CUDA graph is captured; here on the CPU, which is said to capture.

Whether captured steps compute what eager ones do is looked at on a GPU: tests/gpu/test_training_graphs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import host_training
from bitfast.kernels import device_cache
from bitfast.kernels.device_cache import DeviceCache
from tests.tiny_models import ours

WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
"""Operators that read from the device."""


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something is made for keeping during the capture")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_after_a_warm_up_a_captured_step_makes_nothing_and_waits_for_nothing(
    layer_type: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    get = DeviceCache.get

    def noting(self: Any, *arguments: Any) -> Any:
        found.append(get(self, *arguments))
        return found[-1]

    with host_training.on_path("gpu") as device:
        model = ours("BitForImageClassification", layer_type=layer_type, drop_path_rate=0.2)
        model = model.to(device).train()
        if frozen:
            model.bit.encoder.stages[0].requires_grad_(False)
        images = torch.randn(2, 3, 32, 32, device=device)
        labels = torch.tensor([0, 1], device=device)

        def step() -> None:
            model.zero_grad()
            model(images, labels=labels).loss.backward()

        for _ in range(3):
            step()
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_initialized", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            capturing.setattr(DeviceCache, "get", noting)
            capturing.setattr(device_cache, "ThreadPoolExecutor", refuse)
            capturing.setattr("bitfast.execution.weights.make_for_keeping", refuse)
            capturing.setattr("bitfast.kernels.launch.prepare", refuse)
            with torch.autograd.profiler.profile() as profile:
                step()
    assert found
    assert all(each is not None for each in found)
    called = {event.name for event in profile.function_events or ()}
    assert not called & WAITING
    assert "aten::conv2d" in called or "aten::convolution" in called
