"""Whole models with the CUDA kernels of norm_convolution, and the switch that turns these on, on a card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import BitConfig, BitModel
from bitfast.backends import disable_kernel, enable_kernel, use_backend
from bitfast.graphs import capture
from bitfast.ops.norm_convolution import OP
from bitfast.ops.norm_convolution_cuda import uses_fused_convolution
from tests.gpu.norm_convolution_problems import BFLOAT, DEVICE, GROUPS, needs_hopper
from tests.test_execution_cuda import plans
from tests.threads import in_threads
from tests.tiny_models import ours
from tests.tolerances import assert_within_contract, relative_error
from tests.weight_changes import move_weights

pytestmark = [needs_hopper, pytest.mark.usefixtures("no_gradient")]


@pytest.fixture
def enabled() -> Iterator[None]:
    enable_kernel(OP, "native", "cuda")
    yield
    disable_kernel(OP, "native", "cuda")


def test_the_kernels_serve_on_demand_only() -> None:
    assert not uses_fused_convolution("cuda", BFLOAT)
    with use_backend(norm_convolution="native"):
        assert uses_fused_convolution("cuda", BFLOAT)
    enable_kernel(OP, "native", "cuda")
    try:
        assert uses_fused_convolution("cuda", BFLOAT)
        assert not uses_fused_convolution("cuda", torch.float32)
    finally:
        disable_kernel(OP, "native", "cuda")
    assert not uses_fused_convolution("cuda", BFLOAT)


def r50x1(dtype: torch.dtype = BFLOAT) -> BitModel:
    torch.manual_seed(0)
    model = BitModel(BitConfig()).cuda().eval()
    move_weights(model)
    return model.to(dtype)


def images_for(batch: int, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size, device=DEVICE).to(BFLOAT)


def last_of(model: BitModel, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def fused_calls(model: BitModel) -> list[str]:
    """Return the calls of the newest plan that are fused convolutions."""
    names = [name for part in plans(model)[-1].parts for name in part.program.names]
    return [name for name in names if "norm_convolution" in name]


def exact_output(model: BitModel, images: Tensor) -> Tensor:
    exact = r50x1(torch.float64)
    exact.load_state_dict(model.state_dict())
    with use_backend("reference"):
        return last_of(exact, images.double())


AS_EXACT = 1.1
"""How many times the error of unfused plans a fused one may have: they round more often, not less, and luck is
worth a few hundredths."""


@pytest.mark.parametrize(("batch", "size"), [(8, 224), (2, 225), (1, 97)])
def test_whole_models_are_as_exact_as_unfused(batch: int, size: int) -> None:
    model, images = r50x1(), images_for(batch, size)
    unfused = last_of(model, images)
    assert fused_calls(model) == []
    with use_backend(norm_convolution="native"):
        fused = last_of(model, images)
        assert len(fused_calls(model)) > 45
        assert torch.equal(last_of(model, images), fused)
    exact = exact_output(model, images)
    assert relative_error(fused, exact) <= AS_EXACT * relative_error(unfused, exact)


def test_the_hidden_states_of_a_small_model() -> None:
    options = {
        "embedding_size": 64,
        "hidden_sizes": [256, 512],
        "depths": [2, 2],
        "num_groups": GROUPS,
    }
    model: Any = ours("BitModel", **options).cuda().eval()
    move_weights(model)
    model, images = model.bfloat16(), torch.randn(4, 3, 128, 96, device=DEVICE).bfloat16()
    with use_backend(norm_convolution="native"):
        actual = model(images, output_hidden_states=True).hidden_states
        assert fused_calls(model)
    with use_backend("reference"):
        plain = model(images, output_hidden_states=True).hidden_states
        exact_model: Any = ours("BitModel", **options).cuda().eval().double()
        exact_model.load_state_dict(model.state_dict())
        exact = exact_model(images.double(), output_hidden_states=True).hidden_states
    for states in zip(actual, plain, exact, strict=True):
        assert_within_contract(*states)


def test_the_table_chooses_once_it_is_enabled(enabled: None) -> None:
    model, images = r50x1(), images_for(32)
    chosen = last_of(model, images)
    calls = len(fused_calls(model))
    with use_backend(norm_convolution="native"):
        last_of(model, images)
        assert 0 < calls < len(fused_calls(model))
    with use_backend(norm_convolution="reference"):
        unfused = last_of(model, images)
        assert fused_calls(model) == []
    exact = exact_output(model, images)
    assert relative_error(chosen, exact) <= AS_EXACT * relative_error(unfused, exact)


@pytest.mark.parametrize("batch", [1, 8])
def test_whole_models_in_a_graph(batch: int) -> None:
    model, images = r50x1(), images_for(batch)
    with use_backend(norm_convolution="native"):
        expected = last_of(model, images)
        capture(model, images)
        for _ in range(3):
            assert torch.equal(last_of(model, images), expected)


def test_whole_models_in_threads() -> None:
    model, images = r50x1(), [images_for(4), images_for(4)]

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream), use_backend(norm_convolution="native"):
            for _ in range(5):
                found = last_of(model, images[number])
                stream.synchronize()
                assert torch.equal(found, expected[number])

    with use_backend(norm_convolution="native"):
        expected = [last_of(model, each) for each in images]
    torch.cuda.synchronize()
    in_threads(work, 2)


def test_a_change_of_the_weights_is_seen() -> None:
    model, images = r50x1(), images_for(2, 64)
    with use_backend(norm_convolution="native"):
        before = last_of(model, images)
        block: Any = model.encoder.stages[0].layers[1]
        block.conv2.weight.mul_(torch.rand_like(block.conv2.weight) + 0.5)
        block.norm2.bias.add_(0.5)
        after = last_of(model, images)
        assert not torch.equal(after, before)
        fresh = r50x1()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(last_of(fresh, images), after)
