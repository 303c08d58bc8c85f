"""Every module of a network is transformers': its name, its kind, what it does when it is called, watched,
replaced or wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import bitfast
from bitfast.backends import use_backend
from tests.model_pairs import (
    CLASSES,
    RELATIVE_FLOAT64,
    assert_close,
    flatten,
    our_model,
    pair,
    their_model,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "same": {"global_padding": "same"},
    "dynamic pool": {"embedding_dynamic_padding": True},
    "valid": {"global_padding": "valid"},
    "drop path": {"drop_path_rate": 0.3},
    "gelu": {"hidden_act": "gelu"},
    "DPT": {
        "layer_type": "bottleneck",
        "global_padding": "same",
        "embedding_dynamic_padding": True,
        "drop_path_rate": 0.2,
    },
}
FEW = ["preactivation", "DPT"]


def in_float64(name: str, settings: str) -> tuple[Any, Any]:
    ours, theirs = pair(name, **SETTINGS[settings])
    return ours.double().eval(), theirs.double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 50, dtype=torch.float64)


def kind(module: nn.Module) -> str:
    """The class of torch that a module is one of."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


# ---- names and kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_modules_have_the_names_and_kinds_of_transformers(name, settings):
    ours, theirs = our_model(name, **SETTINGS[settings]), their_model(name, **SETTINGS[settings])
    assert [path for path, _ in ours.named_modules()] == [
        path for path, _ in theirs.named_modules()
    ]
    for (path, module), twin in zip(ours.named_modules(), theirs.modules(), strict=True):
        if type(twin).__name__ == "GELUActivation":  # transformers' own, where ours is torch's
            assert type(module) is nn.GELU
        else:
            assert kind(module) == kind(twin), path


@pytest.mark.parametrize("settings", FEW)
def test_accelerated_modules_have_their_names_and_kinds(settings):
    theirs = their_model("BitForImageClassification", **SETTINGS[settings])
    expected = [(path, kind(module)) for path, module in theirs.named_modules()]
    bitfast.accelerate(theirs)
    assert [(path, kind(module)) for path, module in theirs.named_modules()] == expected


# ---- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FEW)
def test_the_encoder_returns_what_transformers_returns(settings):
    ours, theirs = in_float64("BitModel", settings)
    x = images()
    with torch.no_grad():
        x = theirs.embedder(x)
        for options in (
            {},
            {"output_hidden_states": True},
            {"return_dict": False},
            {"output_hidden_states": True, "return_dict": False},
        ):
            actual, expected = ours.encoder(x, **options), theirs.encoder(x, **options)
            assert type(actual).__name__ == type(expected).__name__
            assert_close(actual, expected)
        assert torch.equal(ours.encoder(x).last_hidden_state, ours.encoder(x)[0])


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_module_called_alone_does_what_transformers_does(settings):
    if settings == "valid":
        pytest.skip("transformers' blocks cannot add what their 3x3 convolutions have made smaller")
    ours, theirs = in_float64("BitForImageClassification", settings)
    seen: dict[str, tuple[Any, Any]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.setdefault(path, (inputs, output))

        return hook

    for path, module in theirs.named_modules():
        module.register_forward_hook(note(path))
    with torch.no_grad():
        theirs(images())
        for path, (inputs, expected) in seen.items():
            assert_close(ours.get_submodule(path)(*inputs), expected, what=path)
    assert len(seen) > 50


# ---- hooks ----------------------------------------------------------------------------------------


def watched(model: nn.Module, x: Tensor, kind_of_hook: str, path: str | None) -> list[Any]:
    """Return the names of the modules that hooks are called for, with what they see."""
    seen: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *values: Any) -> None:
            seen.append((name, [t.detach().clone() for t in flatten(present(values))]))

        return hook

    handles = []
    for name, module in model.named_modules():
        if path is None or name == path:
            register = getattr(module, f"register_{kind_of_hook}_hook")
            handles.append(register(note(name)))
    output = model(x)
    if "backward" in kind_of_hook:
        flatten(output)[0].square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


def present(values: Any) -> list[Any]:
    """Leave out what is None, in any depth."""
    if isinstance(values, dict):
        values = tuple(values.values())
    return [
        present(value) if isinstance(value, (tuple, list, dict)) else value
        for value in values
        if value is not None
    ]


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad"])
@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind_of_hook", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_all_modules_see_what_they_see_in_transformers(kind_of_hook, name, settings, mode):
    if mode == "no_grad" and "backward" in kind_of_hook:
        pytest.skip("there is no backward pass without gradients")
    ours, theirs = in_float64(name, settings)
    x = (
        images().requires_grad_()
    )  # else torch warns that the first module's hooks get no input gradient
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        with torch.set_grad_enabled(mode != "no_grad"):
            results.append(watched(model.train(mode == "train"), x, kind_of_hook, None))
    actual, expected = results
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, ours_seen), (_, theirs_seen) in zip(actual, expected, strict=True):
        assert_close(ours_seen, theirs_seen, 100 * RELATIVE_FLOAT64, path)


PATHS = [
    "bit",
    "bit.embedder",
    "bit.embedder.pad",
    "bit.embedder.pooler",
    "bit.embedder.pooler.pad",
    "bit.embedder.convolution.pad",
    "bit.encoder",
    "bit.encoder.stages.1",
    "bit.encoder.stages.1.layers.1",
    "bit.encoder.stages.1.layers.0.downsample",
    "bit.encoder.stages.1.layers.0.conv2.pad",
    "bit.encoder.stages.1.layers.0.norm2.activation",
    "bit.encoder.stages.1.layers.0.activation",
    "bit.encoder.stages.1.layers.0.drop_path",
    "bit.norm",
    "bit.norm.activation",
    "bit.pooler",
    "classifier",
]


def distort(value: Any) -> Any:
    """Change an output in a way that no norm undoes."""
    if isinstance(value, Tensor):
        return value * torch.linspace(1, 2, value.shape[-1], dtype=value.dtype)
    if isinstance(value, dict):
        return type(value)(**{key: distort(v) for key, v in value.items()})
    return tuple(map(distort, value))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return distort(self.inner(*arguments, **options))


def hook_it(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: distort(output))


def replace_its_forward(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *a, **o: distort(forward(*a, **o))  # type: ignore[method-assign]


def wrap_it(model: nn.Module, path: str) -> None:
    model.set_submodule(path, Wrapper(model.get_submodule(path)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alter", [hook_it, replace_its_forward, wrap_it])
@pytest.mark.parametrize("name", ["BitForImageClassification", "BitBackbone"])
def test_what_is_watched_or_replaced_is_called(name, alter, path, train):
    tested = 0
    for settings in FEW:
        ours, theirs = in_float64(name, settings)
        if path not in dict(theirs.named_modules()):
            continue
        x = images()
        accelerated = copy.deepcopy(theirs)
        bitfast.accelerate(accelerated)
        for model in (ours, theirs, accelerated):
            alter(model.train(train), path)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.manual_seed(0)
                expected = theirs(x)
                for model in (ours, accelerated):
                    torch.manual_seed(0)
                    assert_close(model(x), expected, what=f"{settings} {gradients}")
        tested += 1
    assert tested or (name, path) == ("BitBackbone", "classifier")


def test_hooks_on_whatever_a_backbone_need_not_compute_are_called():
    ours, theirs = pair("BitBackbone", out_features=["stage1"])
    for path in ("bit", "bit.encoder", "bit.norm", "bit.pooler", "bit.encoder.stages.3.layers.0"):
        for model in (ours, theirs):
            seen = watched(model, torch.randn(1, 3, 32, 32), "forward", path)
            assert [name for name, _ in seen] == [path]


def test_hooks_on_all_modules_of_the_process_are_called():
    ours, theirs = in_float64("BitForImageClassification", "preactivation")
    x, counts = images(), []
    for model in (ours, theirs):
        calls: list[str] = []
        names = {module: path for path, module in model.named_modules()}
        hook = register_module_forward_hook(lambda m, *_, c=calls, n=names: c.append(n[m]))
        with hook, torch.no_grad():
            model(x)
        counts.append(calls)
    assert counts[0] == counts[1]


def test_guided_backpropagation_finds_the_activations():
    """Springenberg et al. 2014: only what is positive flows back through each ReLU, by hooks on ``nn.ReLU``."""
    results = []
    models = [*in_float64("BitForImageClassification", "preactivation")]
    models.append(copy.deepcopy(models[1]))
    bitfast.accelerate(models[2])
    x = images()
    for model in models:
        plain = saliency(model, x)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_full_backward_hook(lambda m, inputs, _: (inputs[0].clamp_min(0),))
        results.append(saliency(model, x))
        assert not torch.allclose(results[-1], plain)
    assert_close(results[0], results[1])
    assert_close(results[2], results[1])


def saliency(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).logits[:, 1].sum(), x)
    return gradient


# ---- what is returned is part of the graph ----------------------------------------------------------


def feature_gradients(model: Any, x: Tensor, retain: bool) -> list[Tensor]:
    """Return the gradients of a scalar of the last output for every feature map that is returned."""
    output = model(x, output_hidden_states=True)
    features = [*output.hidden_states]
    if "feature_maps" in output:
        features = [*output.feature_maps[:-1]]
        target = output.feature_maps[-1]
    elif "last_hidden_state" in output:
        features.append(output.last_hidden_state)
        target = output.pooler_output
    else:
        target = output.logits
    target = (target * torch.arange(target.numel()).view(target.shape)).sum()
    if not retain:
        return [*torch.autograd.grad(target, features)]
    for feature in features:
        feature.retain_grad()
    target.backward()
    return [feature.grad for feature in features]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("retain", [False, True], ids=["grad", "retain_grad"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("name", CLASSES)
def test_gradients_of_what_is_returned(name, settings, train, retain, channels_last):
    options = {"out_features": ["stem", "stage2", "stage4"]} if name == "BitBackbone" else {}
    ours, theirs = pair(name, **SETTINGS[settings], **options)
    ours, theirs = ours.double().train(train), theirs.double().train(train)
    accelerated = copy.deepcopy(theirs)
    bitfast.accelerate(accelerated)
    x = images()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    expected = feature_gradients(theirs, x, retain)
    for model in (ours, accelerated):
        torch.manual_seed(0)
        assert_close(feature_gradients(model, x, retain), expected, 100 * RELATIVE_FLOAT64)


def test_gradients_of_what_is_returned_in_float32():
    """There the norms are kernels, which add a block's residual together with the next block's norm."""
    ours, theirs = pair("BitForImageClassification")
    x = torch.randn(2, 3, 64, 50)
    expected = feature_gradients(copy.deepcopy(theirs).double(), x.double(), False)
    for a, p, e in zip(
        feature_gradients(ours, x, False),
        feature_gradients(theirs, x, False),
        expected,
        strict=True,
    ):
        error, allowed = ((r.double() - e).norm() / e.norm() for r in (a, p))
        assert error <= 1e-5 + 4 * allowed


# ---- sharding -------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_the_encoder_can_be_sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    ours, theirs = in_float64("BitForImageClassification", "preactivation")
    x = images()
    expected = theirs(x).logits
    fully_shard(ours.bit.encoder, mesh=mesh)
    with torch.no_grad():
        assert_close(ours(x).logits, expected)
    logits = ours.train()(x).logits
    assert_close(logits, expected)
    logits.sum().backward()
    assert ours.bit.encoder.stages[0].layers[0].conv1.weight.grad is not None


@pytest.mark.parametrize("demands", [{}, {"packed_convolution": "reference"}], ids=str)
def test_changes_of_a_sharded_model_are_seen(mesh, demands):
    """Its weights lie in memory that is freed and filled in each pass, at the same address now and then."""
    from torch.distributed.fsdp import fully_shard

    ours, theirs = pair("BitForImageClassification")
    ours, theirs, x = ours.eval(), theirs.eval(), torch.randn(2, 3, 64, 64)
    for stage in ours.bit.encoder.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    with torch.no_grad():
        for number in range(20):
            with use_backend(**demands) if demands else nullcontext():
                actual = ours(x).logits
            torch.testing.assert_close(actual, theirs(x).logits, rtol=1e-3, atol=1e-4)
            for model in (ours, theirs):
                for name, parameter in model.named_parameters():
                    if name.endswith("conv2.weight"):
                        parameter[:, number % 4].mul_(-1.1).add_(0.01)
