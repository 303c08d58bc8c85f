"""Whole models in training, each block one node: all gradients are those of transformers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bitfast
from tests.model_pairs import CLASSES, images_without_kinks
from tests.threads import torch_threads
from tests.tolerances import Triples, assert_draws_within_contract
from tests.training_models import (
    BLOCKS,
    KINDS,
    OTHERS,
    assert_alike,
    counted_nodes,
    gradients,
    gradients_of,
    images,
    models,
    objective,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: the models are too small for more."""
    with torch_threads(1):
        yield


# ---- every parameter ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float64(kind, layout):
    ours, theirs = models(kind)
    for shape in ((3, 20, 20), (1, 16, 25), (2, 7, 7), (1, 1, 1)):
        if shape == (1, 1, 1) and "same" in kind:
            continue  # needs five pixels
        x = images(*shape).contiguous(memory_format=layout)
        with counted_nodes() as passes:
            actual = gradients(ours, objective(x))
        assert (passes.forward, passes.backward) == (BLOCKS, BLOCKS)
        assert_alike(actual, gradients(theirs, objective(x)), f"{shape}")


@pytest.mark.parametrize("kind", OTHERS)
def test_float64_of_other_models(kind):
    """Of some the blocks cannot be nodes."""
    ours, theirs = models(kind)
    x = images(2, 24, 24) if "valid" in kind else images(2, 33, 20)
    if "valid" in kind:
        for model in (
            ours,
            theirs,
        ):  # 3x3 convolutions lose the border: no block can add its shortcut
            with pytest.raises((ValueError, RuntimeError)):
                model(images(2, 64, 64))
        with pytest.raises((ValueError, RuntimeError)):
            theirs(x)
        return
    assert_alike(gradients(ours, objective(x)), gradients(theirs, objective(x)))


DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


@contextmanager
def equal_draws() -> Iterator[None]:
    """Let torch.rand draw the same numbers in each dtype, so that the same branches are dropped."""
    rand = torch.rand

    def coarse(*shape: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        return ((8 * rand(*shape, **options)).floor() / 8).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", coarse)
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(kind, dtype):
    """Per parameter and for the images, in what dtype the model computes."""
    of_model, autocast = DTYPES[dtype]
    ours, theirs = models(kind, dtype=torch.float32)
    ours, theirs = ours.to(of_model), theirs.to(of_model)
    exact = copy.deepcopy(theirs).double()
    seeds = itertools.count()

    def draw() -> Triples:
        x = torch.randn(4, 3, 24, 24)
        if dtype == "float32" and "gelu" not in str(KINDS[kind]):
            x = images_without_kinks(exact, 4, 3, 24, 24)
        seed = next(seeds)
        found = []
        for model in (ours, theirs, exact):
            own = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
            enabled = autocast is not None and model is not exact
            with torch.autocast("cpu", autocast, enabled=enabled), equal_draws():
                loss = objective(own, seed)(model)
            model.zero_grad()
            loss.backward()
            found.append({**gradients_of(model), "images": own.grad})
        return {name: tuple(each[name] for each in found) for name in found[2]}  # type: ignore[misc]

    if dtype == "float32":
        assert_draws_within_contract(draw, 5)
        return
    # bfloat16 carries activations across the kinks of ReLU and max-pool, where gradients jump: the largest
    # error is luck. The root mean square is held.
    draws = [draw() for _ in range(12)]
    for name in draws[0]:
        actual, plain, oracle = (
            torch.stack(each).double() for each in zip(*(d[name] for d in draws), strict=True)
        )
        error, allowed = ((x - oracle).square().mean().sqrt() for x in (actual, plain))
        assert torch.isfinite(actual).all(), name
        rounding = torch.finfo(torch.bfloat16).eps / 2 * oracle.square().mean().sqrt()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


# ---- hidden states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_and_through_hidden_states(kind, dtype):
    ours, theirs = models(kind, "BitModel", dtype)
    exact = copy.deepcopy(theirs).double()
    x = images(2)
    if "gelu" not in str(KINDS[kind]):
        x = images_without_kinks(exact, 2, 3, 20, 20)
    with equal_draws():
        actual = _of_hidden_states(ours, x.to(dtype))
        expected = _of_hidden_states(exact, x.to(dtype).double())
    bound = 1e-9 if dtype == torch.float64 else 1e-3
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= bound * e.norm().clamp_min(1e-3)


def _of_hidden_states(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return gradients with respect to hidden states, and of the parameters by way of these."""
    torch.manual_seed(0)
    output = model(x, output_hidden_states=True)
    states = output.hidden_states
    everything = sum((n + 1) * state.square().mean() for n, state in enumerate(states))
    everything = everything + output.pooler_output.square().sum()
    found = [
        *torch.autograd.grad(everything, states, retain_graph=True),
        *torch.autograd.grad(output.pooler_output.sum(), states[:-1], retain_graph=True),
        *torch.autograd.grad(states[2].sin().sum(), states[:2], retain_graph=True),
    ]
    # Gradients in whatever layout.
    grads = [g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for g in found[: len(states)]]
    grads[1] = torch.ones((), dtype=x.dtype).expand(grads[1].shape)
    model.zero_grad()
    torch.autograd.backward(states, grads, retain_graph=True)
    everything.backward()
    return [*found, *gradients_of(model).values()]


def test_a_hidden_state_needs_nothing_after_it(kind):
    ours, theirs = models(kind, "BitModel")
    x = images()
    for number in range(4):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(0)
            state = model(x, output_hidden_states=True).hidden_states[number]
            model.zero_grad()
            with counted_nodes() as passes:
                state.square().sum().backward()
            found.append(gradients_of(model))
            assert passes.backward == (0 if model is theirs else (0, 1, 3, 4)[number])
        assert_alike(*found, f"hidden state {number}")


# ---- frozen parts -------------------------------------------------------------------------------------

FREEZINGS: dict[str, Callable[[str], bool]] = {
    "stem frozen": lambda n: "embedder" not in n,
    "first stages frozen": lambda n: "embedder" not in n and "stages.0" not in n,
    "only the last stage": lambda n: "stages.2" in n,
    "only norms": lambda n: "norm" in n,
    "no norms": lambda n: "norm" not in n,
    "only biases": lambda n: "bias" in n,
    "one conv1": lambda n: "stages.1.layers.0.conv1." in n,
    "one conv2": lambda n: "stages.1.layers.1.conv2." in n,
    "one shortcut": lambda n: "stages.1.layers.0.downsample.conv" in n,
    "one norm": lambda n: "stages.1.layers.0.norm3.weight" in n,
    "only the classifier": lambda n: "classifier" in n,
    "nothing": lambda n: False,
}


@pytest.mark.parametrize("needs_images", [False, True], ids=["weights only", "images too"])
@pytest.mark.parametrize("name", ["BitForImageClassification", "BitBackbone"])
def test_frozen_parts(kind, name, needs_images):
    """They have no gradient, cost no FLOPs in the backward pass, and change no other gradient."""
    ours, theirs = models(kind, name, out_features=["stage3"])
    x = images()
    # All of them: torch's own group_norm may crash where its input needs no gradient.
    complete = x.clone().requires_grad_()
    expected = gradients(theirs, objective(complete))
    expected["images"] = complete.grad
    for what, is_trained in FREEZINGS.items():
        names = [n for n in expected if n != "images" and is_trained(n)]
        if needs_images:
            names.append("images")
        if not names:
            continue
        for n, parameter in ours.named_parameters():
            parameter.requires_grad_(is_trained(n))
        own = x.clone().requires_grad_(needs_images)
        ours.zero_grad()
        loss = objective(own)(ours)
        with counted_nodes() as passes:
            loss.backward()
        actual = gradients_of(ours)
        if needs_images:
            actual["images"] = own.grad
        difference = [
            float((actual[n] - expected[n]).norm() / (expected[n].norm() + 1e-3)) for n in names
        ]
        assert list(actual) == names, what
        assert max(difference) < 1e-9, what
        if not needs_images:
            needed = {"only the last stage": 1, "only the classifier": 0, "one conv2": 2}
            assert passes.backward == needed.get(what, passes.backward), what


def test_a_frozen_block_keeps_nothing(kind):
    ours, _ = models(kind, "BitBackbone", out_features=["stage2"])
    for n, parameter in ours.named_parameters():
        parameter.requires_grad_("stages.1.layers.1.conv3" in n)
    with counted_nodes() as passes:
        (result,) = ours(images()).feature_maps
    assert passes.forward == 1
    with FlopCounterMode(display=False) as counter:
        result.sum().backward()
    # Of one convolution 1x1 the gradient of the weight: as many FLOPs as the convolution itself.
    weight = ours.bit.encoder.stages[1].layers[1].conv3.weight
    assert counter.get_total_flops() == 2 * weight.numel() * result[:, 0].numel()


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_flops_are_those_of_transformers(kind):
    found = []
    for model in models(kind, dtype=torch.float32):
        with FlopCounterMode(display=False) as counter:
            loss = objective(images(dtype=torch.float32))(model)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        found.append((forward, counter.get_total_flops()))
    assert found[0] == found[1]


# ---- what is kept ---------------------------------------------------------------------------------------


def kept_maps(model: nn.Module, x: Tensor) -> int:
    """Return how many bytes of feature maps, and of the images, a forward pass keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == x.shape[0]:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    total = sum(kept.values())
    del output
    return total


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_about_half_is_kept(kind):
    """Of what the blocks would keep if they were called one by one, as where somebody hooks them."""
    ours, _ = models(kind, dtype=torch.float32, depths=[3, 4, 6])
    x = images(5, 64, 64, dtype=torch.float32)
    nodes = kept_maps(ours, x)
    for stage in ours.bit.encoder.stages:
        for block in stage.layers:
            block.register_forward_hook(lambda *_: None)
    as_written = kept_maps(ours, x)
    print(f"{nodes / as_written:.2f} of the bytes")
    assert nodes < (0.6 if kind == "preactivation" else 0.8) * as_written


# ---- accelerated models of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_accelerated(kind, name):
    _, theirs = models(kind, name)
    accelerated = copy.deepcopy(theirs)
    assert bitfast.accelerate(accelerated)
    x = images()
    with counted_nodes() as passes:
        actual = gradients(accelerated, objective(x))
    # transformers' own drop path is called.
    dropping = 3 if "drop path" in kind else 0
    assert passes.backward in (BLOCKS - dropping, BLOCKS)
    assert_alike(actual, gradients(theirs, objective(x)))


# ---- settings that change ----------------------------------------------------------------------------


def set_eps(model: Any) -> None:
    first, second = model.bit.encoder.stages[1].layers
    first.norm2.eps, second.conv2.eps = 0.1, 0.5


def set_activation(model: Any) -> None:
    model.bit.encoder.stages[1].layers[0].norm2.activation = nn.GELU()


def set_gelu(model: Any) -> None:
    set_activation(model)
    gradients(model, objective(images()))
    model.bit.encoder.stages[1].layers[0].norm2.activation.approximate = "tanh"


def set_padding(model: Any) -> None:
    model.bit.encoder.stages[1].layers[0].conv2.pad.value = 1.0


def set_drop_prob(model: Any) -> None:
    model.bit.encoder.stages[1].layers[1].drop_path.drop_prob = 0.9


def rest(model: Any) -> None:
    model.bit.encoder.stages[1].layers[1].drop_path.eval()


def tie(model: Any) -> None:
    """Let one weight serve in two stages and in two blocks of one, and one norm be used twice in a block."""
    (first, second), last = (
        model.bit.encoder.stages[1].layers,
        model.bit.encoder.stages[2].layers[0],
    )
    second.conv2.weight = last.conv2.weight = first.conv2.weight
    second.norm2.weight = first.norm2.weight
    second.norm3 = second.norm2


def use_a_block_twice(model: Any) -> None:
    layers = model.bit.encoder.stages[1].layers
    layers.append(layers[1])


CHANGES = {
    set_eps: "preactivation",
    set_activation: "bottleneck",
    set_gelu: "preactivation",
    set_padding: "bottleneck, same",
    set_drop_prob: "preactivation, drop path",
    rest: "bottleneck, drop path",
    tie: "preactivation",
    use_a_block_twice: "bottleneck",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_set_between_steps_counts(change):
    found = []
    x = images()
    for model in models(CHANGES[change]):
        before = gradients(model, objective(x))
        change(model)
        found.append(gradients(model, objective(x)))
        assert not all(torch.equal(before[n], g) for n, g in found[-1].items())
    assert_alike(*found)
