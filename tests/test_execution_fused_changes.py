"""Fused plans where modules, parameters, devices or other threads are not as usual."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfast import backends
from bitfast.backends import disable_kernel, enable_kernel, use_backend
from bitfast.execution import cuda, cuda_choice, cuda_norm_convolution
from bitfast.execution.cuda_choice import TABLE
from bitfast.execution.setting import Setting
from bitfast.kernels import launch
from bitfast.ops.norm_convolution import OP
from bitfast.ops.norm_convolution_cuda import Convolution
from tests.fused_models import (
    compare,
    everything_fused,
    images,
    last_plan,
    model_of,
    names_of,
    outputs,
)
from tests.interpreter import DEVICE
from tests.norm_convolution_kernels import Kernels, serve
from tests.test_execution_cuda import plans
from tests.threads import in_threads
from tests.weight_changes import edit_in_place, features, swap_the_data

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has the same for a card")


@pytest.fixture
def kernels(monkeypatch) -> Iterator[Kernels]:
    """The kernels; every convolution that they suit is to be fused."""
    with everything_fused(monkeypatch) as kernels:
        yield kernels


# ---- modules and parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_next_to_a_watched_one_are_fused(kernels, kind, layer) -> None:
    model, x = model_of(kind), images()
    expected = outputs(model, x)
    seen: list[Tensor] = []
    watched = model.encoder.stages[0].layers[layer]
    watched.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    kernels.calls.clear()
    actual = outputs(model, x)
    assert len(seen) == 1
    assert "norm_convolution" in kernels.calls
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    choices = last_plan(model).choices()
    assert {step.convolution for step, *_ in choices}.isdisjoint(watched.modules())
    assert len(choices) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - sum(
        isinstance(m, nn.Conv2d) for m in watched.modules()
    )


def test_what_a_hooked_module_returns_may_begin_anywhere(kernels) -> None:
    model, x = model_of("preactivation"), images()

    def elsewhere(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        memory = output.new_empty(output.numel() + 1)[1:]
        images, channels, height, width = output.shape
        moved = memory.view(images, height, width, channels).permute(0, 3, 1, 2)
        return moved.copy_(output)

    block = model.encoder.stages[0].layers[0]
    handle = block.register_forward_hook(lambda module, inputs, output: None)
    expected = outputs(model, x)
    handle.remove()
    block.register_forward_hook(elsewhere)
    for a, b in zip(outputs(model, x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [edit_in_place, swap_the_data])
def test_a_change_of_weights_is_seen(kernels, change) -> None:
    model, x = model_of("preactivation"), images(count=1)
    before = features(model, x)
    with torch.enable_grad(), use_backend("reference"):
        change(model)
    after = features(model, x)
    assert torch.equal(after, features(copy.deepcopy(model), x))
    assert not torch.equal(after, before)


def test_a_norm_s_parameters_may_move_and_change(kernels) -> None:
    model, x = model_of("preactivation"), images()
    before = features(model, x)
    norm = model.encoder.stages[0].layers[0].norm2
    norm.weight.mul_(-2)
    after = features(model, x)
    assert not torch.equal(after, before)
    norm.weight.data = norm.weight.detach() / -2
    assert torch.equal(features(model, x), before)


def test_norms_of_another_dtype(kernels) -> None:
    model, x = model_of("preactivation"), images()
    expected = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    assert torch.equal(features(model, x), expected)


def test_norms_whose_parameters_are_not_aligned(kernels) -> None:
    model, x = model_of("preactivation"), images()
    expected = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            for name in ("weight", "bias"):
                parameter = getattr(module, name)
                memory = torch.empty(module.num_channels + 1, dtype=parameter.dtype)
                parameter.data = memory[1:].copy_(parameter)
    assert torch.equal(features(model, x), expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_are_standardized_within_somebody_s_graph(kernels, monkeypatch, backend) -> None:
    model, x = model_of("same"), images()
    packed: list[Tensor] = []
    original = cuda.pack_filters
    with use_backend(weight_standardization=backend):
        expected = features(model, x)
        monkeypatch.setattr(cuda, "is_recorded_by_others", lambda: True)
        monkeypatch.setattr(cuda, "pack_filters", lambda w: packed.append(w) or original(w))
        model.plans.clear()
        assert torch.equal(features(model, x), expected)
    assert len(packed) == len(last_plan(model).choices()) - 1  # the stem's are not packed


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refuses", "fused", "seen"),
    [
        (lambda convolution: True, 0, "convolution, add_group_norm_act"),
        (lambda convolution: convolution.kernel_size == 3, 8, "group_norm_act"),
        (lambda convolution: convolution.cell_channels, 3, "norm_convolution_add_"),
        (lambda convolution: convolution.adds, 8, "norm_convolution, twice"),
        # Nothing is lost but that a launch is shared.
        (lambda convolution: convolution.second_channels, 11, "norm_convolution"),
    ],
)
def test_what_a_device_refuses_is_not_fused(kernels, monkeypatch, refuses, fused, seen) -> None:
    prepare = cuda_norm_convolution.prepare_convolution

    def prepare_or_refuse(convolution: Convolution, device: torch.device) -> Any:
        if refuses(convolution):
            raise RuntimeError("it is too wide")
        return prepare(convolution, device)

    monkeypatch.setattr(cuda_norm_convolution, "prepare_convolution", prepare_or_refuse)
    model, x = model_of("preactivation"), images()
    compare(model, x, outputs(model, x))
    plan = plans(model)[0]
    assert seen in names_of(plan)
    reasons = [why for _, what, why in plan.choices() if what != OP]
    assert sorted(reasons) == ["it reads the images"] + [
        "the kernels refuse it: it is too wide"
    ] * (11 - fused)


def test_weights_of_another_dtype_are_not_fused(kernels) -> None:
    """They cannot be convolved with the feature maps, and plain PyTorch says so."""
    model = model_of("preactivation")
    model.encoder.stages[1].float()
    with pytest.raises(RuntimeError, match="should be the same"):
        model(images())


# ---- threads ------------------------------------------------------------------------------------------------


def locked(lock: Any, function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        with lock:
            function(*arguments)

    return call


@pytest.fixture
def one_launch_at_a_time(monkeypatch) -> None:
    """Of Triton's interpreter, which cannot do two."""
    lock = RLock()
    for kind, name in ((launch.Launch, "launch"), (launch._PublicLaunch, "__call__")):
        monkeypatch.setattr(kind, name, locked(lock, getattr(kind, name)))


def test_threads_share_a_plan(kernels, one_launch_at_a_time) -> None:
    model, inputs = model_of("preactivation"), [images() for _ in range(4)]
    expected = [features(model, x) for x in inputs]

    def work(number: int) -> None:
        with torch.no_grad(), use_backend(norm_convolution="native"):
            for _ in range(3):
                assert torch.equal(features(model, inputs[number]), expected[number])

    in_threads(work, 4)
    assert len(plans(model)) == 1


@pytest.mark.parametrize("watched", [False, True])
def test_a_plan_is_what_its_setting_says(monkeypatch, watched) -> None:
    """Another thread may enable a kernel while the plan is made."""
    serve(monkeypatch, is_enabled=False)
    monkeypatch.setattr(backends, "_enabled", frozenset())
    monkeypatch.setattr(cuda_choice, "TABLE", (TABLE[0], TABLE[-1]))
    model, x, may_fuse = model_of("preactivation"), images(), cuda.may_fuse
    if watched:  # what follows is lowered when the plan is executed
        model.embedder.register_forward_hook(lambda *_: None)

    def meanwhile(change: Callable[..., None]) -> Callable[[Setting], bool]:
        def changed(setting: Setting) -> bool:
            change(OP, "native", "cpu")
            return may_fuse(setting)

        return changed

    with torch.no_grad():
        found = []
        for change in (enable_kernel, disable_kernel):
            monkeypatch.setattr(cuda, "may_fuse", meanwhile(change))
            model(x)
            found.append({what for _, what, _ in last_plan(model).choices()})
    assert found == [set(), {"convolution", OP} if not watched else {OP}]
