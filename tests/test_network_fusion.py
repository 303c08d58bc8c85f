"""A block adds its residual together with the norm that comes next, where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.blocks import BitPreActivationBottleneckLayer
from bitfast.layers import GroupNormActivation
from bitfast.network import BitStage
from tests.operator_calls import OperatorCalls, calls_of
from tests.tiny_models import ours
from tests.tolerances import relative_error

DEPTHS = {"depths": [2, 1, 2], "hidden_sizes": [16, 16, 32]}


@pytest.fixture(autouse=True)
def without_packed_weights() -> Iterator[None]:
    """Op by op, as in training: convolutions do not add to the shortcut by themselves."""
    with use_backend(packed_convolution="reference"):
        yield


@pytest.fixture
def model() -> Any:
    return ours("BitModel", **DEPTHS).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 40, 36)


def sums() -> OperatorCalls:
    """Note the channels of every sum that is added together with a norm."""
    return calls_of("add_group_norm_act", lambda arguments: arguments[0].shape[1])


@pytest.fixture
def fused() -> Iterator[list[int]]:
    """The channels of every sum that was added together with a norm."""
    with sums() as calls:
        yield calls.noted


def blocks(model: nn.Module) -> list[BitPreActivationBottleneckLayer]:
    return [m for m in model.modules() if isinstance(m, BitPreActivationBottleneckLayer)]


def unfused(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a copy whose blocks are all called as such."""
    twin = copy.deepcopy(model)
    for block in blocks(twin):
        block.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        output = twin(x, output_hidden_states=True)
    return (output.last_hidden_state, *output.hidden_states)


def test_every_sum_is_added_with_the_norm_after_it(model, x, fused):
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
    assert fused == [16, 16, 16, 32, 32]
    fused.clear()
    expected = unfused(model, x)
    assert fused == []
    for a, b in zip((output.last_hidden_state, *output.hidden_states), expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_separate_steps(model, x):
    model.train()
    twin = copy.deepcopy(model)
    for block in blocks(twin):
        block.register_forward_hook(lambda *_: None)
    for m in (model, twin):
        output = m(x, output_hidden_states=True)
        (
            output.last_hidden_state.sum() + sum(h.sin().sum() for h in output.hidden_states)
        ).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_hooks_on_a_block_see_what_they_would_see(model, x, fused):
    watched = blocks(model)[1]
    seen: list[tuple[Tensor, Tensor]] = []
    watched.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        hidden_states = model(x, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0][1], hidden_states[1])  # it is the last of its stage
    # Neither the block before it nor the block itself may do the next one's norm.
    assert fused == [16, 32, 32]


def test_hooks_on_a_norm_are_called(model, x, fused):
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    first = blocks(model)[2].norm1
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
    assert torch.equal(seen[0], output.hidden_states[1])
    assert torch.equal(seen[1], output.last_hidden_state)
    assert fused == [16, 32]  # a block whose norm is watched is called as such


def test_hooks_on_a_stage_are_called(model, x, fused):
    seen: list[Tensor] = []
    model.encoder.stages[1].register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
    assert torch.equal(seen[0], output.hidden_states[2])
    assert fused == [16, 32, 32]


def test_a_hook_that_changes_an_output_changes_the_result(model, x):
    with torch.no_grad():
        before = model(x).last_hidden_state
        blocks(model)[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        assert not torch.equal(model(x).last_hidden_state, before)


@pytest.mark.parametrize("kind", ["block", "norm", "stage", "call"])
def test_replaced_modules_are_called(model, x, kind):
    """Subclasses and modules with another forward do what they do, fused or not."""
    stage = model.encoder.stages[1]
    block = stage.layers[0]

    class Block(BitPreActivationBottleneckLayer):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    class Norm(GroupNormActivation):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    class Stage(BitStage):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    with torch.no_grad():
        before = model(x).last_hidden_state
        if kind == "block":
            block.__class__ = Block
        elif kind == "norm":
            block.norm1.__class__ = Norm
        elif kind == "stage":
            stage.__class__ = Stage
        else:
            forward = block.forward
            block.forward = lambda x: 3 * forward(x)
        after = model(x).last_hidden_state
    assert not torch.allclose(after, before)


def test_a_block_that_was_compiled_by_itself_is_called(model, x):
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    blocks(model)[1].compile(backend=backend)
    with torch.no_grad():
        actual = model(x).last_hidden_state
        with sums() as calls:  # under which torch compiles nothing
            model(x)
    assert calls
    assert calls.noted == [16, 32, 32]
    assert torch.equal(actual, unfused(model, x)[0])


def test_gradient_checkpointing_calls_each_block(model, x, fused):
    model.train()
    model.gradient_checkpointing_enable()
    model(x).last_hidden_state.sum().backward()
    assert fused == []


def test_drop_path_comes_before_the_sum(x):
    model = ours("BitModel", **DEPTHS, drop_path_rate=0.5).train()
    twin = copy.deepcopy(model)
    for block in blocks(twin):
        block.register_forward_hook(lambda *_: None)
    torch.manual_seed(3)
    expected = twin(x).last_hidden_state
    torch.manual_seed(3)
    assert torch.equal(model(x).last_hidden_state, expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_branch_that_was_left_smaller_is_added_by_itself(gradients, fused):
    model = ours("BitModel", depths=[2], hidden_sizes=[16], global_padding="valid").eval()
    x = torch.randn(1, 3, 17, 17)
    with torch.set_grad_enabled(gradients):
        assert model.embedder(x).shape[2:] == (3, 3)
        output = model(x).last_hidden_state
    assert fused == []
    assert output.shape == (1, 16, 3, 3)
    assert torch.equal(output, unfused(model, x)[0])


def test_the_other_blocks_add_by_themselves(fused):
    model = ours("BitModel", layer_type="bottleneck").eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert fused == []


def test_modules_that_are_called_alone_run_as_written(model, fused):
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        stage = model.encoder.stages[0]
        expected = x
        for block in stage.layers:
            expected = block(expected)
        assert torch.equal(stage(x), expected)
        assert torch.equal(
            model.encoder(x)[0], model.encoder.stages[2](model.encoder.stages[1](expected))
        )
    assert fused == []
