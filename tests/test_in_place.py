"""accelerate and restore: models of transformers and timm keep all but their speed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bitfast
from bench.precision import far_from_zero
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.norm_convolution import uses_norm_convolution
from tests import foreign_models
from tests.foreign_models import ALL, TIMM
from tests.model_pairs import (
    RELATIVE_FLOAT64,
    assert_as_transformers,
    assert_close,
    concatenate,
    flatten,
    gradients,
    our_model,
    their_model,
)
from tests.network_plans import NEEDS_PLANS, plans_of
from tests.operator_calls import OperatorCalls
from tests.tolerances import assert_draws_within_contract, relative_error
from tests.weight_changes import CHANGES, train_a_step

EACH = pytest.mark.parametrize("name", ALL)
CHANGED = ("BitModel", "ResNetV2", "features only")
SOME = pytest.mark.parametrize("name", ["BitForImageClassification", "DPT-hybrid", *TIMM])


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return an accelerated model and an equal one as it was."""
    theirs = ALL[name].model(dtype)
    ours = copy.deepcopy(theirs)
    bitfast.accelerate(ours)
    return ours, theirs


def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(images))


# ---- numbers --------------------------------------------------------------------------------------


@EACH
def test_the_numbers_are_the_same(name):
    ours, theirs = pair(name)
    images = ALL[name].images()
    assert_as_transformers(ours, theirs, lambda m: results(m, images.to(dtype_of(m))))
    for a, e in zip(results(ours, images), results(theirs, images), strict=True):
        assert a.stride() == e.stride()


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@pytest.mark.parametrize("name", ["DPT-hybrid", "hybrid ViT", "BitForImageClassification"])
def test_float16_bears_filters_that_half_precision_cannot_standardize(name):
    """Their mean is 100 times their deviation, which is then lost in the rounding of transformers and timm."""
    squares = []
    for _ in range(3):
        theirs = ALL[name].model()
        with torch.no_grad():
            for module in theirs.modules():
                if hasattr(module, "eps") and isinstance(module, nn.Conv2d):
                    far_from_zero(module.weight[::4])
        theirs.half()
        ours = copy.deepcopy(theirs)
        bitfast.accelerate(ours)
        images = ALL[name].images(torch.float16)
        actual, plain = results(ours, images), results(theirs, images)
        exact = results(theirs.double(), images.double())
        assert all(torch.isfinite(value).all() for value in actual)
        errors = [[relative_error(*p) for p in zip(r, exact, strict=True)] for r in (actual, plain)]
        squares.append(torch.tensor(errors).square().mean(1))
    error, their_error = torch.stack(squares).mean(0).sqrt().tolist()
    print(f"{name} in float16: {error:.1e} accelerated, {their_error:.1e} before")
    assert error < their_error / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SOME
def test_errors_of_half_precision_are_within_the_contract(name, dtype):
    def draw():
        ours, theirs = pair(name, dtype)
        images = ALL[name].images(dtype, batch=4)
        found = results(ours, images), results(theirs, images)
        exact = results(theirs.double(), images.double())
        return dict(enumerate_results(*found, exact))

    assert_draws_within_contract(draw, 3)


def enumerate_results(*lists: list[Tensor]) -> Any:
    return ((f"output {n}", triple) for n, triple in enumerate(zip(*lists, strict=True)))


@SOME
def test_errors_under_autocast_are_within_the_contract(name):
    def draw():
        ours, theirs = pair(name)
        images = ALL[name].images(batch=4)
        with torch.autocast("cpu", torch.bfloat16):
            actual, plain = results(ours, images), results(theirs, images)
        actual = [a.to(p.dtype) for a, p in zip(actual, plain, strict=True)]
        exact = results(theirs.double(), images.double())
        return dict(enumerate_results(actual, plain, exact))

    assert_draws_within_contract(draw, 3)


@SOME
def test_channels_last_stays_channels_last(name):
    ours, theirs = pair(name, torch.float64)
    images = ALL[name].images(torch.float64).contiguous(memory_format=torch.channels_last)
    for model in (ours, theirs):
        model.to(memory_format=torch.channels_last)
    assert_close(results(ours, images), results(theirs, images))


@EACH
def test_training_is_the_same(name):
    """With the same draws of whatever drops paths."""
    ours, theirs = (model.double().train() for model in pair(name))
    images = ALL[name].images(torch.float64, batch=3)
    weights = [torch.randn_like(value) for value in results(theirs, images)]

    def objective(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return sum((w * v).sum() for w, v in zip(weights, flatten(model(images)), strict=True))

    actual, expected = gradients(ours, objective), gradients(theirs, objective)
    assert list(actual) == list(expected)
    assert_close(concatenate(actual), concatenate(expected), 100 * RELATIVE_FLOAT64)


def test_gradient_checkpointing_of_timm_is_kept(monkeypatch):
    ours, theirs = (model.double().train() for model in pair("ResNetV2"))
    images = TIMM["ResNetV2"].images(torch.float64)
    expected = gradients(theirs, lambda m: m(images).square().sum())
    counted: list[nn.Module] = []
    plain_filters = WeightStandardizedConv2d.filters

    def filters(self: Any) -> Tensor:
        counted.append(self)
        return plain_filters(self)

    monkeypatch.setattr(WeightStandardizedConv2d, "filters", filters)
    count = sum(isinstance(m, WeightStandardizedConv2d) for m in ours.modules())
    for checkpointed in (False, True):
        ours.set_grad_checkpointing(checkpointed)
        counted.clear()
        actual = gradients(ours, lambda m: m(images).square().sum())
        assert_close(concatenate(actual), concatenate(expected), 100 * RELATIVE_FLOAT64)
        # Blocks are computed a second time, in the backward pass; the stem is not.
        assert len(counted) == (2 * count - 1 if checkpointed else count)
        assert len(set(counted)) == count


# ---- speed ----------------------------------------------------------------------------------------


def operators(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> list[str]:
    """The operators that a model calls, of bitfast and of oneDNN."""
    with torch.no_grad(), OperatorCalls() as calls:
        model.to(dtype)(images.to(dtype))
    return [name for name in calls.noted if name.startswith(("bitfast.", "mkldnn."))]


@NEEDS_PLANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_accelerated_models_call_the_operators_of_bitfasts_own(layer_type, dtype):
    """Otherwise the numbers could be right at the old speed."""
    images = torch.randn(2, 3, 64, 50)
    uses_norm_convolution("cpu", dtype)  # what this CPU can do is asked once, by operators as well
    expected = operators(our_model("BitModel", layer_type=layer_type).eval(), images, dtype)
    assert expected
    model = their_model("BitModel", layer_type=layer_type).eval()
    assert not operators(model, images, dtype)
    bitfast.accelerate(model)
    assert operators(model, images, dtype) == expected
    is_hybrid = layer_type == "bottleneck"
    resnet = foreign_models.timm_resnet(hybrid=is_hybrid).eval()
    bitfast.accelerate(resnet)
    if not is_hybrid:  # the hybrid's padding is another, and so its operators
        assert operators(resnet, images, dtype) == expected
    else:
        assert set(expected) <= set(operators(resnet, images, dtype))


def test_the_batch_goes_through_in_slices():
    """As in bitfast's own models, with the same numbers."""
    for model in (foreign_models.timm_resnet(), their_model("BitModel")):
        model.eval()
        images = torch.randn(5, 3, 64, 50)
        bitfast.accelerate(model)
        expected = results(model, images)
        sizes: list[int] = []
        stem = model.stem if hasattr(model, "stem") else model.embedder
        convolution = stem.conv if hasattr(stem, "conv") else stem.convolution
        model.plans.slice_bytes = 2 * 16 * 16 * 13 * 4
        model.eval()  # plans anew
        assert_close(results(model, images), expected, 1e-5)
        (planned,) = plans_of(model)
        assert planned.parts[0].size == 2  # type: ignore[attr-defined]
        convolution.register_forward_hook(lambda m, x, y: sizes.append(len(y)))  # noqa: B023
        results(model, images)
        assert sizes == [5]  # who watches sees the whole batch


@pytest.mark.parametrize(
    ("name", "change"),
    # A step reads transformers' outputs; timm's is the next test.
    [(n, c) for n in CHANGED for c in CHANGES if n == "BitModel" or c is not train_a_step],
)
def test_a_change_of_the_weights_shows(name, change):
    model = ALL[name].model()
    bitfast.accelerate(model)
    images = ALL[name].images()
    results(model, images)
    change(model)
    model.eval()
    actual = results(model, images.to(dtype_of(model)))
    fresh = copy.deepcopy(model)
    bitfast.restore(fresh)
    assert_close(actual, results(fresh, images.to(dtype_of(model))), 1e-4)


def test_a_training_step_of_timm_shows():
    model = ALL["ResNetV2"].model()
    bitfast.accelerate(model)
    images = ALL["ResNetV2"].images()
    before = results(model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images).square().sum().backward()
    optimizer.step()
    actual = results(model.eval(), images)
    bitfast.restore(model)
    assert_close(actual, results(model, images), 1e-4)
    assert not torch.allclose(actual[0], before[0])


@pytest.mark.parametrize("name", ["BitForImageClassification", "BitBackbone", "ResNetV2"])
def test_accelerated_models_compile_to_one_graph(name, fresh_compiler):
    model, plain = pair(name, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, (batch, *size) in enumerate([(2, 33, 47), (3, 64, 50), (4, 40, 70)]):
        images = torch.randn(batch, 3, *size, dtype=torch.float64)
        stance = "fail_on_recompile" if number > 1 else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = compiled(images)
        assert_close(flatten(actual), results(plain, images))


# ---- what is kept ---------------------------------------------------------------------------------


@EACH
def test_parameters_keys_modes_and_classes_are_kept(name):
    model = ALL[name].model()
    next(model.children()).train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    parameters = dict(model.named_parameters())
    keys, modes = list(model.state_dict()), {m: m.training for m in model.modules()}
    cls = type(model)
    bitfast.accelerate(model)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[key] is parameters[key] for key in parameters)
    assert not frozen.requires_grad
    assert list(model.state_dict()) == keys
    assert all(module.training == modes[module] for module in model.modules())
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    model.load_state_dict(
        {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    )
    assert not any(parameter.any() for parameter in parameters.values())


@EACH
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called_as_before(name, when):
    model = ALL[name].model(torch.float64)
    images = ALL[name].images(torch.float64)
    expected: dict[str, list[Tensor]] = {}
    actual: dict[str, list[Tensor]] = {}
    seen = expected

    def hook(path: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[path] = [value.detach().clone() for value in tensors(output)]

        return note

    def watch(model: nn.Module) -> list[Any]:
        return [m.register_forward_hook(hook(path)) for path, m in model.named_modules()]

    handles = watch(model)
    results(model, images)
    if when == "after":
        for handle in handles:
            handle.remove()
    assert bitfast.accelerate(model).left == {}
    seen = actual
    if when == "after":
        handles = watch(model)
    results(model, images)
    assert actual.keys() >= expected.keys()
    assert len(expected) > 15
    for path in expected:
        assert_close(actual[path], expected[path], 100 * RELATIVE_FLOAT64, path)
    for handle in handles:
        handle.remove()
    seen = {}
    results(model, images)
    assert not seen


def tensors(value: Any) -> list[Tensor]:
    if value is None:
        return []
    if isinstance(value, (Tensor, tuple, list, dict)):
        values = value.values() if isinstance(value, dict) else value
        return [value] if isinstance(value, Tensor) else [t for v in values for t in tensors(v)]
    return []


@pytest.mark.parametrize(
    ("name", "path"), [("BitModel", "embedder.pooler"), ("ResNetV2", "stem.pool")]
)
def test_a_hook_on_the_pool_sees_padded_inputs(name, path):
    model = ALL[name].model(torch.float64)
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda m, inputs, y: seen.append(inputs[0]))
    images = ALL[name].images(torch.float64)
    results(model, images)
    bitfast.accelerate(model)
    results(model, images)
    assert_close(seen[1], seen[0])


def test_a_hook_may_change_what_a_module_returns():
    for name, path in [
        ("BitModel", "encoder"),
        ("BitModel", "encoder.stages.1"),
        ("BitModel", "norm"),
        ("ResNetV2", "stages"),
        ("ResNetV2", "stages.1.blocks"),
        ("ResNetV2", "stages.1.blocks.1.conv2"),
        ("ResNetV2", "stem.pad"),
        ("ResNetV2", "stem.pool"),
        ("BitModel", "embedder.pad"),
    ]:
        model = ALL[name].model(torch.float64)
        images = ALL[name].images(torch.float64)

        def distort(module: nn.Module, inputs: Any, output: Any) -> Any:
            """Not to be undone by a norm."""
            if isinstance(output, Tensor):
                return output * torch.linspace(1, 2, output.shape[-1], dtype=output.dtype)
            return type(output)(
                **{key: distort(module, (), value) for key, value in output.items()}
            )

        plain = results(model, images)
        model.get_submodule(path).register_forward_hook(distort)
        expected = results(model, images)
        assert not torch.equal(plain[0], expected[0])
        bitfast.accelerate(model)
        assert_close(results(model, images), expected, RELATIVE_FLOAT64, path)


def test_a_saved_model_is_one_of_transformers(tmp_path):
    ours, theirs = pair("BitForImageClassification")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    names = ["config.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert type(transformers.BitModel.from_pretrained(tmp_path / "ours")) is transformers.BitModel


# ---- back -----------------------------------------------------------------------------------------


def anatomy(model: nn.Module) -> list[Any]:
    """What makes up a model's modules, except for the numbers."""
    return [
        (name, type(module), list(module.__dict__), list(module._modules), module.training)
        for name, module in model.named_modules()
    ]


@EACH
def test_restore_undoes_accelerate_exactly(name):
    model = ALL[name].model()
    images = ALL[name].images()
    modules = dict(model.named_modules())
    expected = results(
        model, images
    )  # the first run may leave something behind in a model of transformers
    before, text = anatomy(model), repr(model)
    bitfast.accelerate(model)
    results(model, images)
    assert repr(model) != text
    bitfast.restore(model)
    assert anatomy(model) == before
    assert repr(model) == text
    assert all(module is modules[path] for path, module in model.named_modules())
    for a, e in zip(results(model, images), expected, strict=True):
        assert torch.equal(a, e)


def test_restore_keeps_what_was_done_meanwhile():
    model = ALL["ResNetV2"].model()
    bitfast.accelerate(model)
    model.train().double()
    model.reset_classifier(9)
    with torch.no_grad():
        model.stem.conv.weight.zero_()
    bitfast.restore(model)
    assert all(module.training for module in model.modules())
    assert dtype_of(model) == torch.float64
    assert not model.stem.conv.weight.any()
    assert model(torch.randn(2, 3, 64, 50, dtype=torch.float64)).shape == (2, 9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["BitForImageClassification", "ResNetV2", "ResNetV2 of a hybrid"])
def test_a_copy_is_accelerated_and_can_be_restored(name, duplicate):
    model = ALL[name].model()
    images = ALL[name].images()
    plain = results(model, images)
    bitfast.accelerate(model)
    expected = results(model, images)
    twin = duplicate(model)
    assert anatomy(twin) == anatomy(model)
    for a, e in zip(results(twin, images), expected, strict=True):
        assert torch.equal(a, e)
    bitfast.restore(twin)
    for a, e in zip(results(twin, images), plain, strict=True):
        assert torch.equal(a, e)
    assert any(isinstance(module, GroupNormActivation) for module in model.modules())


def test_accelerating_twice_is_as_good_as_once():
    model = ALL["DPT-hybrid"].model()
    before = anatomy(model)
    first = bitfast.accelerate(model)
    once = anatomy(model)
    assert bitfast.accelerate(model) == first
    assert anatomy(model) == once
    bitfast.restore(model)
    assert anatomy(model) == before


def test_a_part_can_be_restored():
    model = ALL["UperNet"].model()
    images = ALL["UperNet"].images()
    plain = results(model, images)
    bitfast.accelerate(model)
    bitfast.restore(model.backbone.bit.encoder)
    assert_close(results(model, images), plain, 1e-5)
    bitfast.restore(model)
    with pytest.raises(ValueError, match=r"nothing in this UperNet\w+ was accelerated"):
        bitfast.restore(model)
