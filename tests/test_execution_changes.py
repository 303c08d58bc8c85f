"""A change of a network's modules, whatever it is, shows in the next pass."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import bitfast
from bitfast.blocks import BitPreActivationBottleneckLayer
from bitfast.layers import DynamicPad2d, GroupNormActivation, WeightStandardizedConv2d
from bitfast.network import BitStage
from bitfast.pooling import MaxPool2d
from tests.model_pairs import their_model
from tests.network_plans import (
    NEEDS_PLANS,
    assert_right,
    called_by,
    model_of,
    plans_of,
    some_images,  # noqa: F401
)
from tests.weight_changes import convolutions, features

pytestmark = [NEEDS_PLANS, pytest.mark.usefixtures("no_gradient")]


def layers(model: Any) -> Any:
    return model.encoder.stages[0].layers


def block(model: Any) -> Any:
    return layers(model)[0]


def last_block(model: Any) -> Any:
    return model.encoder.stages[1].layers[0]


def distorted(x: Tensor) -> Tensor:
    """Other values: norms would undo a mere factor, and standardized filters a sum."""
    return x + x.square().clamp(max=9)


# ---- others in their place --------------------------------------------------------------------------


class Distorted(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return distorted(self.module(*inputs))


PATHS = [
    "embedder",
    "embedder.convolution",
    "embedder.pad",
    "embedder.pooler",
    "embedder.pooler.pad",
    "encoder.stages.1",
    "encoder.stages.0.layers.1",
    *(
        f"encoder.stages.0.layers.0.{name}"
        for name in (
            "conv1", "conv2", "conv3", "norm1", "norm2", "norm3", "drop_path", "norm3.activation",
            "downsample", "downsample.conv", "downsample.norm",
        )
    ),
    "norm",
    "norm.activation",
]  # fmt: skip


def put(model: Any, path: str, module: nn.Module, way: str) -> None:
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if way == "setattr":
        setattr(holder, name, module)
    elif way == "add_module":
        holder.add_module(name, module)
    elif way == "_modules":
        holder._modules[name] = module
    elif way == "set_submodule":
        model.set_submodule(path, module)
    else:
        holder._modules = OrderedDict(holder._modules, **{name: module})


WAYS = ["setattr", "add_module", "_modules", "set_submodule", "other _modules"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "path"), [*(("preactivation", path) for path in PATHS), ("same", "embedder.convolution.pad")]
)  # fmt: skip
def test_a_module_is_replaced_and_put_back(kind, path, way, x):
    model = model_of(kind)
    module = model.get_submodule(path)
    before = features(model, x)
    put(model, path, Distorted(module), way)
    after = assert_right(model, x, before)
    put(model, path, module, way)
    torch.testing.assert_close(assert_right(model, x, after), before)


def exchange_blocks(model: Any) -> None:
    layers(model).append(copy.deepcopy(layers(model)[1]))
    convolutions(layers(model)[2])[1].weight.normal_()
    features(model, torch.randn(2, 3, 33, 35))
    layers(model)[1], layers(model)[2] = layers(model)[2], layers(model)[1]


def reorder_names(model: Any) -> None:
    """Blocks run in the order of their names in this dictionary."""
    children = layers(model)._modules
    children["2"] = copy.deepcopy(children["1"])
    convolutions(children["2"])[1].weight.normal_()
    features(model, torch.randn(2, 3, 33, 35))
    children["1"] = children.pop("1")


def use_gelu(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, GroupNormActivation):
            module.activation = nn.GELU()


def put_a_norm(model: Any) -> None:
    norm = block(model).norm2
    made = GroupNormActivation(norm.num_groups, norm.num_channels, activation="selu")
    block(model).norm2 = made


def end_early(model: Any) -> None:
    model.encoder.stages.pop(1)
    model.norm = nn.Identity()


# ---- others than they were ----------------------------------------------------------------------------


def set_class(path: str, cls: type[nn.Module]) -> Callable[[Any], None]:
    """Return what makes a module one of a subclass that bends what it returns."""

    def change(model: Any) -> None:
        members = {"forward": lambda self, x: distorted(cls.forward(self, x))}
        model.get_submodule(path).__class__ = type("Mine", (cls,), members)

    return change


def distort(module: Any) -> None:
    module.forward = lambda x: distorted(type(module).forward(module, x))


def distort_instead_of_another_attribute(model: Any) -> None:
    """The module has as many attributes as before."""
    last_block(model).note = 1
    features(model, torch.randn(2, 3, 33, 35))
    del last_block(model).note
    distort(last_block(model))


def hook_in_a_new_dictionary(model: Any) -> None:
    """Code that removes all hooks of a module at once does it this way."""
    last_block(model)._forward_hooks = OrderedDict()
    last_block(model).register_forward_hook(lambda module, inputs, output: distorted(output))


def dilate(model: Any, padding: Any) -> None:
    block(model).conv2.dilation = (2, 2)
    block(model).conv2.padding = padding


def keep_resolution(model: Any) -> None:
    last_block(model).conv2.stride = (1, 1)
    last_block(model).downsample.conv.stride = (1, 1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.square()


def parametrize_weight(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def normalize_weight(model: Any) -> None:
    parametrizations.weight_norm(block(model).conv2)
    block(model).conv2.parametrizations.weight.original1.normal_()
    model.eval()


def mark_wrapped(model: Any) -> None:
    block(model).conv2.mark_wrapped()
    block(model).conv2.weight.data.normal_()


def train_drop_path(model: Any) -> None:
    last_block(model).drop_path.train()


BLOCK = "encoder.stages.0.layers.1"
STEM = "embedder"

CHANGES: dict[str, Callable[[Any], Any]] = {
    "an item of a Sequential": lambda m: layers(m).__setitem__(1, Distorted(layers(m)[1])),
    "exchanged blocks": exchange_blocks,
    "names in another order": reorder_names,
    "a popped block": lambda m: layers(m).pop(1),
    "a deleted block": lambda m: layers(m).__delitem__(1),
    "one more block": lambda m: layers(m).append(copy.deepcopy(layers(m)[1])),
    "the same block again": lambda m: layers(m).append(layers(m)[1]),
    "no last stage": end_early,
    "one more stage": lambda m: m.encoder.stages.append(nn.Conv2d(32, 32, 3, padding=1)),
    "an Identity for the norm": lambda m: setattr(m, "norm", nn.Identity()),
    "one more shortcut": lambda m: setattr(layers(m)[1], "downsample", nn.Conv2d(16, 16, 1)),
    "another norm": put_a_norm,
    "other activations": use_gelu,
    "a block's activation": lambda m: setattr(block(m), "activation", nn.SELU()),
    "an activation of norm3": lambda m: setattr(block(m).norm3, "activation", nn.GELU()),
    "the class of a block": set_class(BLOCK, BitPreActivationBottleneckLayer),
    "the class of a stage": set_class("encoder.stages.1", BitStage),
    "the class of a convolution": set_class(f"{BLOCK}.conv2", WeightStandardizedConv2d),
    "the class of a norm": set_class(f"{BLOCK}.norm2", GroupNormActivation),
    "the class of an activation": set_class(f"{BLOCK}.norm2.activation", nn.ReLU),
    "the class of a pad": set_class(f"{STEM}.convolution.pad", DynamicPad2d),
    "the class of the pool": set_class(f"{STEM}.pooler", MaxPool2d),
    "the class of the pool's pad": set_class(f"{STEM}.pooler.pad", DynamicPad2d),
    "the class of the stem's pad": set_class(f"{STEM}.pad", nn.ConstantPad2d),
    "the forward of a block": lambda m: distort(layers(m)[1]),
    "the forward of a stage": lambda m: distort(m.encoder.stages[0]),
    "the forward of the stem": lambda m: distort(m.embedder),
    "the forward of a convolution": lambda m: distort(layers(m)[1].conv3),
    "the forward of a pad": lambda m: distort(m.embedder.convolution.pad),
    "the forward of a norm": lambda m: distort(layers(m)[1].norm1),
    "the forward of an activation": lambda m: distort(layers(m)[1].norm1.activation),
    "the forward of the last norm": lambda m: distort(m.norm),
    "a forward for another attribute": distort_instead_of_another_attribute,
    "hooks in a new dictionary": hook_in_a_new_dictionary,
    "eps of a convolution": lambda m: setattr(block(m).conv2, "eps", 1.0),
    "eps of a norm": lambda m: setattr(block(m).norm2, "eps", 1.0),
    "eps of the last norm": lambda m: setattr(m.norm, "eps", 10.0),
    "groups of a norm": lambda m: setattr(block(m).norm2, "num_groups", 8),
    "strides": keep_resolution,
    "stride of the stem": lambda m: setattr(m.embedder.convolution, "stride", (1, 1)),
    "stride of the stem, not of its pad": lambda m: setattr(m.embedder.convolution, "stride", 1),
    "padding": lambda m: setattr(m.embedder.convolution, "padding", (1, 1)),
    "a named padding": lambda m: dilate(m, "same"),
    "dilation": lambda m: dilate(m, (2, 2)),
    "the padding of the stem": lambda m: setattr(m.embedder.pad, "padding", (2, 2, 2, 2)),
    "the value of the stem's pad": lambda m: setattr(m.embedder.pad, "value", 9.0),
    "the value of a pad": lambda m: setattr(m.embedder.convolution.pad, "value", 9.0),
    "the window of a pad": lambda m: setattr(m.embedder.convolution.pad, "kernel_size", (9, 9)),
    "no pad": lambda m: setattr(m.embedder.convolution, "pad", None),
    "the value of the pool's pad": lambda m: setattr(m.embedder.pooler.pad, "value", 9.0),
    "the pool's stride": lambda m: setattr(m.embedder.pooler, "stride", (1, 1)),
    "the pool's window": lambda m: setattr(m.embedder.pooler, "kernel_size", 2),
    "the pool's padding": lambda m: setattr(m.embedder.pooler, "padding", 1),
    "the pool rounds up": lambda m: setattr(m.embedder.pooler, "ceil_mode", True),
    "a drop path that is trained": train_drop_path,
    "a stage that is trained": lambda m: m.encoder.stages[1].train(),
    "pruned": lambda m: prune.random_unstructured(block(m).conv2, "weight", 0.5),
    "parametrized": lambda m: parametrize_weight(block(m).conv2),
    "a parametrized scale": lambda m: parametrize_weight(block(m).norm2),
    "weight norm": normalize_weight,
    "lent": mark_wrapped,
}

KINDS = {
    "a block's activation": "bottleneck",
    "an activation of norm3": "bottleneck",
    "the class of a pad": "same",
    "the class of the pool's pad": "same",
    "the forward of a pad": "same",
    "stride of the stem, not of its pad": "same",
    "the value of a pad": "same",
    "the window of a pad": "same",
    "no pad": "same",
    "the value of the pool's pad": "same",
    "a drop path that is trained": "drop path",
    "a stage that is trained": "drop path",
}
"""Of the networks; others are preactivation."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name, x):
    model = model_of(KINDS.get(name, "preactivation"))
    x = x[..., :33, :35]
    before = features(model, x)
    assert len(plans_of(model)) == 1
    CHANGES[name](model)
    assert_right(model, x, before)


@pytest.mark.parametrize("kind", ["gelu", "bottleneck gelu"])
def test_how_a_gelu_is_computed(kind, x):
    """Another way moves the result by about a thousandth."""
    model = model_of(kind)
    before = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
    after = features(model, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, features(copy.deepcopy(model), x))


def test_a_foreign_drop_path_that_is_trained(x):
    model = their_model("BitModel", drop_path_rate=0.5).eval()
    bitfast.accelerate(model)
    before = features(model, x)
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path.train()
    torch.manual_seed(3)
    after = features(model, x)
    torch.manual_seed(3)
    expected = features(copy.deepcopy(model), x)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_a_compiled_call_in_the_place_of_none_is_made(x):
    """Not held to a copy, which has no compiled call."""
    model, calls = model_of(), []
    compiled: Any = last_block(model)
    compiled._compiled_call_impl = None
    before = features(model, x)

    def call(x: Tensor) -> Tensor:
        calls.append(x)
        return distorted(compiled.forward(x))

    compiled._compiled_call_impl = call
    assert not torch.equal(features(model, x), before)
    assert len(calls) == 1


# ---- hooks --------------------------------------------------------------------------------------------


def all_paths() -> list[str]:
    """Each module that a pass calls, or that is part of one that it calls."""
    model = model_of()
    lists = {"", "encoder.stages", *(f"encoder.stages.{n}.layers" for n in range(2))}
    return [path for path, _ in model.named_modules() if path not in lists]


HOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "with keywords": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
}


@pytest.mark.parametrize("way", HOOKS)
def test_hooks_come_and_go(way, x):
    model = model_of()
    before = features(model, x)
    for path in all_paths():
        seen: list[nn.Module] = []
        handle = HOOKS[way](
            model.get_submodule(path), lambda module, *_, seen=seen: seen.append(module)
        )
        torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
        assert seen == [model.get_submodule(path)], path
        handle.remove()
        assert torch.equal(features(model, x), before)
        assert len(seen) == 1
        (plan,) = plans_of(model)
        assert called_by(plan) == []


@pytest.mark.parametrize("path", [p for p in all_paths() if p not in ("encoder", "pooler")])
def test_hooks_that_change_what_they_see(path, x):
    model = model_of()
    before = features(model, x)
    module = model.get_submodule(path)
    for register in (
        lambda: module.register_forward_hook(lambda module, inputs, output: distorted(output)),
        lambda: module.register_forward_pre_hook(lambda module, inputs: (distorted(inputs[0]),)),
    ):
        handle = register()
        after = assert_right(model, x)
        assert not torch.equal(after, before) or path.endswith("activation")
        handle.remove()
        assert torch.equal(assert_right(model, x), before)


def test_hooks_that_are_cleared(x):
    model = model_of()
    before = features(model, x)
    module = last_block(model)
    module.register_forward_hook(lambda module, inputs, output: distorted(output))
    assert_right(model, x, before)
    module._forward_hooks.clear()
    assert torch.equal(assert_right(model, x), before)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_the_whole_process(kind, x):
    model = model_of()
    before = features(model, x)
    (plan,) = plans_of(model)
    seen: list[nn.Module] = []
    handle = getattr(torch_module, f"register_module_{kind}_hook")(lambda m, *_: seen.append(m))
    try:
        torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
    finally:
        handle.remove()
    lists = {model.encoder.stages, *(stage.layers for stage in model.encoder.stages)}
    assert set(seen) == set(model.modules()) - lists
    assert torch.equal(features(model, x), before)
    assert plans_of(model) == [plan]


def test_backward_hooks_are_served_in_the_pass_that_records(x):
    model = model_of()
    features(model, x)
    seen: list[int] = []
    handle = block(model).norm2.register_full_backward_hook(lambda *_: seen.append(1))
    with torch.enable_grad():
        model(x).last_hidden_state.sum().backward()
        handle.remove()
        model(x).last_hidden_state.sum().backward()
    assert seen == [1]
    assert_right(model, x)


def test_a_block_is_compiled_more_than_once(x):
    model = model_of()
    before = features(model, x)
    for _ in range(2):
        torch._dynamo.reset()
        calls: list[int] = []

        def backend(graph: Any, inputs: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return graph.forward

        last_block(model).compile(backend=backend)
        torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
        assert calls
        last_block(model)._compiled_call_impl = None
        torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
