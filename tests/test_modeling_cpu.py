"""Whole models in inference on the CPU: packed weights, work in place, batches in slices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from operator import is_
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.ops.kept_weights import MOST_TENSORS, kept_weights
from bitfast.ops.norm_convolution import uses_norm_convolution, why_no_norm_convolution
from tests.network_plans import NEEDS_PLANS, called_by, names_of, plans_of
from tests.threads import in_threads
from tests.tiny_models import ours
from tests.weight_changes import CHANGES, convolutions, edit_in_place, features

pytestmark = NEEDS_PLANS

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


def sliced(model: Any) -> Any:
    """The model, two images of 40x36 at a time going through its early stages."""
    getattr(model, "bit", model).plans.slice_bytes = 2 * 16 * 10 * 9 * 4
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 40, 36)


@pytest.fixture(autouse=True, params=["fused", "apart"])
def way(request: Any) -> Iterator[str]:
    """Blocks whose convolutions normalize what they read, and those of one op after the other."""
    if request.param == "apart":
        with use_backend(norm_convolution="reference"):
            yield request.param
        return
    if not uses_norm_convolution("cpu", torch.float32):
        pytest.skip(f"norms are not fused here: {why_no_norm_convolution(torch.float32)}")
    yield request.param


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
@pytest.mark.parametrize("is_sliced", [False, True])
def test_outputs_and_images_are_as_without(kind, is_sliced, layout):
    model = sliced(model_of(kind)) if is_sliced else model_of(kind)
    images = torch.randn(5, 3, 64, 68).contiguous(memory_format=layout)
    before = images.clone()
    wanted = expected(model, images)
    with torch.no_grad():
        for _ in range(2):
            actual = outputs(model, images)
            assert_close(actual, wanted)
    (plan,) = plans_of(model)
    assert called_by(plan) == []
    assert any(hasattr(part, "size") for part in plan.parts) == is_sliced
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


NORMALIZING = ("norm_convolution", "norm_convolution_add_")


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_blocks_normalize_as_they_convolve(kind, x, way):
    """Otherwise the other tests could pass because nothing is fused."""
    model = model_of(kind)
    blocks = [block for stage in model.encoder.stages for block in stage.layers]

    def fused() -> int:
        """How many blocks the plan made last fuses, by their last convolution."""
        (plan,) = plans_of(model)
        names = names_of(plan)
        if kind == "preactivation":
            return names.count("norm_convolution_add_")
        # The first reads feature maps that are normalized, and fuses nothing but their moments.
        return names.count("norm_convolution") // 3

    with torch.no_grad():
        model(x)
        assert fused() == (len(blocks) if way == "fused" else 0)
        (plan,) = plans_of(model)
        if way == "apart":
            assert not set(names_of(plan)) & set(NORMALIZING)
        blocks[1].norm2.register_forward_hook(lambda *_: None)
        model(x)
        assert fused() == (len(blocks) - 1 if way == "fused" else 0)
        assert called_by(plans_of(model)[0]) == [blocks[1]]
    for elsewhere in (model, copy.deepcopy(model).double()):
        elsewhere.eval()
        elsewhere(x.to(next(elsewhere.parameters()).dtype))  # gradients are recorded
        assert plans_of(elsewhere) == []
    with torch.no_grad():
        elsewhere(x.double())
    assert plans_of(elsewhere) == []


def test_slices_are_as_many_images_as_fit(x):
    model = sliced(model_of())

    def sizes(images: Tensor) -> list[int]:
        """How many images the first program of the plan made last is given at a time."""
        first = plans_of(model)[-1].parts[0]
        seen: list[int] = []
        for name in ("program", "remainder"):
            if (program := getattr(first, name, None)) is not None:
                note = lambda places: seen.append(len(places[0]))  # noqa: E731
                setattr(first, name, program._replace(calls=(note, *program.calls)))
        model(images)
        return seen

    with torch.no_grad():
        for images, expected in ((x, [2, 2, 1]), (x[:4], [2, 2]), (x[:2], [2]), (x[:0], [0])):
            model(images)
            assert sizes(images) == expected
        seen: list[int] = []
        for module in (model.embedder.convolution, model.encoder.stages[1].layers[0].norm2):
            handle = module.register_forward_hook(lambda m, i, o: seen.append(len(o)))
            model(x)  # whoever watches a module sees it called once
            assert seen == [5]
            seen.clear()
            handle.remove()


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_a_backbone_in_slices(last, x):
    model = sliced(model_of(name="BitBackbone"))
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
    return [id(layer.weight) in kept_weights._kept for layer in convolutions(model)]


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


def tensors_of(model: nn.Module) -> list[list[Tensor]]:
    """The different tensors that are kept of each weight of a model."""
    kept = (kept_weights._kept[id(layer.weight)].by_form for layer in convolutions(model))
    return [list({id(t): t for t in by_form.values()}.values()) for by_form in kept]


def test_packed_weights_cost_one_copy_of_the_weights(way):
    """Except where oneDNN wants another layout for another size of images."""
    model = ours("BitModel", embedding_size=64, hidden_sizes=[128, 256], num_groups=32).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        tensors = list(itertools.chain(*tensors_of(model)))
        assert len(tensors) == len(convolutions(model))
        packed = sum(torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.nbytes for t in tensors)
        for size in (33, 40, 56, 64, 96):
            model(torch.randn(2, 3, size, size))
    # oneDNN rounds channels up to whole vectors; the stem has 3. Winograd's filters have 16 numbers for 9.
    widths = [
        layer.weight.nbytes * (16 / 9 if layer.kernel_size == (3, 3) else 1)
        for layer in convolutions(model)
    ]
    weights = (
        sum(layer.weight.nbytes for layer in convolutions(model)) if way == "apart" else sum(widths)
    )
    assert packed <= 1.1 * weights + 64 * 7 * 7 * 16 * 4
    assert max(map(len, tensors_of(model))) <= MOST_TENSORS


def test_threads_share_a_model():
    model = sliced(model_of())
    batches = [torch.randn(1 + n, 3, 33 + 8 * n, 47) for n in range(4)]
    wanted = [expected(model, images) for images in batches]

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                assert_close(outputs(model, batches[number]), wanted[number])

    in_threads(work, len(batches))


# ---- compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_a_compiled_model_keeps_its_weights_packed_and_follows_changes(kind, fresh_compiler):
    model = model_of(kind)
    images = torch.randn(3, 3, 40, 36)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = expected(model, images)
        assert_close(outputs(compiled, images), wanted)
        before = list(itertools.chain(*tensors_of(model)))
        assert_close(outputs(compiled, images), wanted)
        after = itertools.chain(*tensors_of(model))
        assert all(map(is_, after, before)), "packed a second time"
        assert len(plans_of(model)) == 1
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
