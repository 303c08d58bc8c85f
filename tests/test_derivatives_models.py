"""Derivatives of whole models, of every order and mode, are those of transformers' models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfast
from tests.derivatives import (
    DENSE,
    FORWARD,
    REVERSE,
    TRANSFORMS,
    gradient_penalty,
    objective,
    per_sample_gradients,
    r1_penalty,
)
from tests.foreign_models import TIMM
from tests.model_pairs import (
    CLASSES,
    LAYER_TYPES,
    assert_as_exact,
    assert_close,
    images_without_kinks,
    pair,
)

TINY: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_groups": 2,
}
DYNAMIC: dict[str, Any] = {"global_padding": "same", "embedding_dynamic_padding": True}
BOUND = 1e-10
SIZE = 16
"""So large that no norm is over a few numbers that may be nearly equal, which would amplify roundings."""


def models(
    name: str = "BitForImageClassification", *, accelerated: bool = False, **settings: Any
) -> tuple[nn.Module, nn.Module]:
    """Return our model, or theirs accelerated, and theirs; in training mode."""
    ours, theirs = pair(name, **{**TINY, **settings})
    if accelerated:
        ours = copy.deepcopy(theirs)
        assert bitfast.accelerate(ours)
    return ours, theirs


def images(batch: int = 2, size: int = SIZE, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


@pytest.fixture(params=LAYER_TYPES)
def layer_type(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["own", "accelerated"])
def accelerated(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def training(request):
    return request.param


@pytest.mark.parametrize("way", [*REVERSE, *FORWARD, *TRANSFORMS])
def test_derivatives_of_classifiers(way, layer_type, accelerated, training):
    run = {**REVERSE, **FORWARD, **TRANSFORMS}[way]
    ours, theirs = (
        m.double().train(training) for m in models(accelerated=accelerated, layer_type=layer_type)
    )
    x = images()
    assert_close(run(ours, x), run(theirs, x), BOUND)


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("mode", ["no_grad", "frozen"])
def test_forward_mode_where_nothing_records_gradients(way, mode, accelerated):
    """There inference has its own ways, with kept and packed weights, of which forward mode sees nothing."""
    ours, theirs = (m.double().eval() for m in models(accelerated=accelerated))
    x = images()
    with torch.no_grad():
        ours(x)  # whatever is kept, is kept now
    if mode == "no_grad":
        with torch.no_grad():
            actual = FORWARD[way](ours, x)
    else:
        actual = FORWARD[way](ours.requires_grad_(False), x)
    assert_close(actual, FORWARD[way](theirs, x), BOUND)


@pytest.mark.parametrize("way", DENSE)
def test_matrices_of_derivatives(way, layer_type, accelerated):
    settings = {"layer_type": layer_type, "hidden_sizes": [16], "depths": [1], "num_channels": 1}
    ours, theirs = (m.double().eval() for m in models(accelerated=accelerated, **settings))
    x = images(1, 8, channels=1)
    assert_close(DENSE[way](ours, x), DENSE[way](theirs, x), BOUND)


@pytest.mark.parametrize("settings", [DYNAMIC, {"hidden_act": "gelu"}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_derivatives_of_other_models(name, settings, layer_type, accelerated):
    settings = {**settings, "layer_type": layer_type}
    ours, theirs = (m.double().eval() for m in models(name, accelerated=accelerated, **settings))
    x = images()
    for way in (r1_penalty, FORWARD["jvp"], per_sample_gradients):
        assert_close(way(ours, x), way(theirs, x), BOUND)  # type: ignore[operator]


@pytest.mark.parametrize(
    "way", ["R1 penalty", "gradient penalty", "gradients in batches", "jvp of features", "vmap"]
)
def test_derivatives_in_float32(way, layer_type, accelerated, training):
    """There the kernels run.

    No way is among them whose result is one small number: its terms may cancel, and then the rounding of any
    correct float32 model is as large as the number.
    """
    run = {**REVERSE, **FORWARD, **TRANSFORMS}[way]
    ours, theirs = models(accelerated=accelerated, layer_type=layer_type)
    exact = copy.deepcopy(theirs).double()
    x = images_without_kinks(exact, 2, 3, SIZE, SIZE)
    for model in (ours, theirs, exact):
        model.train(training)
    actual, plain = run(ours, x), run(theirs, x)
    assert_as_exact(actual, plain, run(exact, x.double()))


@pytest.mark.parametrize("penalty", [r1_penalty, gradient_penalty])
def test_under_autocast(penalty):
    ours, theirs = models()
    exact = copy.deepcopy(theirs).double()
    x = images_without_kinks(exact, 2, 3, SIZE, SIZE)
    expected = penalty(exact, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = penalty(ours, x), penalty(theirs, x)
    assert len(actual) == len(expected)
    errors, allowed = (
        torch.stack(
            [(r.double() - e).norm() / e.norm() for r, e in zip(results, expected, strict=True)]
        )
        for results in (actual, plain)
    )
    assert errors.square().mean() <= 4 * allowed.square().mean()


@pytest.mark.parametrize("penalty", [r1_penalty, gradient_penalty])
@pytest.mark.parametrize("wrap", ["checkpointed", "saved on the CPU"])
def test_with_other_ways_of_saving_activations(penalty, wrap, layer_type):
    ours, theirs = (m.double().train() for m in models(layer_type=layer_type))
    x = images()
    expected = penalty(theirs, x)
    if wrap == "checkpointed":
        ours.gradient_checkpointing_enable()
        actual = penalty(ours, x)
    else:
        with torch.autograd.graph.save_on_cpu():
            actual = penalty(ours, x)
    assert_close(actual, expected, BOUND)


def test_derivatives_of_timm_networks_after_accelerate():
    pytest.importorskip("timm", reason="timm is not installed")
    model = TIMM["ResNetV2"].model(torch.float64)
    ours = copy.deepcopy(model)
    assert bitfast.accelerate(ours)
    x = images(size=33)
    for way in (_r1_of_logits, lambda m, x: torch.func.jvp(m, (x,), (x.cos(),))):
        assert_close(way(ours, x), way(model, x), BOUND)


def _r1_of_logits(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    return [first, *torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()])]


def test_linearized():
    ours, theirs = (m.double().eval() for m in models(hidden_sizes=[16], depths=[1]))
    x = images(1, 8)
    assert_close(_linearized(ours, x), _linearized(theirs, x), BOUND)


def _linearized(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.linearize(lambda images: model(images).logits, x)[1](x.cos())


def test_compiled_transforms_are_right():
    ours, theirs = (m.eval() for m in models(hidden_sizes=[16], depths=[1]))
    x = images(2, 8).float()
    run = per_sample_gradients
    compiled = torch.compile(lambda x: run(ours, x), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), run(theirs, x), 1e-4)


def test_a_compiled_model_refuses_second_derivatives():
    ours, _ = models(hidden_sizes=[16], depths=[1])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    leaf = images(2, 8).float().requires_grad_()
    (first,) = torch.autograd.grad(objective(compiled, leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.square().sum(), leaf)
