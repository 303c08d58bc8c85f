"""The lowering to Triton kernels, run in the interpreter: the bits of the same ops one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.execution import cuda, op_by_op
from bitfast.execution.plan import Plan
from bitfast.execution.weights import standardized_weights
from bitfast.ops import group_norm_act_cuda, native_cuda
from tests.emulated import emulate
from tests.group_norm_act_calls import kernels
from tests.interpreter import DEVICE
from tests.model_pairs import flatten
from tests.tiny_models import ours
from tests.weight_changes import (
    edit_in_place,
    features,
    step_a_fused_optimizer,
    swap_the_data,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {"depths": [2, 1], "hidden_sizes": [16, 32]},
    "bottleneck": {"depths": [2, 1], "hidden_sizes": [16, 32], "layer_type": "bottleneck"},
    "same": {"depths": [1, 1], "global_padding": "same", "embedding_dynamic_padding": True},
    "gelu": {"depths": [2], "hidden_sizes": [16], "hidden_act": "gelu"},
    "bottleneck selu": {"depths": [1], "hidden_act": "gelu_new", "layer_type": "bottleneck"},
    "valid": {"depths": [1], "hidden_sizes": [16], "global_padding": "valid"},
}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with torch.no_grad(), use_backend(group_norm_act="triton", weight_standardization="triton"):
        yield


def model_of(kind: str, dtype: torch.dtype = torch.float32, name: str = "BitModel") -> Any:
    model = ours(name, **SETTINGS[kind]).eval().to(DEVICE, dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model


def images(dtype: torch.dtype = torch.float32, *size: int) -> Tensor:
    return torch.randn(*(size or (2, 3, 16, 18)), device=DEVICE).to(dtype)


def plans(model: Any) -> list[Plan]:
    network = getattr(model, "bit", model)
    return network.plans.made()


def one_after_the_other(model: Any, x: Tensor) -> list[Tensor]:
    """The hidden states and the result, by the same ops without a plan; channels_last."""
    steps = model.plans.steps(model)
    x = x.contiguous(memory_format=torch.channels_last)
    standardize = partial(standardized_weights, channels_last=True)
    outputs, result = op_by_op.compute(steps, x, standardize, range(len(steps.outputs)))
    return [*outputs, result]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_bits_are_those_of_single_ops(kind, dtype):
    model = model_of(kind, dtype)
    x = images(dtype, *((2, 3, 15, 15) if kind == "valid" else ()))
    before = x.clone()
    for _ in range(2):
        output = model(x, output_hidden_states=True)
        actual = [*output.hidden_states, output.last_hidden_state]
        for a, b in zip(actual, one_after_the_other(model, x), strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()
    assert torch.equal(x, before)
    assert len(plans(model)) == 1


@pytest.mark.skipif(
    DEVICE != "cpu",
    reason="CPU tensors go through the emulation; with a GPU the interpreter is off",
)
@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_norms_by_cuda_kernels(kind, monkeypatch):
    """They are launched as on a GPU, past the dispatcher, in the emulation of one."""
    norms = kernels()
    emulate(norms, (90, 2, 227 * 1024))
    model, x = model_of(kind), images()
    expected = one_after_the_other(model, x)
    monkeypatch.setattr(cuda, "kernels_of", lambda *_: "native")
    entries: list[str] = []
    find_entry = native_cuda.entry
    monkeypatch.setattr(native_cuda, "library", lambda: norms)
    monkeypatch.setattr(
        group_norm_act_cuda, "entry", lambda name, *types: entries.append(name) or find_entry(name, *types)
    )  # fmt: skip
    output = model(x, output_hidden_states=True)
    actual = [*output.hidden_states, output.last_hidden_state]
    assert len(plans(model)) == 1
    assert "bitfast_group_norm_act_forward" in entries
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_has_the_bits_of_single_ops():
    model, x = model_of("preactivation"), images()
    with torch.autocast(DEVICE, torch.bfloat16):
        output = model(x, output_hidden_states=True)
        expected = one_after_the_other(model, x)
    assert output.last_hidden_state.dtype == torch.bfloat16
    for a, b in zip([*output.hidden_states, output.last_hidden_state], expected, strict=True):
        assert torch.equal(a, b)


def test_what_a_program_consists_of():
    """Norms run in place, and together with the sum before them."""
    model = model_of("preactivation")
    model(images())
    (plan,) = plans(model)
    (part,) = plan.parts
    block = ["convolution", "group_norm_act", "convolution", "group_norm_act"]
    last = "convolution, add_group_norm_act"
    assert list(part.program.names) == [
        "begin", "convolution", "same_max_pool",
        "group_norm_act", "convolution", *block, last,
        *block, last,
        "convolution", *block, last,
    ]  # fmt: skip


def test_blocks_next_to_a_watched_one_are_planned():
    model, x = model_of("preactivation"), images()
    expected = model(x).last_hidden_state
    seen: list[Tensor] = []
    watched = model.encoder.stages[0].layers[1]
    watched.norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    actual = model(x).last_hidden_state
    (plan,) = plans(model)
    assert [type(part).__name__ for part in plan.parts] == [
        "_ProgramPart",
        "_ModulePart",
        "_LatePart",
    ]
    assert len(seen) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [edit_in_place, swap_the_data, step_a_fused_optimizer])
def test_a_change_of_weights_is_seen(change):
    model, x = model_of("preactivation"), torch.randn(1, 3, 17, 18, device=DEVICE)
    before = features(model, x)
    with torch.enable_grad(), use_backend(group_norm_act="reference"):
        change(model)
    after = features(model, x)
    assert torch.equal(after, features(copy.deepcopy(model), x))
    assert not torch.equal(after, before)


def test_a_norm_s_parameters_may_move_and_change():
    model, x = model_of("preactivation"), images()
    before = features(model, x)
    norm = model.encoder.stages[0].layers[0].norm2
    norm.weight.mul_(-2)
    after = features(model, x)
    assert not torch.equal(after, before)
    norm.weight.data = norm.weight.detach() / -2
    assert torch.equal(features(model, x), before)


def test_parameters_that_are_not_aligned():
    model, x = model_of("preactivation"), images()
    expected = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            memory = torch.empty(module.num_channels + 1, device=DEVICE)
            memory[1:] = module.weight
            module.weight.data = memory[1:]
    torch.testing.assert_close(features(model, x), expected, rtol=1e-5, atol=1e-5)


def test_a_backbone_and_a_batch_of_none():
    model, x = model_of("same", name="BitBackbone"), images()
    maps = model(x).feature_maps
    with use_backend("reference"):
        expected = copy.deepcopy(model)(x).feature_maps
    torch.testing.assert_close(flatten(maps), flatten(expected), rtol=1e-4, atol=1e-4)
    assert model(x[:0]).feature_maps[-1].shape[0] == 0


def test_parameters_of_another_dtype():
    model, x = model_of("preactivation", torch.bfloat16), images(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    output = model(x, output_hidden_states=True)
    for a, b in zip(
        [*output.hidden_states, output.last_hidden_state],
        one_after_the_other(model, x),
        strict=True,
    ):
        assert torch.equal(a, b)
