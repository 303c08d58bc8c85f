"""Whoever traces a model or looks at its operators sees all of what it computes, and nothing else."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import bitfast
from bitfast.ops.flops import register_flop_formulas
from bitfast.ops.norm_convolution import _why_no_norm_convolution, why_no_norm_convolution
from bitfast.ops.packed_convolution import _why_not_packed
from tests.foreign_models import timm_resnet
from tests.model_pairs import CLASSES, RELATIVE_FLOAT64, assert_close, flatten, pair
from tests.operator_calls import OperatorCalls
from tests.test_modules import SETTINGS

FEW = ["preactivation", "DPT"]


def accelerated(model: nn.Module) -> nn.Module:
    bitfast.accelerate(model)
    return model


# ---- torch.jit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ours", "accelerated", "reference"])
@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("name", CLASSES)
def test_jit_traces(name, settings, way):
    ours, theirs = pair(name, **SETTINGS[settings])
    expected_of = theirs.double().eval()
    x = torch.randn(2, 3, 64, 50, dtype=torch.float64)
    with torch.no_grad():
        expected = expected_of(x)
        model = accelerated(theirs) if way == "accelerated" else ours.double().eval()
        if way == "reference":
            with bitfast.use_backend("reference"):
                program = torch.jit.trace(model, x, strict=False)
        else:
            program = torch.jit.trace(model, x, strict=False)
        buffer = io.BytesIO()
        torch.jit.save(program, buffer)
        program = torch.jit.load(io.BytesIO(buffer.getvalue()))
        assert_close(flatten(program(x)), flatten(expected))
    assert "bitfast::" not in str(program.inlined_graph)  # it runs where there is no bitfast


FIRST_CALL = """
import torch, bitfast
config = bitfast.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2)
model, x = bitfast.BitForImageClassification(config).eval(), torch.randn(1, 3, 32, 32)
with {context}:
    program = torch.jit.trace(model, x, strict=False)
with torch.no_grad():
    torch.testing.assert_close(program(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("context", ["torch.no_grad()", "torch.enable_grad()"])
def test_jit_traces_a_model_that_was_never_called(context):
    """The machine is asked then, for the first time in the process, what it can do."""
    code = FIRST_CALL.format(context=context)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- torch.fx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_fx_traces_accelerated_networks_of_timm(hybrid, gradients):
    model = timm_resnet(hybrid=hybrid).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    bitfast.accelerate(model)
    with torch.set_grad_enabled(gradients):
        graph = torch.fx.symbolic_trace(model)
        assert_close(graph(x), expected)
    assert_close(model(x), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_feature_extractors_of_torchvision(gradients):
    model = timm.create_model("resnetv2_50x1_bit", num_classes=3).eval()
    nodes = {
        "stages.1": "stage",
        "stages.2.blocks.1.norm2": "norm",
        "stages.3.blocks.0.conv2": "conv",
    }
    x = torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        expected = create_feature_extractor(model, nodes)(x)
        names = get_graph_node_names(model)[1]
        bitfast.accelerate(model)
        actual = create_feature_extractor(model, nodes)(x)
        ours = get_graph_node_names(model)[1]
        modules = {name for name, _ in model.named_modules()}
        for name in names:  # a layer of torch is one node, ours may be several
            assert name not in modules or any(f"{n}.".startswith(f"{name}.") for n in ours), name
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-3, atol=1e-3)


# ---- dispatch modes -------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("name", CLASSES)
def test_flops_are_those_of_transformers(name, settings, dtype, train):
    ours, theirs = (model.to(dtype).train(train) for model in pair(name, **SETTINGS[settings]))
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    expected, backward = flops(theirs, x, False), flops(theirs, x, True)
    assert expected > 1e6
    for model in (ours, accelerated(theirs)):
        with torch.no_grad():
            model(x)  # what is kept from an earlier call is counted all the same
        assert flops(model, x, False) == expected
        assert flops(model, x, True) == backward


def flops(model: nn.Module, x: Tensor, gradients: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        output = flatten(model(x))
        if gradients:
            output[0].float().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_flops_of_the_convolutions_that_are_operators(kernel_size):
    if (reason := why_no_norm_convolution(torch.float32)) is not None:
        pytest.skip(reason)
    register_flop_formulas()
    operators = torch.ops.bitfast
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.randn(32, 16, kernel_size, kernel_size))
    total = torch.zeros(2, 32, 9, 8).contiguous(memory_format=torch.channels_last)
    packed = operators.pack_norm_convolution.native(weight.detach(), False)
    padding = kernel_size // 2
    norm = (None, None, None, 1, 0.0, "none")
    geometry = ([1, 1], [padding] * 2, [1, 1])
    calls: list[Callable[[], Any]] = [
        lambda: operators.norm_convolution.native(x, *norm, packed, 32, kernel_size, 1, False),
        lambda: operators.norm_convolution_add_.native(
            x, *norm, packed, total, kernel_size, 1, True
        ),
        lambda: operators.packed_convolution.native(x, weight, 1e-8, *geometry),
    ]
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, weight, padding=padding)
    expected = counter.get_total_flops()
    for call in calls:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected


def test_a_mode_sees_each_convolution_and_no_question_to_the_machine():
    ours, _ = pair("BitModel")
    ours.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x).pooler_output
        _why_no_norm_convolution.cache_clear()
        _why_not_packed.cache_clear()
        with OperatorCalls() as calls:
            actual = ours(x).pooler_output
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    count = sum(isinstance(module, nn.Conv2d) for module in ours.modules())
    assert sum("convolution" in name for name in calls.noted) == count
    assert not any("mkldnn" in name or "problem" in name for name in calls.noted)


@pytest.mark.parametrize("name", CLASSES)
def test_fake_tensors(name):
    ours, _ = pair(name)
    ours.eval()
    with torch.no_grad():
        expected = [t.shape for t in flatten(ours(torch.randn(2, 3, 64, 64)))]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            outputs = flatten(ours(mode.from_tensor(torch.randn(2, 3, 64, 64))))
    assert [t.shape for t in outputs] == expected


def test_numbers_are_the_same_as_in_an_unwatched_pass():
    ours, theirs = pair("BitForImageClassification")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    ours, theirs = ours.double().eval(), theirs.double().eval()
    with torch.no_grad(), OperatorCalls():
        assert_close(ours(x), theirs(x), RELATIVE_FLOAT64)
