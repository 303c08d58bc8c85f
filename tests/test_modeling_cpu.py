"""Whole models in inference on the CPU: packed weights, work in place, batches in slices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast import blocks, forward_pass, fusion
from bitfast.backends import use_backend
from bitfast.layers import runs_packed
from bitfast.ops.norm_convolution import fuses, why_not_fused
from bitfast.ops.packed_convolution import packs, why_not_packed
from bitfast.ops.packed_weights import packed_weights
from tests.tiny_models import ours
from tests.weight_changes import CHANGES, convolutions, edit_in_place, features

pytestmark = pytest.mark.skipif(
    not packs("cpu", torch.float32), reason=f"not packed here: {why_not_packed(torch.float32)}"
)

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {"depths": [2, 1, 2], "hidden_sizes": [16, 16, 32]},
    "bottleneck": {"depths": [2, 2], "layer_type": "bottleneck"},
    "same": {"depths": [2, 2], "global_padding": "same", "embedding_dynamic_padding": True},
}


def model_of(kind: str = "preactivation", name: str = "BitModel") -> Any:
    torch.manual_seed(0)
    model = ours(name, **SETTINGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 40, 36)


@pytest.fixture(autouse=True, params=["fused", "apart"])
def way(request: Any, monkeypatch: Any) -> str:
    """Blocks whose convolutions normalize what they read, and those of one op after the other."""
    if request.param == "apart":
        monkeypatch.setattr(fusion, "fuses", lambda *_: False)
    elif not fuses("cpu", torch.float32):
        pytest.skip(f"norms are not fused here: {why_not_fused(torch.float32)}")
    return request.param


@pytest.fixture
def small_slices(monkeypatch: Any) -> None:
    for name in ("SLICE_BYTES", "FUSED_SLICE_BYTES"):
        monkeypatch.setattr(forward_pass, name, 2 * 16 * 10 * 9 * 4)


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    output = model(x, output_hidden_states=True)
    return [output.last_hidden_state, output.pooler_output, *output.hidden_states]


def expected(model: Any, x: Tensor) -> list[Tensor]:
    """What plain PyTorch computes, layer by layer."""
    with torch.no_grad(), use_backend("reference"):
        return outputs(copy.deepcopy(model), x)


def assert_close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for ours_, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)


# ---- in place, and in slices ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("sliced", [False, True])
def test_outputs_and_images_are_as_without(kind, sliced, layout, request):
    if sliced:
        request.getfixturevalue("small_slices")
    model = model_of(kind)
    images = torch.randn(5, 3, 64, 68).contiguous(memory_format=layout)
    before = images.clone()
    wanted = expected(model, images)
    with torch.no_grad():
        assert runs_packed(model, images)
        for _ in range(2):
            actual = outputs(model, images)
            assert_close(actual, wanted)
    assert torch.equal(images, before)
    for tensor in (actual[0], *actual[2:]):
        assert tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(32, 32), (57, 33), (97, 161)])
@pytest.mark.parametrize("kind", SETTINGS)
def test_small_odd_and_wide_images(kind, size):
    """Feature maps of one pixel to some dozens: 3x3 filters run in one way or the other."""
    model = model_of(kind)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_close(outputs(model, images), expected(model, images))


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_blocks_normalize_as_they_convolve(kind, x, way, monkeypatch):
    """So that the other tests do not pass only because nothing is fused."""
    calls: list[str] = []
    for block_class in (blocks.BitPreActivationBottleneckLayer, blocks.BitBottleneckLayer):
        original = block_class.run_fused

        def run_fused(self: Any, *arguments: Any, original: Any = original) -> Any:
            calls.append(type(self).__name__)
            return original(self, *arguments)

        monkeypatch.setattr(block_class, "run_fused", run_fused)
    model = model_of(kind)
    count = sum(len(stage.layers) for stage in model.encoder.stages)
    with torch.no_grad():
        model(x)
        assert len(calls) == (count if way == "fused" else 0)
        calls.clear()
        model.encoder.stages[0].layers[1].norm2.register_forward_hook(lambda *_: None)
        model(x)
        assert len(calls) == (count - 1 if way == "fused" else 0)
        calls.clear()
    model(x)  # gradients are recorded
    model.double()(x.double())
    assert not calls


def test_slices_are_as_many_images_as_fit(x, small_slices, monkeypatch):
    model = model_of()
    seen: list[int] = []
    original = type(model.embedder).forward

    def forward(self: Any, images: Tensor) -> Tensor:
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(type(model.embedder), "forward", forward)
    with torch.no_grad():
        model(x)
        assert seen == [2, 2, 1]
        seen.clear()
        model(x[:2])
        model(x[:0])
        assert seen == [2, 0]
        for module in (model.embedder.convolution, model.encoder.stages[1].layers[0].norm2):
            seen.clear()
            handle = module.register_forward_hook(lambda *_: None)
            model(x)  # whoever watches a module sees it called once
            assert seen == [5]
            handle.remove()
    seen.clear()
    model(x)  # gradients are recorded
    assert seen == [5]


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_a_backbone_in_slices(last, x, small_slices):
    model = model_of(name="BitBackbone")
    model.out_indices = sorted({0, last})
    with torch.no_grad(), use_backend("reference"):
        wanted = copy.deepcopy(model)(x).feature_maps
    with torch.no_grad():
        assert_close(list(model(x).feature_maps), list(wanted))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_what_a_hook_has_seen_does_not_change(kind, hook):
    """Whatever module is watched: its inputs and outputs stay as they were, and so does the result."""
    model = model_of(kind)
    images = torch.randn(2, 3, 40, 36)
    wanted = expected(model, images)
    kept: list[tuple[str, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name == "":
            continue

        def keep(name: str, *tensors: Any) -> None:
            for value in tensors:
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        kept.append((name, tensor, tensor.clone()))

        if hook == "forward":
            handle = module.register_forward_hook(lambda m, i, o, n=name: keep(n, o))
        else:
            handle = module.register_forward_pre_hook(lambda m, i, n=name: keep(n, i))
        with torch.no_grad():
            assert_close(outputs(model, images), wanted)
        handle.remove()
    assert len({name for name, *_ in kept}) > 10
    for name, tensor, before in kept:
        assert torch.equal(tensor, before), name


def test_drop_path_and_training_mode(x):
    model = ours("BitModel", depths=[2, 2], drop_path_rate=0.5).train()
    with torch.no_grad(), use_backend("reference"):
        torch.manual_seed(1)
        wanted = outputs(model, x)
    with torch.no_grad():
        torch.manual_seed(1)
        assert_close(outputs(model, x), wanted)


# ---- weights --------------------------------------------------------------------------------------


def kept(model: nn.Module) -> list[bool]:
    return [id(layer.weight) in packed_weights._entries for layer in convolutions(model)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen(change, mode):
    model = model_of()
    images = torch.randn(2, 3, 33, 47)
    with mode():
        before = features(model, images)
    change(model)
    with mode():
        after = features(model, images)
    wanted = expected(model, images)[0]
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "forget",
    [
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.double(),
        lambda model: nn.Sequential(model).to(memory_format=torch.channels_last),
    ],
)
def test_switching_moving_and_converting_free_their_memory(forget, x):
    model = model_of()
    with torch.no_grad():
        model(x)
    assert all(kept(model))
    forget(model)
    assert not any(kept(model))


def test_copies_and_files_hold_none(x, tmp_path):
    model = model_of()
    with torch.no_grad():
        model(x)
    assert not any(kept(copy.deepcopy(model)))
    torch.save(model, tmp_path / "model.pt")
    assert not any(kept(torch.load(tmp_path / "model.pt", weights_only=False)))


def test_they_cost_one_copy_of_the_weights(x, way):
    model = ours("BitModel", embedding_size=64, hidden_sizes=[128, 256], num_groups=32).eval()
    with torch.no_grad():
        for size in (32, 40, 64):
            model(torch.randn(2, 3, size, size))
    entries = [packed_weights._entries[id(layer.weight)] for layer in convolutions(model)]
    packed = sum(
        torch.ops.mkldnn._nbytes(entry.packed) if entry.packed.is_mkldnn else entry.packed.nbytes
        for entry in entries
    )
    # oneDNN rounds channels up to whole vectors; the stem has 3. Winograd's filters have 16 numbers for 9.
    widths = [
        layer.weight.nbytes * (16 / 9 if layer.kernel_size == (3, 3) else 1)
        for layer in convolutions(model)
    ]
    weights = (
        sum(layer.weight.nbytes for layer in convolutions(model)) if way == "apart" else sum(widths)
    )
    assert packed <= 1.1 * weights + 64 * 7 * 7 * 16 * 4
    assert model.prepared_weights._kept is None


def test_threads_share_a_model(small_slices):
    model = model_of()
    batches = [torch.randn(1 + n, 3, 33 + 8 * n, 47) for n in range(4)]
    wanted = [expected(model, images) for images in batches]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    assert_close(outputs(model, batches[number]), wanted[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


# ---- compilers ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_a_compiled_model_keeps_its_weights_packed_and_follows_changes(kind, fresh_compiler):
    model = model_of(kind)
    images = torch.randn(3, 3, 40, 36)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = expected(model, images)
        assert_close(outputs(compiled, images), wanted)
        entries = dict(packed_weights._entries)
        assert_close(outputs(compiled, images), wanted)
        for layer in convolutions(model):
            key = id(layer.weight)
            assert packed_weights._entries[key] is entries[key], "packed a second time"
        edit_in_place(model)
        assert_close(outputs(compiled, images), expected(model, images))


def test_inductor(fresh_compiler):
    model = model_of()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for images in (torch.randn(3, 3, 40, 36), torch.randn(2, 3, 64, 36)):  # the second: dynamic
            before = images.clone()
            assert_close(outputs(compiled, images), expected(model, images))
            assert torch.equal(images, before)


class Wrapper(nn.Module):
    """What libraries that add small trainable matrices to layers put in their place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 1.5 * self.base_layer(x)


@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
@pytest.mark.parametrize(
    "path",
    [
        "embedder",
        "embedder.convolution",
        "norm",
        "encoder.stages.1",
        "encoder.stages.1.layers.0",
        *(
            f"encoder.stages.1.layers.0.{name}"
            for name in (
                "conv1", "norm1", "conv2", "norm2", "conv3", "norm3",
                "downsample", "downsample.conv", "downsample.norm",
            )
        ),
    ],
)  # fmt: skip
def test_wrapped_modules_are_called(path, layer_type):
    settings = {"depths": [1, 2], "hidden_sizes": [16, 32], "layer_type": layer_type}
    model = ours("BitModel", **settings).eval()
    images = torch.randn(2, 3, 48, 40)
    parent, _, name = path.rpartition(".")
    wrapper = Wrapper(model.get_submodule(path))
    setattr(model.get_submodule(parent), name, wrapper)
    with torch.no_grad():
        actual = model(images).last_hidden_state
        assert wrapper.calls == 1
        with use_backend("reference"):
            expected = model(images).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
