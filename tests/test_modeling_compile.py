"""torch.compile and torch.export: one graph, any batch and image size, the same numbers."""

from __future__ import annotations

import copy
import io
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from bitfast import extension, outputs
from bitfast.backends import use_backend
from tests.model_pairs import (
    CLASSES,
    LAYER_TYPES,
    RELATIVE_FLOAT64,
    assert_as_exact,
    assert_close,
    gradients,
    our_model,
)
from tests.tolerances import Triples, assert_draws_within_contract
from tests.versions import TRACER_KEEPS_LAYOUTS

SHALLOW = {"depths": [1, 1], "hidden_sizes": [16, 32]}
ONE_STAGE = {"depths": [1], "hidden_sizes": [16]}
SAME = {"global_padding": "same", "embedding_dynamic_padding": True}
BACKENDS = pytest.mark.parametrize("backend", [None, "native", "reference"])
"""None: what each op chooses. Those of Triton are compiled in test_modeling_triton.py."""
PADDINGS = pytest.mark.parametrize("padding", [{}, SAME], ids=["default", "same"])
SIZES = [(2, 33, 47), (3, 64, 50), (5, 40, 70), (4, 31, 32)]
"""The first is compiled for itself, the second for all; the others must not be compiled for."""


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def on_every_size(compiled: Any, model: nn.Module, bound: float, **settings: Any) -> None:
    for number, (batch, *size) in enumerate(SIZES):
        images = torch.randn(batch, model.config.num_channels, *size, dtype=model.dtype)
        images = images.contiguous(memory_format=settings.get("layout", torch.contiguous_format))
        stance = "fail_on_recompile" if number > 1 else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = compiled(images, output_hidden_states=True)
        with torch.no_grad():
            expected = model(images, output_hidden_states=True)
        assert type(actual) is type(expected)
        assert_close(actual, expected, bound)
        if TRACER_KEEPS_LAYOUTS:
            for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
                assert a.stride() == e.stride()


def on_backend(backend: str | None) -> AbstractContextManager[None]:
    if backend == "native" and extension.CPU.problem is not None:
        pytest.skip(f"the extension: {extension.CPU.problem}")
    return nullcontext() if backend is None else use_backend(backend)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("layer_type", "padding"),
    [("preactivation", SAME), ("bottleneck", {})],
    ids=["preactivation-same", "bottleneck-default"],
)
def test_compiles_to_one_graph_for_all_sizes(name, layer_type, padding):
    model = our_model(name, layer_type=layer_type, **SHALLOW, **padding).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    on_every_size(compiled, model, RELATIVE_FLOAT64)


@BACKENDS
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_compiler_finds_one_graph_and_no_break(name, learns, backend):
    model = our_model(name, **ONE_STAGE, **SAME).train(learns)
    images = torch.randn(2, 3, 33, 47)
    with torch.set_grad_enabled(learns), on_backend(backend):
        found = torch._dynamo.explain(model)(images)
    assert found.graph_count == 1
    assert found.graph_break_count == 0


@BACKENDS
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_is_as_exact_as_eager_on_each_backend(dtype, layer_type, backend):
    model = our_model("BitForImageClassification", layer_type=layer_type, **ONE_STAGE, **SAME)
    model.to(dtype).eval()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def draw() -> Triples:
        results = []
        for number, (batch, *size) in enumerate(SIZES):
            images = torch.randn(batch, 3, *size).to(dtype)
            stance = "fail_on_recompile" if number > 1 else "default"
            with torch.no_grad(), on_backend(backend):
                with torch.compiler.set_stance(stance):
                    actual = compiled(images).logits
                plain = model(images).logits
            with torch.no_grad():
                results.append((actual, plain, exact(images.double()).logits))
        actual, plain, oracle = map(torch.cat, zip(*results, strict=True))
        return {"logits": (actual, plain, oracle)}

    assert_draws_within_contract(draw, 3)


def test_compiles_in_channels_last():
    model = our_model("BitModel", layer_type="bottleneck", **ONE_STAGE, **SAME).double().eval()
    model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    on_every_size(compiled, model, RELATIVE_FLOAT64, layout=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BitForImageClassification", {"hidden_act": "gelu"}),
        ("BitModel", {"layer_type": "bottleneck"}),
        ("BitBackbone", SAME),
    ],
)
def test_inductor_gives_the_same_numbers(name, settings):
    model = our_model(name, **ONE_STAGE, **settings).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for number, (batch, *size) in enumerate(SIZES[:3]):
        images = torch.randn(batch, 3, *size)
        stance = "fail_on_recompile" if number else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = compiled(images, output_hidden_states=True)
        with torch.no_grad():
            expected = model(images, output_hidden_states=True)
            exact = copy.deepcopy(model).double()(images.double(), output_hidden_states=True)
        assert type(actual) is type(expected)
        # Fused kernels sum in another order: as far from float64 as eager is.
        assert_as_exact(actual, expected, exact)


@pytest.mark.parametrize(
    ("layer_type", "checkpointing"),
    [("preactivation", False), ("bottleneck", False), ("preactivation", True)],
)
def test_training_compiles(layer_type, checkpointing):
    settings = {"layer_type": layer_type, **ONE_STAGE, **SAME}
    model = our_model("BitForImageClassification", **settings).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, (batch, *size) in enumerate(SIZES[:3]):
        images = torch.randn(batch, 3, *size, dtype=torch.float64)
        labels = torch.randint(5, (batch,))
        expected = gradients(model, lambda m: m(images, labels).loss)  # noqa: B023
        stance = "fail_on_recompile" if number > 1 else "default"
        with torch.compiler.set_stance(stance):
            actual = gradients(model, lambda _: compiled(images, labels).loss)  # noqa: B023
        assert list(actual) == list(expected)
        for key in expected:
            assert_close(actual[key], expected[key], RELATIVE_FLOAT64, key)


def test_drop_path_compiles():
    model = our_model("BitModel", **SHALLOW, drop_path_rate=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        first, second = compiled(images).last_hidden_state, compiled(images).last_hidden_state
        everything_kept = model.eval()(images).last_hidden_state
    changed = (first != second).flatten(1).any(1)
    assert changed.any()  # the draw is made in each call, not when tracing
    assert not torch.equal(first, everything_kept)


def test_autocast_compiles():
    model = our_model("BitForImageClassification", **SHALLOW).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 33, 47)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(images).logits, model(images).logits
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_are_made_and_read_inside_a_graph(return_dict):
    model = our_model("BitForImageClassification", **SHALLOW).eval()

    def doubled(images):
        output = model(images, output_hidden_states=True, return_dict=return_dict)
        if not return_dict:
            return output[0] + 1, output[-1][0]
        assert output["logits"] is output[0]
        twice = pytree.tree_map(lambda tensor: 2 * tensor, output)
        return twice, output.logits + 1, output.hidden_states[0], len(output[1:])

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        actual, expected = compiled(images), doubled(images)
    actual_leaves, actual_form = pytree.tree_flatten(actual)
    expected_leaves, expected_form = pytree.tree_flatten(expected)
    assert actual_form == expected_form
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        assert a == e if isinstance(e, int) else torch.equal(a, e)


# ---- export -------------------------------------------------------------------------------------


# Any size that leaves the last feature map more than one pixel, as torch wants of dynamic sizes.
SIZE = {0: Dim("batch", max=64), 2: Dim("height", min=9), 3: Dim("width", min=9)}


@PADDINGS
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_an_exported_program_is_saved_and_runs_at_other_sizes(name, layer_type, padding):
    settings = {"layer_type": layer_type, **SHALLOW, **padding}
    model = our_model(name, **settings, output_hidden_states=True).double().eval()
    loaded = saved_and_loaded(exported(model))
    for batch, *size in [*SIZES, (2, 9, 10)]:
        images = torch.randn(batch, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            actual, expected = loaded(images), model(images)
        assert type(actual) is type(expected)
        assert isinstance(actual, outputs.ModelOutput)
        assert_close(actual, expected, RELATIVE_FLOAT64)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    images = torch.randn(2, 3, 33, 47, dtype=model.dtype)
    return torch.export.export(model, (images,), dynamic_shapes={"pixel_values": SIZE})


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream).module()
