"""An unchanged network is not planned again; a change of its parameters shows in the next pass.

Changes of its modules: test_execution_changes.py.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.layers import GroupNormActivation
from tests.network_plans import (
    NEEDS_PLANS,
    assert_right,
    model_of,
    plans_of,
    some_images,  # noqa: F401
)
from tests.tiny_models import ours
from tests.weight_changes import CHANGES, convolutions, features

pytestmark = [NEEDS_PLANS, pytest.mark.usefixtures("no_gradient")]


def block(model: Any) -> Any:
    return model.encoder.stages[0].layers[0]


def scale(model: Any) -> GroupNormActivation:
    return block(model).norm2


# ---- what does not make it plan again ---------------------------------------------------------------


def do_nothing(model: Any) -> None:
    pass


def look_at_it(model: Any) -> None:
    str(model)
    model.state_dict()
    [parameter.shape for parameter in model.parameters()]
    copy.deepcopy(model)


def change_norms_in_place(model: Any) -> None:
    scale(model).weight.mul_(-2)
    model.norm.bias.add_(1)


def call_parts(model: Any) -> None:
    model.encoder.stages[0](torch.randn(2, 8, 9, 9))
    block(model)(torch.randn(2, 8, 9, 9))


def call_with_other_parameters(model: Any) -> None:
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, (torch.randn(2, 3, 33, 47),))


@pytest.mark.parametrize(
    "action",
    [do_nothing, look_at_it, change_norms_in_place, call_parts, call_with_other_parameters],
)
def test_an_unchanged_network_is_not_planned_again(action, x):
    model = model_of()
    features(model, x)
    (plan,) = plans_of(model)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            action(model)
            with mode():
                features(model, x.clone())
            assert plans_of(model) == [plan]
    assert_right(model, x)
    assert plans_of(model) == [plan]


def call_otherwise(model: Any) -> None:
    x = torch.randn(3, 3, 40, 40)
    with torch.enable_grad():
        model(x).last_hidden_state.sum().backward()
    model.zero_grad()
    features(model, x[:, :, :33])
    with use_backend("reference"):
        features(model, x)


def hook_another(model: Any) -> None:
    other = model_of()
    handle = block(other).register_forward_hook(lambda *_: None)
    features(other, torch.randn(2, 3, 33, 47))
    handle.remove()


@pytest.mark.parametrize("action", [call_otherwise, hook_another])
def test_what_may_make_it_plan_again_changes_nothing(action, x):
    model = model_of()
    before = features(model, x)
    for _ in range(2):
        action(model)
        assert torch.equal(features(model, x), before)
    assert_right(model, x)


def test_each_setting_is_planned_once(x):
    model = model_of()
    for _ in range(2):
        for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
            features(model, images)
            model(images, output_hidden_states=True)
        with torch.backends.mkldnn.flags(enabled=True):
            features(model, x)
    assert len(plans_of(model)) == 6


# ---- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights(change, mode, x):
    model = model_of()
    with mode():
        before = features(model, x).clone()
    with torch.enable_grad():
        change(model)
    with mode():
        assert_right(model, x, before)


def another(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(parameter))


def put_into_parameters(module: nn.Module) -> None:
    module._parameters["weight"] = another(module.weight)


def make_a_buffer(module: nn.Module, name: str = "weight") -> None:
    tensor = torch.randn_like(getattr(module, name))
    delattr(module, name)
    module.register_buffer(name, tensor)


def make_a_plain_tensor(module: nn.Module) -> None:
    tensor = torch.randn_like(module.weight)
    del module.weight
    module.weight = tensor


def share_and_edit(module: nn.Module) -> None:
    module.weight.share_memory_()
    module.weight.normal_()


def swap_tensors(module: nn.Module) -> None:
    module.eval()  # lets go of it, as torch demands
    torch.utils.swap_tensors(module.weight, another(module.weight))


def put_one_of_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        other = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
    module.weight = other


def free_and_set_data(module: nn.Module) -> None:
    shape = module.weight.shape
    module.weight.data = torch.empty(0)
    gc.collect()
    module.weight.data = torch.randn(shape)


def prune_channels(model: Any) -> None:
    """Without telling the modules their new numbers of channels."""
    norm, before, after = block(model).norm2, block(model).conv1, block(model).conv2
    before.weight = nn.Parameter(before.weight[:6].clone())
    norm.weight, norm.bias = (nn.Parameter(p[:6].clone()) for p in (norm.weight, norm.bias))
    after.weight = nn.Parameter(after.weight[:, :6].clone())


def prune_channels_and_tell(model: Any) -> None:
    prune_channels(model)
    norm, before, after = block(model).norm2, block(model).conv1, block(model).conv2
    before.out_channels = norm.num_channels = after.in_channels = 6


def put_smaller_filters(model: Any) -> None:
    block(model).conv2.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    block(model).conv2.padding = (0, 0)


PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "put into _parameters": lambda m: put_into_parameters(block(m).conv2),
    "a buffer": lambda m: make_a_buffer(block(m).conv2),
    "the stem's buffer": lambda m: make_a_buffer(m.embedder.convolution),
    "a plain tensor": lambda m: make_a_plain_tensor(block(m).conv2),
    "shared memory": lambda m: share_and_edit(block(m).conv2),
    "swapped tensors": lambda m: swap_tensors(block(m).conv2),
    "made in inference mode": lambda m: put_one_of_inference_mode(block(m).conv2),
    "a bias": lambda m: setattr(block(m).conv2, "bias", nn.Parameter(4 * torch.randn(8))),
    "pruned channels": prune_channels,
    "pruned channels that are told": prune_channels_and_tell,
    "smaller filters": put_smaller_filters,
    "another scale": lambda m: setattr(scale(m), "weight", another(scale(m).weight)),
    "another shift": lambda m: setattr(scale(m), "bias", another(scale(m).bias)),
    "a scale put into _parameters": lambda m: put_into_parameters(scale(m)),
    "a scale's buffer": lambda m: make_a_buffer(scale(m)),
    "a shift's buffer": lambda m: make_a_buffer(scale(m), "bias"),
    "a scale that is a plain tensor": lambda m: make_a_plain_tensor(scale(m)),
    "the data of a scale": lambda m: free_and_set_data(scale(m)),
    "no shift": lambda m: setattr(scale(m), "bias", None),
    "the last norm's scale in place": lambda m: m.norm.weight.normal_(),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_change_of_parameters(name, x):
    model = model_of()
    before = features(model, x)
    PARAMETERS[name](model)
    after = assert_right(model, x, before)
    with torch.inference_mode():
        torch.testing.assert_close(features(model, x), after)


def test_edits_of_a_weight_that_was_made_in_inference_mode(x):
    model = model_of()
    features(model, x)
    put_one_of_inference_mode(block(model).conv2)
    for _ in range(2):
        before = features(model, x)
        with torch.inference_mode():
            block(model).conv2.weight.normal_()
        assert_right(model, x, before)


@pytest.mark.parametrize("make", [Tensor.clone, nn.Parameter], ids=["tensors", "parameters"])
def test_a_call_with_other_parameters_and_what_follows(make, x):
    model = model_of()
    before = features(model, x)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(others)
    given = {name: make(tensor) for name, tensor in others.items()}
    result = torch.func.functional_call(model, given, (x,)).last_hidden_state
    torch.testing.assert_close(result, features(twin, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(features(model, x), before)
    result = torch.func.functional_call(model, given, (x,)).last_hidden_state
    torch.testing.assert_close(result, features(twin, x), rtol=1e-4, atol=1e-4)


# ---- whole models -------------------------------------------------------------------------------------


def output(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    return result.logits if hasattr(result, "logits") else result.feature_maps[-1]


@pytest.mark.parametrize("name", ["BitForImageClassification", "BitBackbone"])
def test_networks_within_models(name, x):
    model = ours(name).eval()
    before = output(model, x)
    (plan,) = plans_of(model.bit)
    assert torch.equal(output(model, x), before)
    assert plans_of(model.bit) == [plan]
    seen: list[Any] = []
    handle = model.bit.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(output(model, x), before, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert seen == [1]
    assert torch.equal(output(model, x), before)
    convolutions(model)[1].weight.data = torch.randn_like(convolutions(model)[1].weight)
    after = output(model, x)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after, output(copy.deepcopy(model), x), rtol=1e-4, atol=1e-4)


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda m: m.double(),
    "rounded": lambda m: m.bfloat16().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "trained and evaluated": lambda m: m.train().eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "shared": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(name, x):
    model = model_of()
    features(model, x)
    CONVERSIONS[name](model)
    assert_right(model, x.to(next(model.parameters()).dtype))


def test_a_network_that_is_trained_and_evaluated_in_turns(x):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = features(model, x)
    for _ in range(3):
        model.train()
        with torch.enable_grad():
            model(x).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        before = assert_right(model, x, before)
