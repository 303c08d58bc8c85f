"""Weights standardized together, and kept in inference until something changes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from bitfast import BitBackbone, BitForImageClassification, BitModel
from bitfast.backends import use_backend
from bitfast.execution.weights import form_of, kept_standardized
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.kept_weights import MOST_TENSORS, kept_weights
from bitfast.ops.weight_standardization import weight_standardization
from tests.operator_calls import calls_of
from tests.threads import in_threads
from tests.tiny_models import ours
from tests.weight_changes import (
    CHANGES,
    alike,
    convolutions,
    edit_in_place,
    features,
    tie_two_weights,
)


@pytest.fixture(autouse=True)
def without_packed_weights() -> Iterator[None]:
    """As with a torch without oneDNN."""
    with use_backend(packed_convolution="reference"):
        yield


@pytest.fixture
def model() -> BitModel:
    return ours("BitModel").eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 33, 47)


@pytest.fixture
def standardized_counts() -> Iterator[list[int]]:
    """How many weights each preparation has standardized."""
    with calls_of("weight_standardization_all", lambda arguments: len(arguments[0])) as calls:
        yield calls.noted


def kept(model: nn.Module) -> list[Tensor]:
    """The tensors that are kept of a model's weights."""
    forms = [
        entry.by_form
        for layer in convolutions(model)
        if (entry := kept_weights._kept.get(id(layer.weight))) is not None
    ]
    return list({id(t): t for by_form in forms for t in by_form.values()}.values())


def by_stage(model: BitModel) -> list[int]:
    """How many weights are standardized together: of the stem and the first stage, then of each other stage."""
    first, *others = (len(convolutions(stage)) for stage in model.encoder.stages)
    return [len(convolutions(model.embedder)) + first, *others]


def fresh(model: BitModel, x: Tensor) -> Tensor:
    """What a model that has never kept anything computes."""
    with torch.no_grad():
        return features(copy.deepcopy(model), x)


def test_kept_weights_are_used_again(model, x, standardized_counts):
    with torch.no_grad():
        first, second = features(model, x), features(model, x)
    assert standardized_counts == by_stage(model)
    assert torch.equal(first, second)
    with torch.no_grad():
        by_layer = copy.deepcopy(model)
        for layer in convolutions(by_layer):
            layer.register_forward_pre_hook(lambda *_: None)  # leaves it to the layer
        assert torch.equal(features(by_layer, x), first)
    assert standardized_counts == by_stage(model)


# ---- what makes them stale ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(model, x, change: Callable[[BitModel], None], mode):
    with mode():
        before = features(model, x)
    change(model)
    with mode():
        after = features(model, x)
    assert torch.equal(after, fresh(model, x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.float(),
    ],
)
def test_a_conversion_is_followed(model, x, convert):
    with torch.no_grad():
        features(model, x)
        references = [weakref.ref(tensor) for tensor in kept(model)]
        assert len(references) == len(convolutions(model))
        convert(model)
        gc.collect()
        assert all(reference() is None for reference in references), "their memory was not freed"
        x = x.to(next(model.parameters()).dtype)
        result = features(model, x)
        assert [tensor.dtype for tensor in kept(model)] == [x.dtype] * len(references)
    assert torch.equal(result, fresh(model, x))


def test_moving_an_outer_module_counts_too(x):
    model = ours("BitForImageClassification").eval()
    with torch.no_grad():
        model(x)
        assert kept(model)
        nn.Sequential(model).double()
        assert not kept(model)
        model(x.double())


@pytest.mark.parametrize("switch", [lambda model: model.train(), lambda model: model.eval()])
def test_switching_between_training_and_evaluation_frees_kept_weights(model, x, switch):
    with torch.no_grad():
        features(model, x)
    assert kept(model)
    switch(model)
    assert not kept(model)


@pytest.mark.parametrize(
    "modes", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)]
)
def test_no_grad_and_inference_mode_share_kept_weights(model, x, modes, standardized_counts):
    results = []
    for mode in modes:
        with mode():
            results.append(features(model, x).clone())
    assert standardized_counts == by_stage(model)
    assert torch.equal(*results)
    # What inference mode has left behind must serve autograd, which saves the weights.
    for layer in convolutions(model):
        layer.weight.requires_grad_(False)
    x.requires_grad_()
    features(model, x).sum().backward()
    assert x.grad is not None
    assert standardized_counts == by_stage(model)


def test_autocast_and_backends_are_told_apart(model, x, standardized_counts):
    with torch.no_grad():
        plain = features(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert features(model, x).dtype == torch.bfloat16
        assert torch.equal(features(model, x), plain)
        with use_backend(weight_standardization="triton"):
            torch.testing.assert_close(features(model, x), plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(features(model, x), plain)
    assert standardized_counts == by_stage(model) * 3
    assert len(kept(model)) == 3 * len(convolutions(model))


def test_the_number_of_tensors_kept_of_one_weight_is_bounded():
    layer = WeightStandardizedConv2d(3, 4, 3)
    with torch.no_grad():
        for eps in range(1, MOST_TENSORS + 3):
            layer.eps = eps / 10
            (result,) = kept_standardized([layer], False).values()
            assert kept(layer)[-1] is result
            assert len(kept(layer)) == min(eps, MOST_TENSORS)
            assert kept_weights.find(layer.weight, form_of(layer, False)) is result


def test_a_step_between_two_evaluations_is_seen(model, x):
    """A fused optimizer changes weights without torch's version counter telling so."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        features(model, x).square().sum().backward()
        with torch.no_grad():
            before = features(model, x)
        optimizer.step()
        with torch.no_grad():
            after = features(model, x)
        assert not torch.equal(before, after)
        assert torch.equal(after, fresh(model, x))


def test_the_optimizer_of_another_model_changes_nothing(model, x, standardized_counts):
    other = ours("BitModel")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            features(model, x)
        features(other, x).sum().backward()
        optimizer.step()
    assert standardized_counts == by_stage(model)


def test_each_kind_of_weight_is_asked_how_it_is_to_be_computed():
    """Weights of several dtypes (or devices) follow autocast each in its own way, whichever comes first."""
    first, second = WeightStandardizedConv2d(3, 4, 3).double(), WeightStandardizedConv2d(3, 4, 3)

    def dtypes() -> list[torch.dtype]:
        with torch.no_grad():
            weights = kept_standardized([first, second], False)
        return [weights[layer].dtype for layer in (first, second)]

    assert dtypes() == [torch.float64, torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtypes() == [torch.float64, torch.bfloat16]
    assert dtypes() == [torch.float64, torch.float32]


# ---- who keeps what -------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_start_without_any(model, x, copied):
    with torch.no_grad():
        expected = features(model, x)
    size = len(pickle.dumps(ours("BitModel")))
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        data = pickle.dumps(model)
        assert len(data) < 1.1 * size
        twin = pickle.loads(data)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.plans is not model.plans
    assert twin.plans.network is twin
    assert not kept(twin)
    with torch.no_grad():
        convolutions(twin)[0].weight.normal_()
        assert torch.equal(features(model, x), expected)
        assert not torch.equal(features(twin, x), expected)
    assert set(twin.state_dict()) == set(model.state_dict())


def test_kept_weights_are_no_part_of_the_state(model, x):
    names = set(model.state_dict()), {n for n, _ in model.named_parameters()}, set(model._buffers)
    with torch.no_grad():
        features(model, x)
    assert names == (
        set(model.state_dict()), {n for n, _ in model.named_parameters()}, set(model._buffers)
    )  # fmt: skip


def test_tied_weights_are_standardized_once_and_share_their_gradient(model, x, standardized_counts):
    tie_two_weights(model)
    count = len({id(layer.weight) for layer in convolutions(model)})
    assert count == len(convolutions(model)) - 1
    with torch.no_grad():
        expected = features(model, x)
    assert sum(standardized_counts) == count
    with use_backend(weight_standardization="triton"):
        result = features(model, x)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        result.square().sum().backward()
    assert sum(standardized_counts) == 2 * count
    shared = alike(model)[0].weight
    actual = shared.grad.clone()
    model.zero_grad()
    features(model, x).square().sum().backward()
    torch.testing.assert_close(actual, shared.grad, rtol=1e-3, atol=1e-4)


def test_training_standardizes_all_weights_together_where_that_pays(model, x, standardized_counts):
    model.train()
    features(model, x).sum().backward()
    assert standardized_counts == []  # plain PyTorch gains nothing from it
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with use_backend(weight_standardization="triton"):
        features(model, x).sum().backward()
        assert standardized_counts == by_stage(model)
        features(model, x)
        assert standardized_counts == by_stage(model) * 2  # and anew in each forward pass
    assert not kept(model)
    for actual, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, actual, rtol=1e-3, atol=1e-3)


def test_frozen_weights_are_kept_while_others_are_trained(model, x, standardized_counts):
    trained = convolutions(model)[-1]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained.weight.requires_grad_()
    with use_backend(weight_standardization="triton"):
        for _ in range(2):
            features(model, x).square().sum().backward()
    *before, last = by_stage(model)
    assert standardized_counts == [*before, 1, last - 1, 1]
    assert trained.weight.grad is not None


def test_a_backbone_prepares_only_what_it_computes(x, standardized_counts):
    model: BitBackbone = ours("BitBackbone", out_features=["stage1"]).eval()
    with torch.no_grad():
        model(x)
        model(x)
        needed = convolutions(model.bit.embedder) + convolutions(model.bit.encoder.stages[0])
        assert standardized_counts == [len(needed)]
        model(x, output_hidden_states=True)
        model(x)
    assert standardized_counts == [len(needed), len(convolutions(model)) - len(needed)]


def test_layers_whose_weight_comes_later_are_left_to_themselves(model, x):
    """Hooks, parametrizations, pruning and replaced calls decide about a weight when the layer runs."""
    stem, *others = convolutions(model)
    prune.random_unstructured(stem, "weight", amount=0.5)
    first, second = (model.encoder.stages[n].layers[0] for n in (0, 1))
    parametrize.register_parametrization(first.conv1, "weight", Doubled())
    first.conv2.register_forward_pre_hook(turn_round)
    forward = first.conv3.forward
    first.conv3.forward = lambda x: 2 * forward(x)
    parametrize.register_parametrization(second.conv1, "weight", Doubled())
    with torch.no_grad():
        before = features(model, x)
        # A block in which anything is watched is called as it is.
        for layer in others:
            is_kept = layer in convolutions(second) and layer is not second.conv1
            assert (kept_weights.find(layer.weight, form_of(layer, False)) is not None) == is_kept
        assert not torch.equal(features(model, x), before)  # the hook has turned a weight round
        assert torch.equal(features(model, x), before)


def turn_round(layer: nn.Module, _: Any) -> None:
    layer.weight.data.mul_(-1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_functional_calls_see_the_weights_they_are_given(model, x):
    with torch.no_grad():
        before = features(model, x)
        other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        result = torch.func.functional_call(model, other, (x,)).last_hidden_state
        assert not torch.equal(result, before)
        assert torch.equal(features(model, x), before)
        twin = copy.deepcopy(model)
        twin.load_state_dict(other)
        assert torch.equal(features(twin, x), result)


def test_traced_models_hold_their_parameters(model, x):
    with torch.no_grad():
        features(model, x)
        traced = torch.jit.trace(Features(model), x, check_trace=False)
        before = traced(x)
        torch.testing.assert_close(before, features(model, x), rtol=1e-4, atol=1e-4)
        edit_in_place(model)
        assert not torch.equal(traced(x), before), "the weights were baked in"
        torch.testing.assert_close(traced(x), features(model, x), rtol=1e-4, atol=1e-4)


class Features(nn.Module):
    """A model with a tensor for its output, which tracing needs."""

    def __init__(self, model: BitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return features(self.model, x)


def test_threads_share_kept_weights(model, x):
    with torch.no_grad():
        expected = features(model, x)
    model.eval()
    results: list[bool] = []

    def work(_: int) -> None:
        with torch.inference_mode(), use_backend(packed_convolution="reference"):
            for _ in range(5):
                results.append(torch.equal(features(model, x), expected))

    in_threads(work, 4)
    assert results == [True] * 20
    assert len(kept(model)) == len(convolutions(model))


def test_an_error_in_a_forward_pass_leaves_nothing_behind(model, x):
    expected = fresh(model, x)
    with torch.no_grad(), pytest.raises(ValueError, match="pixel_values"):
        model(torch.zeros(1, 4, 32, 32))
    broken = model.encoder.stages[0].layers[0].register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(torch.zeros(1, 3, 32, 32))
    broken.remove()
    with torch.no_grad():
        assert torch.equal(features(model, x), expected)


def test_different_eps_are_respected(model, x):
    layers = convolutions(model)
    layers[0].eps = 0.5
    with torch.no_grad():
        features(model, x)
        for layer in layers[:2]:
            expected = weight_standardization(layer.weight, layer.eps)
            result = kept_weights.find(layer.weight, form_of(layer, False))
            torch.testing.assert_close(result, expected)


def test_the_memory_it_costs_is_one_copy(model, x):
    with torch.no_grad():
        features(model, x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept(model)}
    size = sum(storage.nbytes() for storage in storages.values())
    weights = sum(layer.weight.nbytes for layer in convolutions(model))
    assert weights <= size <= 1.1 * weights


def test_classifier_and_backbone_share_the_mechanism(x):
    for name in ("BitForImageClassification", "BitBackbone"):
        model: BitForImageClassification | BitBackbone = ours(name).eval()
        with torch.no_grad():
            model(x)
        assert len(kept(model)) == len(convolutions(model))
