"""Networks that somebody has changed by hand, between passes or in the middle of one, compute as in
transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import bitfast
from tests.model_pairs import pair
from tests.threads import torch_threads

BOTTLENECK = {"layer_type": "bottleneck"}


def three_equal_models(dtype: torch.dtype = torch.float32, **settings: Any) -> list[Any]:
    """Equal models in evaluation: transformers', ours, and an accelerated one."""
    ours, theirs = pair("BitForImageClassification", **settings)
    models = [theirs, ours, copy.deepcopy(theirs)]
    bitfast.accelerate(models[2])
    return [model.to(dtype).eval() for model in models]


def assert_alike(models: list[Any], run: Callable[[Any], Tensor]) -> None:
    expected, *others = (run(model) for model in models)
    bound = 1e-9 if expected.dtype == torch.float64 else 1e-3
    for actual in others:
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def block(model: Any, number: int = 1) -> Any:
    return model.bit.encoder.stages[1].layers[number]


class Doubling(nn.ConstantPad2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2 + 1)


def stem(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.bit.embedder.convolution, name, value)


def move_stride(model: Any) -> None:
    block(model, 0).conv2.stride, block(model, 0).conv3.stride = (1, 1), (2, 2)


def activate_norm3(model: Any) -> None:
    block(model).norm3.activation = nn.SELU()


def no_bias(model: Any) -> None:
    model.bit.norm.bias = block(model).norm2.bias = None


def another_pad(pad: nn.Module) -> Callable[[Any], None]:
    return lambda model: setattr(model.bit.embedder, "pad", pad)


def eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.eps = 1e-2


ALTERATIONS: dict[str, tuple[Callable[[Any], None], dict[str, Any], int]] = {
    "stride 1": (stem("stride", 1), {}, 64),
    "padding 2": (stem("padding", 2), {}, 64),
    "padding same": (lambda m: setattr(block(m).conv2, "padding", "same"), {}, 64),
    "stride of conv3": (move_stride, {}, 64),
    "one pixel left": (lambda m: setattr(block(m).conv2, "padding", (0, 0)), {}, 24),
    "one pixel left of a bottleneck": (
        lambda m: setattr(block(m).conv2, "padding", (0, 0)),
        BOTTLENECK,
        24,
    ),
    "activation of norm3": (activate_norm3, BOTTLENECK, 64),
    "norms without bias": (no_bias, {}, 64),
    "subclass of a pad": (another_pad(Doubling(1, 0.0)), {}, 64),
    "negative pad": (another_pad(nn.ConstantPad2d(-1, 0.0)), {}, 64),
    "uneven pad": (another_pad(nn.ConstantPad2d((0, 1, 2, 0), 0.0)), {}, 64),
    "eps": (eps, {}, 64),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_is_set_by_hand_counts(name, dtype, gradients):
    alter, settings, size = ALTERATIONS[name]
    models = three_equal_models(dtype, **settings)
    x = torch.randn(2, 3, size, size, dtype=dtype)

    def run(model: Any) -> Tensor:
        model.requires_grad_(not gradients)  # weights are kept where they are frozen, too
        with torch.set_grad_enabled(gradients):
            before = model(x).logits
            alter(model)
            after = model(x).logits
        assert name == "padding same" or not torch.equal(before, after)
        return after

    assert_alike(models, run)


def edit_in_place(model: Any) -> None:
    block(model).conv2.weight.copy_(block(model).conv2.weight.cos())


def put_another(model: Any) -> None:
    block(model).conv2.weight = nn.Parameter(block(model).conv2.weight.detach().cos())


@pytest.mark.parametrize("edit", [edit_in_place, put_another])
@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hook_may_change_weights_in_the_middle_of_a_pass(dtype, mode, edit):
    models = three_equal_models(dtype)
    x = torch.randn(2, 3, 64, 64, dtype=dtype)

    def run(model: Any) -> Tensor:
        def hook(*_: Any) -> None:
            with torch.no_grad():
                edit(model)

        model.train(mode == "train").requires_grad_(mode != "frozen")
        block(model).norm1.register_forward_pre_hook(hook)
        with torch.set_grad_enabled(mode == "frozen"):
            return model(x).logits

    assert_alike(models, run)


def test_drop_prob_is_what_transformers_calls_it():
    def run(model: Any) -> Tensor:
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return model.train()(x).logits

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_alike(three_equal_models(torch.float64, drop_path_rate=0.9), run)


@pytest.mark.parametrize("accelerated", [False, True])
def test_weights_that_are_no_parameters(accelerated, tmp_path):
    """FSDP (version 1) and the replicas of DataParallel hold such weights; so does who makes them buffers."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    theirs, *others = three_equal_models()
    x = torch.randn(2, 3, 64, 64)
    expected = theirs(x).logits
    model = others[accelerated]
    as_buffers = copy.deepcopy(model)
    for module in as_buffers.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    torch.testing.assert_close(as_buffers(x).logits, expected, rtol=1e-3, atol=1e-4)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        torch.testing.assert_close(sharded(x).logits, expected, rtol=1e-3, atol=1e-4)
    finally:
        distributed.destroy_process_group()


def test_weights_are_loaded_by_swapping():
    models = three_equal_models()
    x = torch.randn(2, 3, 64, 64)

    def run(model: Any) -> Tensor:
        state = {name: tensor.cos() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model(x)
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                model.load_state_dict(state)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
            return model(x).logits

    assert_alike(models, run)


def change(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.cos())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child process is a fork")
def test_another_process_may_change_shared_weights():
    models = three_equal_models()
    x = torch.randn(1, 3, 32, 32)

    def run(model: Any) -> Tensor:
        model.share_memory()
        with torch.no_grad():
            model(x)
            child = torch.multiprocessing.get_context("fork").Process(target=change, args=(model,))
            child.start()
            child.join(60)
            assert child.exitcode == 0
            return model(x).logits

    with torch_threads(1):  # a forked process has none of the others
        assert_alike(models, run)


@pytest.mark.parametrize("path", ["bit.norm", "bit.embedder.pooler", "bit.embedder.convolution"])
def test_modules_take_images_without_a_batch(path):
    shapes = {"bit.norm": (2, 64, 5), "bit.embedder.pooler": (8, 9, 9)}
    x = torch.randn(shapes.get(path, (3, 17, 15)))
    for settings in ({}, {"global_padding": "same", "embedding_dynamic_padding": True}):
        assert_alike(three_equal_models(**settings), lambda model: model.get_submodule(path)(x))
