"""The layers, what transformers' BiT does that one would not guess, and errors that say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.bit import modeling_bit as theirs

from bitfast.blocks import round_to_multiple
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.pooling import MaxPool2d
from tests.model_pairs import (
    CLASSES,
    LAYER_TYPES,
    RELATIVE_FLOAT64,
    assert_close,
    move_weights,
    our_model,
    pair,
    their_model,
)
from tests.operator_calls import OperatorCalls
from tests.weight_changes import convolutions

# ---- single layers ------------------------------------------------------------------------------


@given(width=st.floats(0.5, 5000))
def test_widths_round_as_in_transformers(width):
    assert round_to_multiple(width) == theirs.make_div(width)


@given(
    kernel_size=st.sampled_from([1, 2, 3, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.sampled_from([None, "SAME", "VALID"]),
    height=st.integers(19, 24),
    width=st.integers(19, 24),
    seed=st.integers(0, 2**31 - 1),
)
def test_convolution_equals_transformers(
    kernel_size, stride, dilation, padding, height, width, seed
):
    torch.manual_seed(seed)
    geometry = {"stride": stride, "dilation": dilation, "padding": padding}
    ours = WeightStandardizedConv2d(4, 6, kernel_size, **geometry).double()
    twin = theirs.WeightStandardizedConv2d(4, 6, kernel_size, **geometry).double()
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    assert_close(ours(x), twin(x), RELATIVE_FLOAT64)


def test_convolution_ignores_the_scale_and_shift_of_its_filters():
    layer = WeightStandardizedConv2d(4, 6, 3, eps=1e-8).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7).add_(3)
    # Not quite: eps = 1e-8 stands beside a variance of 1 / (3 * 36), then of 49 times that.
    torch.testing.assert_close(layer(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_new", "selu"])
def test_norm_activates(activation):
    layer = GroupNormActivation(4, 8, activation=activation).double()
    move_weights(layer)
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    normalized = F.group_norm(x, 4, layer.weight, layer.bias, 1e-5)
    functions = {
        "none": lambda v: v,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_new": lambda v: F.gelu(v, approximate="tanh"),
        "selu": F.selu,
    }
    assert_close(layer(x), functions[activation](normalized), RELATIVE_FLOAT64)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("zero_pad", [0, 1])
def test_zeros_around_the_pool_take_part_in_the_maximum(zero_pad, dynamic):
    pool = MaxPool2d(3, 2, use_dynamic_padding=dynamic)
    x = -1 - torch.rand(2, 3, 9, 8)  # all negative: a zero wins wherever a window holds one
    y = pool.with_zeros(x, zero_pad)
    ones = F.pad(torch.ones_like(x), (zero_pad,) * 4)
    if dynamic:  # TensorFlow's rule for a window of 3 with stride 2
        rows, columns = ((-(-n // 2) - 1) * 2 + 3 - n for n in ones.shape[2:])
        ones = F.pad(ones, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    inside = -F.max_pool2d(-ones, 3, 2)  # 1 where no pixel of the window is padding
    assert y.shape == inside.shape
    assert torch.equal(y == 0, inside == 0)
    assert (zero_pad or dynamic) == bool((y == 0).any())


# ---- what transformers does ---------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "same"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_preactivation_ignores_dilation_and_bottleneck_does_not(output_stride, padding):
    # The first block of a stage has half the dilation of the others.
    changes = {
        "output_stride": output_stride,
        "global_padding": padding,
        "depths": [1, 1, 2, 2],
    }
    dilations = {}
    for layer_type in LAYER_TYPES:
        ours, twin = pair("BitBackbone", layer_type=layer_type, **changes, out_indices=[1, 2, 3, 4])
        geometry = [
            [
                (m.stride, m.dilation, m.padding, m.kernel_size)
                for m in model.modules()
                if isinstance(m, nn.Conv2d)
            ]
            for model in (ours, twin)
        ]
        assert geometry[0] == geometry[1]
        dilations[layer_type] = {dilation[0] for _, dilation, _, _ in geometry[0]}
        maps = ours(torch.randn(1, 3, 64, 64)).feature_maps
        assert [64 // m.shape[2] for m in maps] == [4, 8, min(16, output_stride), output_stride]
    assert dilations["preactivation"] == {1}
    assert dilations["bottleneck"] == ({1, 2} if output_stride == 16 else {1, 2, 4})


@pytest.mark.parametrize("padding", [None, "same"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_the_stem_pads_norms_and_pools_in_the_order_of_transformers(layer_type, padding):
    ours, twin = pair("BitModel", layer_type=layer_type, global_padding=padding)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stem = ours.double().embedder
    expected = twin.double().embedder(x)
    assert_close(stem(x), expected, RELATIVE_FLOAT64)
    # By hand: seven rows, the zeros, the norm where there is one, the pool.
    y = stem.convolution(x)
    y = y if padding == "same" else F.pad(y, (1, 1, 1, 1))
    if layer_type == "bottleneck":
        y = F.relu(F.group_norm(y, 4, stem.norm.weight, stem.norm.bias, 1e-5))
    assert_close(F.max_pool2d(y, 3, 2), expected, RELATIVE_FLOAT64)


@pytest.mark.parametrize("name", CLASSES)
def test_hidden_states_come_before_the_final_norm(name):
    model = our_model(name)
    move_weights(model)
    output = model(torch.randn(2, 3, 33, 47), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    inner = getattr(model, "bit", model)
    last_hidden_state = inner.norm(output.hidden_states[-1])
    assert not torch.equal(last_hidden_state, output.hidden_states[-1])
    pooled = last_hidden_state.mean((2, 3))
    if name == "BitModel":
        torch.testing.assert_close(output.last_hidden_state, last_hidden_state)
        torch.testing.assert_close(output.pooler_output[:, :, 0, 0], pooled)
    elif name == "BitForImageClassification":
        torch.testing.assert_close(output.logits, model.classifier[1](pooled))
    else:
        assert output.feature_maps[0] is output.hidden_states[-1]


@pytest.mark.parametrize(
    ("choice", "computed"),
    [(["stem"], 0), (["stage2"], 2), (["stem", "stage3"], 3), (["stage4"], 4)],
)
def test_a_backbone_computes_no_stage_that_nobody_asked_for(choice, computed):
    model = our_model("BitBackbone", out_features=choice)
    per_stage = [len(convolutions(stage)) for stage in model.bit.encoder.stages]
    images = torch.randn(1, 3, 32, 32)
    for stages, options in ((computed, {}), (len(per_stage), {"output_hidden_states": True})):
        with OperatorCalls() as calls:
            model(images, **options)
        assert calls.noted.count("aten.convolution.default") == 1 + sum(per_stage[:stages])


def test_a_backbone_computes_what_somebody_watches():
    model = our_model("BitBackbone", out_features=["stage1"])
    calls = []
    watched = (*model.bit.encoder.stages, model.bit.norm, model.bit.pooler)
    for module in watched:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.randn(1, 3, 32, 32))
    assert calls == list(watched)


# ---- errors -------------------------------------------------------------------------------------

BAD_IMAGES = {
    "wrong channels": (
        torch.zeros(2, 4, 32, 32),
        ValueError,
        r"pixel_values must have shape \(batch, 3, height, width\).*got \(2, 4, 32, 32\)",
    ),
    "HWC": (torch.zeros(2, 32, 32, 3), ValueError, r"got \(2, 32, 32, 3\)"),
    "one image": (torch.zeros(3, 32, 32), ValueError, r"got \(3, 32, 32\)"),
    "five axes": (torch.zeros(1, 3, 2, 32, 32), ValueError, r"got \(1, 3, 2, 32, 32\)"),
    "no rows": (torch.zeros(1, 3, 0, 32), ValueError, "at least 1 pixels high and wide"),
    "numpy": (torch.zeros(1, 3, 32, 32).numpy(), TypeError, r"torch\.Tensor, got ndarray"),
    "list": ([[0.0]], TypeError, r"torch\.Tensor, got list"),
    "bytes": (
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        TypeError,
        r"float32; got torch\.uint8",
    ),
    "float64": (torch.zeros(1, 3, 32, 32).double(), TypeError, r"float32; got torch\.float64"),
    "bfloat16": (torch.zeros(1, 3, 32, 32).bfloat16(), TypeError, r"float32; got torch\.bfloat16"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("name", CLASSES)
def test_bad_images_are_refused(name, case):
    images, error, message = BAD_IMAGES[case]
    with pytest.raises(error, match=message):
        our_model(name)(images)


def test_bytes_are_refused_under_autocast_too():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"got torch\.uint8"):
            our_model("BitModel")(images)
        our_model("BitModel")(images.bfloat16())


def test_missing_images_are_named():
    with pytest.raises(ValueError, match="pixel_values must be given"):
        our_model("BitForImageClassification")()


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize(
    ("settings", "smallest"),
    [
        ({}, 1),
        ({"embedding_dynamic_padding": True}, 1),
        ({"global_padding": "same"}, 5),
        ({"global_padding": "same", "embedding_dynamic_padding": True}, 1),
        ({"global_padding": "valid"}, 7),
    ],
    ids=str,
)
def test_images_that_are_too_small_are_refused(settings, smallest, layer_type):
    # Without stages: those of global_padding="valid" need more, which the next test is about.
    settings = {"layer_type": layer_type, "depths": [0], "hidden_sizes": [8], **settings}
    ours, twin = our_model("BitModel", **settings), their_model("BitModel", **settings)
    twin.load_state_dict(ours.state_dict())
    for size in [(smallest, 40), (40, smallest), (smallest, smallest)]:
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        assert_close(ours.double()(images), twin.double()(images), RELATIVE_FLOAT64)
    for size in [(smallest - 1, 40), (40, smallest - 1)]:
        images = torch.zeros(1, 3, *size, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"at least {smallest} pixels high and wide"):
            ours(images)
        with pytest.raises(RuntimeError):
            twin(images)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("size", [19, 32, 64])
def test_valid_padding_says_why_it_cannot_run(size, layer_type):
    settings = {"layer_type": layer_type, "global_padding": "valid"}
    images = torch.zeros(1, 3, size, size)
    with pytest.raises(ValueError, match="global_padding='valid' 3x3 convolutions lose the border"):
        our_model("BitModel", **settings)(images)
    with pytest.raises(RuntimeError, match="must match"):
        their_model("BitModel", **settings)(images)


# ---- the arguments of torch's own layers ------------------------------------------------------------

CONVOLUTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((8, 8, (3, 3), (1, 1), (1, 1)), {"bias": False}),  # as PEFT calls it
    ((8, 8, 1), {"bias": False}),
    ((8, 8, 3, 2, 1, 1, 4, True), {}),
    ((8, 8, (3, 1), (1, 2), "same", (2, 1)), {"groups": 2}),
    ((8, 8, 3), {"stride": 2, "padding": None, "bias": True, "eps": 1e-3}),
]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("arguments", "options"), CONVOLUTIONS)
def test_convolution_takes_the_arguments_of_torch_and_transformers(arguments, options, gradients):
    ours = WeightStandardizedConv2d(*arguments, **options).double().eval()
    twin = theirs.WeightStandardizedConv2d(*arguments, **options).double()
    twin.load_state_dict(ours.state_dict())
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(2, 8, 11, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(gradients):
            actual, expected = ours.to(dtype)(x), twin.to(dtype)(x)
        if dtype == torch.float64:
            assert_close(actual, expected, RELATIVE_FLOAT64)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_that_is_changed_afterwards_does_as_it_is_told():
    """Networks are made denser this way: strides become dilations."""
    ours = WeightStandardizedConv2d(16, 16, 3, 2, None, eps=1e-8).eval()
    twin = theirs.WeightStandardizedConv2d(16, 16, 3, 2, None, eps=1e-8).eval()
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x), rtol=1e-4, atol=1e-4)
        for layer in (ours, twin):
            layer.stride, layer.padding, layer.dilation = (1, 1), (2, 2), (2, 2)
        assert ours(x).shape == x.shape
        torch.testing.assert_close(ours(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["reflect", "", "full"])
def test_unknown_padding_is_refused(padding):
    with pytest.raises(ValueError, match=f"padding must be None, 'same', 'valid'.*got '{padding}'"):
        WeightStandardizedConv2d(3, 4, 3, padding=padding)


@pytest.mark.parametrize("affine", [True, False])
def test_norm_takes_the_arguments_of_torch(affine):
    ours, twin = GroupNormActivation(4, 8, 1e-3, affine), nn.GroupNorm(4, 8, 1e-3, affine)
    x = torch.randn(2, 8, 5, 3)
    torch.testing.assert_close(ours(x), twin(x))
    assert list(ours.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"stride": 1, "ceil_mode": True},
        {"dilation": 2},
        {"return_indices": True},
    ],
)
def test_pool_takes_the_arguments_of_torch(options, dynamic):
    x = torch.randn(2, 4, 11, 12)
    pool = MaxPool2d(3, **options, use_dynamic_padding=dynamic)
    twin = nn.MaxPool2d(3, **options)
    actual, expected = pool(x), twin(pool.pad(x))
    if "return_indices" not in options:
        actual, expected = [actual], [expected]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
