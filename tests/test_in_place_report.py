"""What accelerate says it replaced, what it left and why, and what it refuses."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bitfast
from bitfast.blocks import BitBottleneckLayer, BitPreActivationBottleneckLayer
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from tests.foreign_models import ALL, timm_resnet
from tests.model_pairs import assert_close, flatten, our_model, their_model
from tests.test_in_place import anatomy, results

RELEASED = [
    *timm.list_models("resnetv2_*_bit"),
    *(
        name for name in timm.list_models("vit_*_r*_s*") if "resnet" not in name
    ),  # which is another one
]


def accelerate_to_the_same(model: nn.Module, images: Tensor) -> bitfast.AccelerationReport:
    """Accelerate a model, and hold it to the numbers that it gave before."""
    expected = results(model, images)
    report = bitfast.accelerate(model)
    assert_close(results(model, images), expected)
    return report


def kinds(report: bitfast.AccelerationReport) -> Counter[str]:
    return Counter(text.partition(" -> ")[2] for text in report.replaced.values())


@pytest.mark.parametrize("name", RELEASED)
def test_of_released_models_of_timm_nothing_is_left(name):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=None) if "vit" in name else timm.create_model(name)
    report = bitfast.accelerate(model)
    assert report.left == {}
    assert not any("StdConv" in type(module).__name__ for module in model.modules())
    assert kinds(report)["WeightStandardizedConv2d"] >= 26 or "vit_tiny" in name


def test_all_released_models_of_timm_are_covered():
    assert len(RELEASED) >= 6 + 9


@pytest.mark.parametrize("features_only", [False, True])
def test_a_released_model_is_replaced_whole(features_only):
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit", features_only=features_only)
    report = bitfast.accelerate(model)
    assert report.left == {}
    expected = {
        "WeightStandardizedConv2d": 53,
        "TimmGroupNormActivation": 48 + (not features_only),
        "BitPreActivationBottleneckLayer": 16,
        "BitDownsampleConv": 4,
        "TimmStage": 4,
    }
    whole = {"FeatureListNet": 1} if features_only else {"ResNetV2": 1, "TimmStem": 1}
    expected |= {"MaxPool2d": 1} | whole
    assert kinds(report) == expected


@pytest.mark.parametrize(
    ("build", "convolutions"),
    [
        (
            lambda: transformers.AutoBackbone.from_config(
                transformers.TimmBackboneConfig(
                    backbone="resnetv2_50x1_bit", use_pretrained_backbone=False, out_indices=(1, 4)
                )
            ),
            53,
        ),
        (
            lambda: transformers.TimmWrapperForImageClassification(
                transformers.TimmWrapperConfig(architecture="resnetv2_101x1_bit", num_labels=10)
            ),
            104,
        ),
    ],
    ids=["TimmBackbone", "TimmWrapper"],
)
def test_a_model_of_timm_inside_one_of_transformers(build, convolutions):
    with torch.device("meta"):
        model = build()
    report = bitfast.accelerate(model)
    assert report.left == {}
    assert kinds(report)["WeightStandardizedConv2d"] == convolutions


def test_the_report_names_and_counts():
    model = ALL["DPT-hybrid"].model()
    report = bitfast.accelerate(model)
    prefix = "dpt.embeddings.backbone.bit"
    convolution = f"{prefix}.encoder.stages.1.layers.0.conv2"
    assert report.replaced[convolution] == (
        "transformers's WeightStandardizedConv2d -> WeightStandardizedConv2d"
    )
    assert type(model.get_submodule(convolution)) is WeightStandardizedConv2d
    assert all(name.startswith(prefix) for name in report.replaced)
    assert report.left == {}
    total = len(list(model.named_modules()))
    assert report.others == total - len(list(model.get_submodule(prefix).modules()))
    text = str(report)
    assert f"{len(report.replaced)} modules are bitfast's now" in text
    assert "4 x transformers's BitBottleneckLayer -> BitBottleneckLayer" in text
    assert f"{report.others} other modules are no part of a BiT" in text


# ---- what is left ---------------------------------------------------------------------------------


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def replace_forward(model: Any) -> None:
    layer = model.encoder.stages[1].layers[0]
    original = layer.forward
    layer.forward = lambda x: original(x) * 1.5


def subclass(model: Any) -> None:
    layer = model.encoder.stages[1].layers[0]

    class Louder(type(layer)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.5

    layer.__class__ = Louder


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(
        model.encoder.stages[1].layers[0].conv2, "weight", Doubled()
    )


def another_activation(model: Any) -> None:
    model.encoder.stages[1].layers[0].norm2.activation = Sine()


def another_padding(model: Any) -> None:
    model.encoder.stages[1].layers[0].conv2.padding_mode = "reflect"
    model.encoder.stages[1].layers[0].conv2._reversed_padding_repeated_twice = [1] * 4


def another_drop_path(model: Any) -> None:
    model.encoder.stages[1].layers[0].drop_path = Doubled()


def a_bias(model: Any) -> None:
    convolution = model.encoder.stages[1].layers[0].conv2
    convolution.bias = nn.Parameter(torch.randn(convolution.out_channels, dtype=torch.float64))


def a_watched_pad(model: Any) -> None:
    model.embedder.pad.register_forward_hook(lambda m, x, y: 3 * y)


LEFT: dict[Any, tuple[str, str]] = {
    replace_forward: ("encoder.stages.1.layers.0", "its forward was replaced"),
    subclass: ("encoder.stages.1.layers.0", "it is a Louder, a subclass"),
    parametrized: ("encoder.stages.1.layers.0.conv2", "a subclass that may compute something else"),
    another_padding: ("encoder.stages.1.layers.0.conv2", "its padding is 'reflect'"),
    another_drop_path: ("encoder.stages.1.layers.0", "its drop_path is a Doubled"),
    a_bias: ("encoder.stages.1.layers.0.conv2", "it has a bias"),
}


@pytest.mark.parametrize("alter", [another_activation, a_watched_pad], ids=lambda f: f.__name__)
def test_what_a_fused_op_cannot_do_is_called(alter):
    model = their_model("BitModel").double().eval()
    alter(model)
    images = torch.randn(2, 3, 64, 50, dtype=torch.float64)
    assert accelerate_to_the_same(model, images).left == {}


@pytest.mark.parametrize("alter", LEFT, ids=lambda alter: alter.__name__)
def test_what_computes_something_else_is_left_and_the_rest_is_not(alter):
    model = their_model("BitModel").double().eval()
    plain = results(model, images := torch.randn(2, 3, 64, 50, dtype=torch.float64))
    alter(model)
    expected = results(model, images)
    assert any(not torch.equal(p, e) for p, e in zip(plain, expected, strict=True)) or (
        alter is another_padding  # which transformers itself does not look at
    )
    report = bitfast.accelerate(model)
    path, reason = LEFT[alter]
    assert reason in report.left[path]
    assert f"{path}: " in str(report)
    assert_close(results(model, images), expected)
    assert kinds(report)["WeightStandardizedConv2d"] >= 19
    assert kinds(report)["BitPreActivationBottleneckLayer"] >= 4
    bitfast.restore(model)
    for a, e in zip(results(model, images), expected, strict=True):
        assert torch.equal(a, e)


def test_a_subclass_that_only_adds_methods_is_run_by_bitfast():
    class Named(transformers.BitModel):
        def name(self) -> str:
            return "named"

    model = Named(their_model("BitModel").config).eval()
    report = bitfast.accelerate(model)
    assert report.left == {}
    assert "" in report.replaced
    assert model.name() == "named"
    assert isinstance(model, Named)


def test_a_subclass_with_its_own_forward_keeps_it():
    class Louder(transformers.BitModel):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output.pooler_output = 2 * output.pooler_output
            return output

    model = Louder(their_model("BitModel").config).double().eval()
    images = torch.randn(2, 3, 64, 50, dtype=torch.float64)
    report = accelerate_to_the_same(model, images)
    assert "subclass" in report.left[""]
    assert kinds(report)["BitStage"] == 4


def test_other_resnets_of_timm_are_replaced_as_far_as_they_are_alike():
    """A stem of three convolutions, and shortcuts that average."""
    from timm.layers import StdConv2d

    model = timm_resnet(stem_type="deep", avg_down=True, conv_layer=StdConv2d).double().eval()
    images = torch.randn(2, 3, 64, 50, dtype=torch.float64)
    report = accelerate_to_the_same(model, images)
    assert set(report.left.values()) == {
        "its downsample is left as it is",
        "its first block is left as it is",
        "all its stages are left as they are",
    }
    assert kinds(report)["BitPreActivationBottleneckLayer"] == 1


def test_a_pool_that_pads_otherwise_is_left():
    """timm pads the stem's pool with minus infinity, which counts where values are negative."""
    model = timm_resnet(hybrid=True, act_layer="gelu").double().eval()
    images = torch.randn(2, 3, 66, 50, dtype=torch.float64)
    report = accelerate_to_the_same(model, images)
    assert "has not gone through a ReLU" in report.left["stem.pool"]
    assert kinds(report)["TimmBottleneckLayer"] == 5


# ---- errors ---------------------------------------------------------------------------------------


def vit() -> nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        partial(nn.Linear, 3, 4),
        vit,
        partial(timm.create_model, "resnet18"),
        partial(timm.create_model, "resnetv2_50d_gn"),
    ],
    ids=["Linear", "ViT", "resnet18", "resnetv2_50d_gn"],
)
def test_a_model_without_bit_is_refused_and_not_changed(build):
    model = build()
    before = anatomy(model)
    with pytest.raises(
        ValueError, match=r"accelerate: this \w+ contains no BiT|no weight-standard"
    ):
        bitfast.accelerate(model)
    assert anatomy(model) == before


def test_bitfasts_own_models_are_refused():
    with pytest.raises(ValueError, match="this BitModel is made of bitfast's modules already"):
        bitfast.accelerate(our_model("BitModel"))


@pytest.mark.parametrize("function", [bitfast.accelerate, bitfast.restore])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        function("google/bit-50")


def test_restore_refuses_what_was_not_accelerated():
    with pytest.raises(ValueError, match="nothing in this BitModel was accelerated"):
        bitfast.restore(their_model("BitModel"))


def test_the_classes_are_bitfasts():
    for name, block in [
        ("BitModel", BitPreActivationBottleneckLayer),
        ("BitModel bottleneck", BitBottleneckLayer),
    ]:
        model = ALL[name].model()
        bitfast.accelerate(model)
        assert type(model.encoder.stages[0].layers[0]) is block
        assert type(model.encoder.stages[0].layers[0].norm2) is GroupNormActivation
        assert flatten(copy.deepcopy(model)(torch.randn(1, 3, 32, 32)))
