"""Whole models on the Triton kernels (in the interpreter where there is no GPU)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from bitfast import BitConfig, BitForImageClassification, backends
from bitfast.backends import register_kernel, use_backend
from bitfast.blocks import BitPreActivationBottleneckLayer
from bitfast.network import BitEmbeddings, BitStage
from bitfast.ops.common import TRITON_DTYPES
from tests.interpreter import DEVICE
from tests.model_pairs import move_weights
from tests.tiny_models import ours
from tests.tolerances import relative_error

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@contextlib.contextmanager
def triton() -> Iterator[None]:
    with use_backend(group_norm_act="triton", weight_standardization="triton"):
        yield


def model_of(name: str = "BitModel", **settings: Any) -> Any:
    model = ours(
        name, **{"embedding_size": 16, "hidden_sizes": [32, 64], "num_groups": 8, **settings}
    )
    move_weights(model)
    return model.to(DEVICE)


def features_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    output = model(x, output_hidden_states=True)
    return [output.last_hidden_state, output.pooler_output, *output.hidden_states]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_as_exact_as_plain_pytorch(dtype, layer_type, layout):
    model = model_of(layer_type=layer_type).eval()
    x = torch.randn(3, 3, 40, 36, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        exact = features_of(copy.deepcopy(model).to(dtype).double(), x.double())
        model.to(dtype)
        with use_backend("reference"):
            plain = features_of(model, x)
        with triton():
            actual = features_of(model, x)
    rounding = torch.finfo(dtype).eps / 2
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == dtype
        assert a.stride() == p.stride()  # NCHW in, NCHW out, though the network runs channels_last
        assert relative_error(a, e) <= 2 * relative_error(p, e) + rounding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_gradients_are_as_exact_as_plain_pytorch(layer_type, layout):
    # gelu: a ReLU whose input is within rounding of zero would count as an error.
    model = model_of(layer_type=layer_type, hidden_act="gelu").train()
    if layout == torch.channels_last:
        model.to(memory_format=layout)
    x = torch.randn(3, 3, 40, 36, device=DEVICE).contiguous(memory_format=layout)

    def gradients(m: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().clone().requires_grad_()
        features = features_of(m, x)
        sum(f.sin().sum() for f in features).backward()
        return {"x": x.grad, **{name: p.grad for name, p in m.named_parameters()}}

    exact = gradients(copy.deepcopy(model).double(), x.double())
    with use_backend("reference"):
        plain = gradients(copy.deepcopy(model), x)
    with triton():
        actual = gradients(model, x)
    largest = max(relative_error(plain[name], exact[name]) for name in exact)
    for name, parameter in [("x", x), *model.named_parameters()]:
        assert relative_error(actual[name], exact[name]) <= 2 * largest + 1e-7, name
        assert actual[name].dtype == parameter.dtype
        if parameter.dim() == 4 and 1 not in parameter.shape[1:]:
            assert actual[name].stride() == parameter.stride(), name


def test_outputs_of_a_backbone_keep_the_layout_of_the_images():
    model = model_of("BitBackbone", out_features=["stem", "stage2"]).eval()
    for layout in LAYOUTS:
        x = torch.randn(2, 3, 40, 36, device=DEVICE).contiguous(memory_format=layout)
        with torch.no_grad(), triton():
            for output in model(x).feature_maps:
                assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph_with_dynamic_sizes(training):
    torch._dynamo.reset()
    model = model_of("BitForImageClassification").train(training)
    with triton(), torch.set_grad_enabled(training):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for number, shape in enumerate([(2, 3, 40, 36), (3, 3, 64, 48), (2, 3, 33, 47)]):
            x = torch.randn(shape, device=DEVICE)
            stance = "fail_on_recompile" if number == 2 else "default"
            with torch.compiler.set_stance(stance):
                logits = compiled(x).logits
            torch.testing.assert_close(logits, model(x).logits, rtol=1e-4, atol=1e-5)
            if training:
                logits.sum().backward()


def test_a_compiled_model_follows_changed_weights():
    torch._dynamo.reset()
    model = model_of().eval()
    x = torch.randn(2, 3, 40, 36, device=DEVICE)
    with triton(), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            actual, expected = compiled(x).last_hidden_state, model(x).last_hidden_state
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            model.embedder.convolution.weight.normal_()


# ---- recomputation --------------------------------------------------------------------------------


def own_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()


def reentrant_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})


def wrapped_blocks(model: Any) -> None:
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, BitPreActivationBottleneckLayer)
    )


def wrapped_stages_and_stem(model: Any) -> None:
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, (BitStage, BitEmbeddings))
    )


@pytest.mark.parametrize(
    "way", [own_checkpointing, reentrant_checkpointing, wrapped_blocks, wrapped_stages_and_stem]
)
def test_recomputed_blocks_give_the_same_gradients(way):
    """A block that runs again in the backward pass must do what it did in the forward pass."""
    model = model_of(hidden_act="gelu").train()
    x = torch.randn(2, 3, 40, 36, device=DEVICE, requires_grad=True)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with triton():
            model(x).last_hidden_state.sin().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    way(model)
    for actual, reference in zip(gradients(), expected, strict=True):
        assert relative_error(actual, reference) < 1e-4


# ---- memory ---------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of a forward pass, the parameters aside.

    The standardized weights are among them; both libraries keep those for their convolutions.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no storage is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(nbytes for nbytes, _ in seen.values())


@pytest.mark.parametrize(
    ("settings", "dtype", "least"),
    [
        ({}, torch.float32, 1.0),
        ({"hidden_act": "gelu"}, torch.float32, 1.4),
        ({"hidden_act": "gelu"}, torch.bfloat16, 1.4),
    ],
)
def test_r50x1_keeps_less_for_the_backward_pass_than_transformers(
    settings, dtype, least, monkeypatch
):
    """On the meta device, where tensors have sizes but no numbers; 224x224, batch 32.

    With ReLU both keep what enters each norm and each convolution, and differ by the pool; with another
    activation transformers keeps what lies between as well.
    """
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))
    for op in ("group_norm_act", "weight_standardization"):
        register_kernel(op, "triton", "meta", TRITON_DTYPES, lambda: None)
    with torch.device("meta"):
        theirs = transformers.BitForImageClassification(transformers.BitConfig(**settings))
        mine = BitForImageClassification(BitConfig(**settings))
        x = torch.randn(32, 3, 224, 224, dtype=dtype)
    theirs, mine = theirs.to(dtype).train(), mine.to(dtype).train()
    weights = sum(m.weight.nbytes for m in mine.modules() if isinstance(m, nn.Conv2d))
    expected = saved_bytes(theirs, lambda: theirs(x)) - weights
    with use_backend(group_norm_act="triton"):
        actual = saved_bytes(mine, lambda: mine(x)) - weights
    print(f"{settings} {dtype}: {expected / 1e9:.2f} GB, {actual / 1e9:.2f} GB")
    assert actual < expected
    assert expected / actual >= least


def test_under_mixed_precision_as_on_a_gpu_a_third_is_kept():
    """CUDA's autocast runs group_norm in float32 and keeps float32 copies; CPU's does not, so it is made to."""
    settings = {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8
    }  # fmt: skip
    theirs = transformers.BitForImageClassification(transformers.BitConfig(**settings)).train()
    mine = BitForImageClassification(BitConfig(**settings)).train()
    mine.load_state_dict(theirs.state_dict())
    for module in theirs.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(t.float() for t in inputs))
    group_norm = torch.nn.functional.group_norm

    def in_float32(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return group_norm(x.float(), *arguments)

    x = torch.randn(2, 3, 96, 96)
    with pytest.MonkeyPatch.context() as monkeypatch, torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(torch.nn.functional, "group_norm", in_float32)
        expected = saved_bytes(theirs, lambda: theirs(x))
    with triton(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        mine, x = mine.to(DEVICE), x.to(DEVICE)
        actual = saved_bytes(mine, lambda: mine(x))
    print(f"{expected / 1e6:.2f} MB, {actual / 1e6:.2f} MB")
    assert expected / actual > 2
