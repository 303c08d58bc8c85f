"""The accuracy contract on whole models; dtypes, autocast, memory formats, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model_pairs import (
    CLASSES,
    LAYER_TYPES,
    RELATIVE_FLOAT64,
    assert_close,
    flatten,
    gradients,
    our_model,
    pair,
)
from tests.tolerances import Triples, assert_draws_within_contract, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = {"num_labels": 200, "out_indices": [0, 1, 2, 3, 4]}
DRAWS = 3
"""Models whose errors are judged together."""


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(images, output_hidden_states=True))


def numbered(*results: list[Tensor]) -> Triples:
    """Name the outputs of bitfast, plain PyTorch and float64 by their numbers."""
    return {f"output {n}": triple for n, triple in enumerate(zip(*results, strict=True))}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("padding", [None, "same"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_within_the_contract(dtype, padding, layer_type, name):
    def draw():
        ours, theirs = pair(name, layer_type=layer_type, global_padding=padding, **MANY)
        ours.to(dtype).eval(), theirs.to(dtype).eval()
        images = torch.randn(6, 3, 64, 50).to(dtype)
        actual, plain = outputs(ours, images), outputs(theirs, images)
        return numbered(actual, plain, outputs(theirs.double(), images.double()))

    assert_draws_within_contract(draw, DRAWS)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_errors_under_autocast_are_within_the_contract(layer_type, name):
    def draw():
        ours, theirs = (model.eval() for model in pair(name, layer_type=layer_type, **MANY))
        images = torch.randn(6, 3, 64, 50)
        with torch.autocast("cpu", torch.bfloat16):
            actual, plain = outputs(ours, images), outputs(theirs, images)
        assert all(tensor.dtype == torch.bfloat16 for tensor in actual)
        # transformers leaves GroupNorm's results in float32. Ours are judged as if they were so too.
        actual = [a.to(p.dtype) for a, p in zip(actual, plain, strict=True)]
        return numbered(actual, plain, outputs(theirs.double(), images.double()))

    assert_draws_within_contract(draw, DRAWS)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_training_under_autocast(layer_type):
    ours, theirs = pair("BitForImageClassification", layer_type=layer_type, hidden_act="gelu")
    images, labels = torch.randn(4, 3, 64, 50), torch.randint(5, (4,))
    exact = copy.deepcopy(theirs).double()

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            return model(images.to(model.dtype), labels).loss

    actual, plain, expected = (gradients(m, loss) for m in (ours, theirs, exact))
    assert list(actual) == list(expected)
    ratios = []
    for name, gradient in expected.items():
        assert actual[name].dtype == torch.float32
        error, allowed = (relative_error(g[name], gradient) for g in (actual, plain))
        ratios.append(error / allowed)
    # In the mean over the parameters, as factors: one parameter's errors are a few random numbers.
    assert torch.tensor(ratios).log().mean().exp() <= 2
    assert max(ratios) < 20  # none is lost


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_converted_model_takes_and_returns_its_dtype(name, dtype):
    model = our_model(name).to(dtype)
    assert model.dtype == dtype
    tensors = outputs(model, torch.randn(2, 3, 33, 47).to(dtype))
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


# ---- memory formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["images", "model", "both"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("padding", [None, "same"])
def test_channels_last_gives_the_same_numbers_in_channels_last(padding, layer_type, convert):
    changes = {"global_padding": padding, "embedding_dynamic_padding": padding == "same"}

    def run(dtype=torch.float32):
        model = our_model("BitModel", layer_type=layer_type, **changes).to(dtype).eval()
        images = torch.randn(2, 3, 64, 50, dtype=dtype)
        plain = outputs(model, images)
        exact = outputs(copy.deepcopy(model).double(), images.double())
        if convert in ("model", "both"):
            model.to(memory_format=torch.channels_last)
        if convert in ("images", "both"):
            images = images.contiguous(memory_format=torch.channels_last)
        actual = outputs(model, images)
        last_hidden_state, _, *hidden_states = actual
        for tensor in (last_hidden_state, *hidden_states):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        return actual, plain, exact

    actual, expected, _ = run(torch.float64)
    assert_close(actual, expected, RELATIVE_FLOAT64)
    assert_draws_within_contract(lambda: numbered(*run()), DRAWS)


def test_nchw_stays_nchw():
    last_hidden_state, _, *hidden_states = outputs(our_model("BitModel"), torch.randn(2, 3, 64, 50))
    for tensor in (last_hidden_state, *hidden_states):
        assert tensor.is_contiguous()


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_channels_last_gives_the_same_gradients(layer_type):
    model = our_model("BitForImageClassification", layer_type=layer_type).double()
    images, labels = torch.randn(2, 3, 64, 50, dtype=torch.float64), torch.tensor([3, 1])
    expected = gradients(model, lambda m: m(images, labels).loss)
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    actual = gradients(model, lambda m: m(images, labels).loss)
    for name in expected:
        assert_close(actual[name], expected[name], RELATIVE_FLOAT64, name)


VIEWS: dict[str, Any] = {
    "sliced": lambda x: x[:, :, 3:36, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "from HWC": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "channels taken out of more": lambda x: torch.cat([x, x], 1)[:, 2:5],
    "one image repeated": lambda x: x[:1].expand(4, -1, -1, -1),
    "reversed": lambda x: x.flip(1),
}


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_images_may_be_views(view, layer_type):
    changes = {"global_padding": "same", "embedding_dynamic_padding": True}
    model = our_model("BitForImageClassification", layer_type=layer_type, **changes).double()
    images = VIEWS[view](torch.randn(2, 3, 40, 66, dtype=torch.float64))
    assert_close(
        outputs(model, images), outputs(model, images.clone().contiguous()), RELATIVE_FLOAT64
    )


# ---- copies -------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def loaded_from_state(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(torch.load(stream, weights_only=True))
    return twin.train(model.training)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
        loaded_from_state,
    ],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_is_the_same_and_independent(name, duplicate):
    model = our_model(name, drop_path_rate=0.3).eval()
    images = torch.randn(2, 3, 33, 47)
    expected = outputs(model, images)
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert not twin.training
    assert twin.config == model.config
    assert twin.config is not model.config
    for a, e in zip(outputs(twin, images), expected, strict=True):
        assert torch.equal(a, e)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for a, e in zip(outputs(model, images), expected, strict=True):
        assert torch.equal(a, e)


def test_a_change_of_any_weight_shows():
    # Nothing of a weight may outlive it: not in this pass, not in a cache from the pass before.
    model = our_model("BitForImageClassification", layer_type="bottleneck").eval()
    images = torch.randn(2, 3, 33, 47)
    for name, parameter in model.named_parameters():
        before = outputs(model, images)[0]
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(outputs(model, images)[0], before), name
