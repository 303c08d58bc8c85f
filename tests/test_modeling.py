"""The models against transformers': every documented setting, the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

import bitfast.modeling
from bitfast.configuration import BitConfig
from bitfast.network import drop_path_rates
from tests.model_pairs import (
    CLASSES,
    DPT_HYBRID,
    LAYER_TYPES,
    RELATIVE_FLOAT64,
    assert_as_exact,
    assert_as_transformers,
    assert_close,
    concatenate,
    flatten,
    gradients,
    images_without_kinks,
    our_model,
    pair,
    their_model,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "selu": {"hidden_act": "selu"},
    "same": {"global_padding": "same"},
    "SAME, dynamic stem": {"global_padding": "SAME", "embedding_dynamic_padding": True},
    "dynamic stem": {"embedding_dynamic_padding": True},
    "one group": {"num_groups": 1},
    # Groups of one channel and four pixels would amplify rounding tenfold, in transformers as well.
    "one channel per group": {
        "num_groups": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "output_stride": 8,
    },
    # Second blocks, because the first one of a stage has half the dilation of the others.
    "output stride 8": {"output_stride": 8, "depths": [1, 1, 2, 2]},
    "output stride 16": {"output_stride": 16, "depths": [1, 1, 2, 2]},
    "output stride 8, same": {
        "output_stride": 8,
        "depths": [1, 1, 2, 2],
        "global_padding": "same",
    },
    "output stride 4": {"output_stride": 4, "hidden_sizes": [16, 16, 24, 24]},
    "grey": {"num_channels": 1},
    "four channels": {"num_channels": 4},
    "wide stem": {"embedding_size": 24},
    "one stage": {"depths": [2], "hidden_sizes": [16]},
    "five stages": {"depths": [1] * 5, "hidden_sizes": [16, 32, 48, 64, 64]},
    "an empty stage": {"depths": [1, 0, 1], "hidden_sizes": [16, 16, 32]},
    "more depths than sizes": {"depths": [1, 2, 1], "hidden_sizes": [16, 32]},
}
SHAPES = [(3, 33, 47), (1, 64, 50)]


@pytest.fixture(autouse=True)
def their_selu(monkeypatch):
    """Give transformers' table the activation that its documentation lists and it lacks."""
    monkeypatch.setitem(ACT2FN, "selu", nn.SELU)


def test_their_table_lacks_selu(monkeypatch):
    monkeypatch.delitem(ACT2FN, "selu")
    with pytest.raises(KeyError, match="selu"):
        their_model("BitModel", hidden_act="selu")


# ---- outputs and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("case", SETTINGS)
def test_equals_transformers(case, layer_type, shape):
    changes = {"layer_type": layer_type, **SETTINGS[case]}
    ours, theirs = pair("BitForImageClassification", **changes)
    batch, *size = shape
    channels = theirs.config.num_channels
    images = images_without_kinks(copy.deepcopy(theirs).double(), batch, channels, *size)
    labels = torch.randint(theirs.num_labels, (batch,))

    def run(model):
        return model(images.to(model.dtype), labels=labels, output_hidden_states=True)

    def backward(model):
        return gradients(model, lambda m: run(m).loss)

    @torch.no_grad()
    def infer(model):
        return run(copy.deepcopy(model).eval())

    assert_as_transformers(ours, theirs, run)
    assert_as_transformers(ours, theirs, infer)
    assert_as_transformers(ours, theirs, backward)
    assert_as_transformers(ours, theirs, lambda m: concatenate(backward(m)))


@pytest.mark.parametrize("name", ["BitModel", "BitBackbone"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_the_other_classes_equal_transformers(layer_type, name):
    ours, theirs = pair(name, layer_type=layer_type, out_features=["stem", "stage2", "stage3"])
    images = images_without_kinks(copy.deepcopy(theirs).double(), 3, 3, 41, 70)
    expected = theirs(images)
    weights = [torch.randn_like(value) for value in flatten(expected)]

    def run(model, **options):
        return model(images.to(model.dtype), **options)

    def objective(model):
        return sum((w * v).sum() for w, v in zip(weights, flatten(run(model)), strict=True))

    assert_as_transformers(ours, theirs, run)
    assert_as_transformers(ours, theirs, lambda m: run(m, output_hidden_states=True))
    assert_as_transformers(ours, theirs, lambda m: concatenate(gradients(m, objective)))


@pytest.mark.parametrize("name", CLASSES)
def test_the_dpt_hybrid_equals_transformers(name):
    changes = {**DPT_HYBRID, "depths": [1, 2, 3]}  # four hidden sizes, of which three are used
    if name == "BitForImageClassification":
        changes["hidden_sizes"] = [16, 32, 48]  # with four, transformers' head has the wrong width
    ours, theirs = pair(name, **changes)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 50, 61)

    @torch.no_grad()
    def run(model):
        return model(images.to(model.dtype), output_hidden_states=True)

    assert_as_transformers(ours.eval(), theirs.eval(), run)
    assert len(run(ours).hidden_states) == 4


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("size", [(15, 18), (16, 16), (18, 17)])
def test_valid_padding_equals_transformers_where_that_runs(size, layer_type):
    # Without padding a 3x3 convolution leaves 1 pixel of 3, which is broadcast onto the shortcut; stages
    # without blocks keep their input. Other sizes do not fit, there and here (tests/test_layers.py).
    changes = {"layer_type": layer_type, "global_padding": "valid", "depths": [1, 1]}
    models = pair("BitForImageClassification", **changes, hidden_sizes=[16, 32])
    ours, theirs = (model.double() for model in models)
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2])
    # One pixel and two channels per group magnify rounding a thousandfold; hence only in float64.
    bound = 1000 * RELATIVE_FLOAT64
    assert_close(ours(images, labels, True), theirs(images, labels, True), bound)
    actual, expected = (gradients(m, lambda m: m(images, labels).loss) for m in (ours, theirs))
    for name in expected:
        assert_close(actual[name], expected[name], bound, name)


@settings(max_examples=40)
@given(
    height=st.integers(5, 70),
    width=st.integers(5, 70),
    batch=st.integers(0, 2),
    layer_type=st.sampled_from(LAYER_TYPES),
    padding=st.sampled_from([None, "same"]),
    dynamic=st.booleans(),
    output_stride=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_image_size(height, width, batch, layer_type, padding, dynamic, output_stride, seed):
    torch.manual_seed(seed)
    changes = {
        "depths": [1, 1, 2, 2],
        "layer_type": layer_type,
        "global_padding": padding,
        "embedding_dynamic_padding": dynamic,
        "output_stride": output_stride,
        "out_indices": [0, 1, 2, 3, 4],
    }
    ours, theirs = (model.double().eval() for model in pair("BitBackbone", **changes))
    images = torch.randn(batch, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        # A group of two channels and one pixel is (1, -1) whatever its values, if they differ by more
        # than the square root of eps = 1e-5; below, they are magnified by up to 1 / sqrt(eps) = 316.
        assert_close(ours(images), theirs(images), 316 * RELATIVE_FLOAT64)


R50X1 = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "num_groups": 32,
    "num_labels": 1000,
}


def test_r50x1_equals_transformers():
    ours, theirs = pair("BitForImageClassification", **R50X1)
    exact = copy.deepcopy(theirs).double()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_as_exact(
            *(
                m.eval()(images.to(m.dtype), output_hidden_states=True)
                for m in (ours, theirs, exact)
            )
        )


def test_the_gradients_of_r50x1_are_those_of_transformers():
    # Of a million pre-activations some are always near the kink of a ReLU; gelu has none.
    ours, theirs = pair("BitForImageClassification", **R50X1, hidden_act="gelu")
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 999])
    exact = copy.deepcopy(theirs).double()
    actual, plain = (gradients(m, lambda m: m(images, labels).loss) for m in (ours, theirs))
    expected = gradients(exact, lambda m: m(images.double(), labels).loss)
    assert_as_exact(actual, plain, expected)


# ---- width_factor -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("width_factor", [3, 0.5, 1.5])
def test_width_factor_equals_wide_stages(width_factor, layer_type):
    sizes = [32, 64, 96, 128]
    common = {"embedding_size": 24, "layer_type": layer_type}  # the factor leaves the stem alone
    by_factor = our_model(
        "BitForImageClassification", width_factor=width_factor, hidden_sizes=sizes, **common
    )
    by_size = our_model(
        "BitForImageClassification",
        hidden_sizes=[int(width_factor * size) for size in sizes],
        **common,
    )
    by_size.load_state_dict(by_factor.state_dict())
    images = torch.randn(2, 3, 64, 50)
    with torch.no_grad():
        actual, expected = (m(images, output_hidden_states=True) for m in (by_factor, by_size))
    for a, e in zip(flatten(actual), flatten(expected), strict=True):
        assert torch.equal(a, e)
    assert actual.logits.shape == (2, 5)


@pytest.mark.parametrize("width_factor", [3, 0.5, 1.5])
def test_width_factor_equals_transformers_where_that_runs(width_factor):
    ours, theirs = pair("BitModel", layer_type="bottleneck", width_factor=width_factor)
    images = torch.randn(2, 3, 64, 50)
    with torch.no_grad():
        assert_as_transformers(ours, theirs, lambda m: m(images.to(m.dtype)))


def test_width_factor_fails_in_transformers_with_preactivation():
    with pytest.raises(RuntimeError):
        their_model("BitModel", width_factor=3)(torch.randn(1, 3, 32, 32))


def test_the_released_r50x3_is_width_factor_3():
    sizes = {"embedding_size": 64 * 3, "num_labels": 1000}
    wide = [3 * size for size in (256, 512, 1024, 2048)]
    with torch.device("meta"):  # the whole networks, 217 million weights, drawn once and shared
        by_factor, by_size = (
            bitfast.modeling.BitForImageClassification(BitConfig(**sizes, **widths)).eval()
            for widths in ({"width_factor": 3}, {"hidden_sizes": wide})
        )
        theirs = their_model(
            "BitForImageClassification", **{**R50X1, **sizes, "hidden_sizes": wide}
        )
    weights = {name: torch.empty(p.shape) for name, p in theirs.state_dict().items()}
    for weight in weights.values():
        weight.uniform_(-0.05, 0.05)
    images = torch.randn(1, 3, 33, 32)
    for model in (by_factor, by_size):
        model.load_state_dict(weights, assign=True)
        assert model.num_parameters() == 217_319_080
    with torch.no_grad():
        assert torch.equal(by_factor(images).logits, by_size(images).logits)


# ---- initialisation and construction ------------------------------------------------------------


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_equal_seeds_give_the_initial_weights_of_transformers(name, layer_type, seed):
    models = []
    for build in (our_model, their_model):
        torch.manual_seed(seed)
        models.append(build(name, layer_type=layer_type))
    actual, expected = (model.state_dict() for model in models)
    assert list(actual) == list(expected)
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    assert all(model.training for model in models)


def test_initial_weights_have_the_distribution_of_the_method():
    model = our_model("BitForImageClassification", hidden_sizes=[64, 128, 256, 512], num_labels=100)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            count = module.weight.numel()
            scaled = module.weight * (fan_out / 2) ** 0.5  # standard normal
            assert abs(scaled.mean()) < 5 / count**0.5, name
            assert abs(scaled.square().mean() - 1) < 5 * (2 / count) ** 0.5, name
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for tensor in (module.weight, module.bias):
                assert 0.9 * bound < tensor.abs().max() <= bound
        elif isinstance(module, nn.GroupNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


@settings(max_examples=50)
@given(
    rate=st.floats(0, 1, exclude_max=True),
    depths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
def test_drop_path_rates_are_those_of_transformers(rate, depths):
    # Width 8 and few groups: the rates need blocks, not channels.
    sizes = [8] * len(depths)
    config = {"depths": depths, "hidden_sizes": sizes, "drop_path_rate": rate, "num_groups": 1}
    encoder = transformers.models.bit.modeling_bit.BitEncoder(transformers.BitConfig(**config))
    expected = [
        [getattr(layer.drop_path, "drop_prob", 0.0) for layer in stage.layers]
        for stage in encoder.stages
    ]
    assert drop_path_rates(BitConfig(**config)) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_takes_the_configuration_of_transformers(name):
    theirs = their_model(name, global_padding="same", num_labels=7, my_key=3)
    ours = getattr(bitfast.modeling, name)(theirs.config)
    assert isinstance(ours.config, BitConfig)
    assert ours.config.my_key == 3
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(TypeError, match="config must be a BitConfig, got dict"):
        getattr(bitfast.modeling, name)({"depths": [1]})


@pytest.mark.parametrize("name", CLASSES)
def test_has_the_attributes_of_transformers(name):
    ours, theirs = pair(name)
    for attribute in (
        "base_model_prefix",
        "main_input_name",
        "dtype",
        "device",
        "name_or_path",
        "training",
        "is_gradient_checkpointing",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.num_parameters() == theirs.num_parameters()
    ours.requires_grad_(False), theirs.requires_grad_(False)
    next(ours.parameters()).requires_grad_(), next(theirs.parameters()).requires_grad_()
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters()
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.base_model is getattr(ours, "bit", ours)
    assert (theirs.base_model is theirs) == (ours.base_model is ours)
    assert ours.half().dtype == torch.float16
    inner = getattr(ours, "bit", None)
    assert inner is None or inner.config is ours.config


# ---- BitBackbone --------------------------------------------------------------------------------

CHOICES = [
    {},
    {"out_features": ["stem"]},
    {"out_features": ["stage1", "stage4"]},
    {"out_features": ["stem", "stage1", "stage2", "stage3", "stage4"]},
    {"out_indices": [0]},
    {"out_indices": (1, 3)},
    {"out_indices": [-1]},
    {"out_indices": [1, -2, -1]},
    {"out_features": ["stage2"], "out_indices": [2]},
    {"depths": [1, 1, 1]},
    {"depths": [1, 1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64, 64], "out_indices": [-2]},
]


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_backbone_returns_the_chosen_stages(choice, layer_type):
    changes = {"layer_type": layer_type, **choice}
    if layer_type == "preactivation" and len(choice.get("depths", [1] * 4)) == 3:
        changes["hidden_sizes"] = [16, 32, 48]  # with four, transformers' final norm cannot run
    ours, theirs = (model.double().eval() for model in pair("BitBackbone", **changes))
    assert_same_description(ours, theirs)
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
        assert_close(actual, expected)
        everything = ours(images, output_hidden_states=True)
        assert_close(everything, theirs(images, output_hidden_states=True))
        filtered = ours.forward_with_filtered_kwargs(images, output_attentions=True)
    assert isinstance(actual.feature_maps, tuple)
    assert [tensor.shape[1] for tensor in actual.feature_maps] == ours.channels
    assert_close(filtered, actual, 0.0)


def assert_same_description(ours: Any, theirs: Any) -> None:
    for attribute in (
        "stage_names",
        "out_features",
        "out_indices",
        "num_features",
        "out_feature_channels",
        "channels",
        "has_attentions",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute


def test_a_backbone_can_be_told_to_return_other_stages():
    ours, theirs = pair("BitBackbone")
    twin = bitfast.modeling.BitBackbone(ours.config)
    for model in (ours, theirs):
        model.out_features = ["stem", "stage2"]
    assert_same_description(ours, theirs)
    assert len(ours(torch.randn(1, 3, 32, 32)).feature_maps) == 2
    for model in (ours, theirs):
        model.out_indices = [1, -1]
    assert_same_description(ours, theirs)
    # The choice is the model's: neither the configuration nor another model that has it follows.
    assert ours.config.out_features == theirs.config.out_features == ["stage4"]
    assert twin.out_features == ["stage4"]


@pytest.mark.parametrize(
    "choice",
    [
        {"out_features": ["stage5"]},
        {"out_features": ["stage2", "stage1"]},
        {"out_features": ["stage1", "stage1"]},
        {"out_features": ("stage1",)},
        {"out_indices": [5]},
        {"out_indices": [-6]},
        {"out_indices": [2, 1]},
        {"out_indices": [1, 1]},
        {"out_indices": [4, -1]},
        {"out_features": ["stage1"], "out_indices": [2]},
        {"out_features": ["stage1", "stage2"], "out_indices": [1]},
    ],
    ids=str,
)
def test_impossible_choices_fail_as_in_transformers(choice):
    for build in (our_model, their_model):
        too_low = build is their_model and choice == {"out_indices": [-6]}
        with pytest.raises(
            IndexError if too_low else ValueError,
            match="out of range" if too_low else r"out_features|out_indices",
        ):
            build("BitBackbone", **choice)
    if len(choice) == 1:
        ((attribute, value),) = choice.items()
        for build in (our_model, their_model):
            model = build("BitBackbone")
            with pytest.raises((ValueError, IndexError)):
                setattr(model, attribute, value)
            assert model.out_features == ["stage4"]


def test_a_stage_without_a_hidden_size_cannot_be_chosen():
    changes = {"depths": [1, 1, 1], "hidden_sizes": [16, 32]}
    with pytest.raises(ValueError, match=r"out_features .*'stage2'\], got 'stage3'"):
        our_model("BitBackbone", **changes)
    models = pair("BitBackbone", **changes, out_features=["stage1", "stage2"])
    ours, theirs = (model.double() for model in models)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert_close(ours(images), theirs(images))
    assert ours.channels == [16, 32]
