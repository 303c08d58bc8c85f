"""Plans whose convolutions normalize what they read and measure what they write; the kernels run on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from bench import host
from bitfast import BitConfig, BitModel
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.execution import cuda_choice
from bitfast.execution.cuda_choice import TABLE, Row
from bitfast.kernels import launch
from bitfast.ops import native_cuda
from bitfast.ops.norm_convolution import OP
from tests.fused_models import (
    SETTINGS,
    compare,
    everything_fused,
    images,
    last_plan,
    model_of,
    names_of,
    outputs,
)
from tests.interpreter import DEVICE
from tests.norm_convolution_kernels import LAUNCHES, Kernels, serve
from tests.test_execution_cuda import plans
from tests.tolerances import Triples, assert_draws_within_contract, relative_error

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has the same for a card")


@pytest.fixture
def kernels(monkeypatch) -> Iterator[Kernels]:
    """The kernels; every convolution that they suit is to be fused."""
    with everything_fused(monkeypatch) as kernels:
        yield kernels


# ---- numbers -----------------------------------------------------------------------------------------------


def draw(kind: str, dtype: torch.dtype) -> Triples:
    """Outputs of the fused plan, of plain PyTorch in the same dtype and in float64."""
    model, x = model_of(kind, dtype), images(kind).to(dtype)
    actual = outputs(model, x)
    with use_backend("reference"):
        plain, oracle = outputs(model, x), outputs(copy.deepcopy(model).double(), x.double())
    return {
        f"output {n}": triple for n, triple in enumerate(zip(actual, plain, oracle, strict=True))
    }


@pytest.mark.parametrize("kind", SETTINGS)
def test_outputs_are_within_the_contract(kernels, kind) -> None:
    dtype = torch.float16 if kind == "bottleneck" else torch.bfloat16
    assert_draws_within_contract(lambda: draw(kind, dtype), 1)
    assert bool(kernels.calls) == (kind != "gelu")


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_the_error_is_no_larger_than_without_fusing(kernels, kind) -> None:
    errors = []
    for _ in range(4):
        model, x = model_of(kind), images()
        fused = outputs(model, x)
        with use_backend(norm_convolution="reference"):
            unfused = outputs(model, x)
        assert "norm_convolution" in names_of(plans(model)[0])
        assert "norm_convolution" not in names_of(plans(model)[1])
        with use_backend("reference"):
            oracle = outputs(copy.deepcopy(model).double(), x.double())
        errors.append([relative_error(each[-1], oracle[-1]) for each in (fused, unfused)])
    of_fused, of_unfused = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert of_fused <= 1.1 * of_unfused + torch.finfo(torch.bfloat16).eps / 2


def test_r50x1_as_a_whole(kernels) -> None:
    """All of its 53 convolutions but the stem's."""
    model, x = BitModel(BitConfig()).eval(), torch.randn(1, 3, 64, 64)
    oracle = outputs(model.double(), x.double())
    model, x = model.bfloat16(), x.bfloat16()
    fused = outputs(model, x)
    with use_backend("reference"):
        plain = outputs(model, x)
    fused_calls = [
        name for name in names_of(plans(model)[-1]) if name.startswith("norm_convolution")
    ]
    assert len(fused_calls) == 51, "one launch does two"
    for actual, other, exact in zip(fused, plain, oracle, strict=True):
        assert relative_error(actual, exact) <= 1.1 * relative_error(other, exact)


@pytest.mark.parametrize("kind", ["preactivation", "same"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (5, 3, 7, 9), (1, 3, 65, 33), (2, 3, 40, 2)])
def test_images_of_any_size(kernels, kind, shape) -> None:
    model, x = model_of(kind), torch.randn(shape).bfloat16()
    compare(model, x, outputs(model, x))
    assert "norm_convolution_add_" in names_of(plans(model)[0])


def test_images_of_any_layout(kernels) -> None:
    model, x = model_of("preactivation"), torch.randn(3, 3, 20, 24).bfloat16()
    elsewhere = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    for each in (x.permute(0, 1, 3, 2), elsewhere, x[:1].expand(3, -1, -1, -1), x[1:, :, 1::2, 3:]):
        compare(model, each, outputs(model, each))


def test_the_bits_do_not_depend_on_what_ran_before(kernels) -> None:
    model, x = model_of("preactivation"), images()
    first = outputs(model, x)
    outputs(model, images(count=3))
    outputs(model_of("bottleneck"), images())
    for a, b in zip(first, outputs(model, x), strict=True):
        assert torch.equal(a, b)


def test_the_order_of_threads_makes_no_difference(kernels) -> None:
    model, x = model_of("preactivation"), images()
    first = outputs(model, x)
    assert "norm_convolution, twice" in names_of(last_plan(model))
    for seed in range(1, 4):
        kernels.emulate(seed)
        assert all(map(torch.equal, first, outputs(model, x)))


def test_hidden_states_are_those_of_the_plan_without_them(kernels) -> None:
    """What is returned is not overwritten; the final result is the same."""
    model, x = model_of("preactivation"), images()
    *states, last = outputs(model, x)
    assert torch.equal(model(x).last_hidden_state, last)
    copies = [state.clone() for state in states]
    outputs(model, images())
    assert all(map(torch.equal, states, copies))
    backbone = model_of("same", name="BitBackbone")
    maps = backbone(x).feature_maps
    with use_backend(norm_convolution="reference"):
        unfused = backbone(x).feature_maps
    for a, b in zip(maps, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_autocast(kernels) -> None:
    model, x = model_of("preactivation", torch.float32), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        *_, result = outputs(model, x)
    assert result.dtype == torch.bfloat16
    assert "norm_convolution" in names_of(last_plan(model))
    with torch.autocast("cpu", torch.bfloat16), use_backend(norm_convolution="reference"):
        *_, unfused = outputs(model, x)
    with use_backend("reference"):
        *_, oracle = outputs(copy.deepcopy(model).double(), x.double())
    assert relative_error(result, oracle) <= 1.5 * relative_error(unfused, oracle) + 2**-9


# ---- programs -----------------------------------------------------------------------------------------------


def test_what_a_program_consists_of(kernels) -> None:
    model = model_of("preactivation")
    model(images())
    assert names_of(last_plan(model)) == [
        "begin", "convolution", "same_max_pool",
        "partials", "factors",  # of what no fused convolution has written
        "norm_convolution, twice", "factors",  # the shortcut and the first: same filters, same steps
        "norm_convolution", "factors", "norm_convolution_add_", "factors",
        "norm_convolution", "factors", "norm_convolution", "factors", "norm_convolution_add_", "factors",
        "norm_convolution", "norm_convolution", "factors",  # the shortcut at stride 2 has the same factors
        "norm_convolution", "factors", "norm_convolution_add_",
        "group_norm_act",
    ]  # fmt: skip


def test_a_bottleneck_s_program(kernels) -> None:
    """Norms after the last convolutions are launches of their own, and so not measured."""
    model = model_of("bottleneck")
    model(images())
    assert names_of(last_plan(model)) == [
        "begin", "convolution", "zeros", "group_norm_act", "same_max_pool",
        "norm_convolution, twice", "factors", "group_norm_act",
        "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
        "norm_convolution", "factors", "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
        "norm_convolution", "group_norm_act", "norm_convolution", "factors",
        "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
    ]  # fmt: skip


def test_a_shortcut_that_is_kept_is_not_overwritten(kernels) -> None:
    """The stem's output is a hidden state, and the shortcut of a first block without downsample."""
    model, x = model_of("preactivation"), images()
    model.encoder.stages[0].layers[0].downsample = None
    actual = outputs(model, x)
    assert "norm_convolution_add" in names_of(last_plan(model))
    with use_backend(norm_convolution="reference"):
        unfused = outputs(model, x)
    assert torch.equal(actual[0], unfused[0])
    for a, b in zip(actual, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_where_a_sibling_cannot_be_fused(kernels) -> None:
    """One launch normalizes for both; the fused one reads the result as it is, and nothing is measured."""
    model, x = model_of("preactivation"), images()
    downsample = model.encoder.stages[1].layers[0].downsample.conv
    downsample.weight = nn.Parameter(torch.randn(64, 32, 1, 3).bfloat16())
    downsample.kernel_size, downsample.padding = (1, 3), (0, 1)
    actual = outputs(model, x)
    names = names_of(last_plan(model))
    after = names[[n for n, name in enumerate(names) if name == "norm_convolution_add_"][1] + 1 :]
    assert after == [
        "group_norm_act", "convolution", "norm_convolution", "factors",
        "norm_convolution", "factors", "norm_convolution_add_", "group_norm_act",
    ]  # fmt: skip
    with use_backend(norm_convolution="reference"):
        unfused = outputs(model, x)
    for a, b in zip(actual, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_not_enabled_nothing_changes(monkeypatch) -> None:
    kernels = serve(monkeypatch, is_enabled=False)
    model, x = model_of("preactivation"), images()
    with torch.no_grad():
        model(x)
    assert not kernels.calls
    names = names_of(last_plan(model))
    block = ["convolution", "group_norm_act", "convolution", "group_norm_act"]
    last = "convolution, add_group_norm_act"
    assert names == [
        "begin", "convolution", "same_max_pool", "group_norm_act", "convolution", *block, last,
        *block, last, "convolution", *block, last,
    ]  # fmt: skip
    assert last_plan(model).choices() == []


def test_float32_is_refused(kernels) -> None:
    with pytest.raises(BackendUnavailableError, match=r"not torch\.float32"):
        model_of("preactivation", torch.float32)(images().float())


def test_a_batch_of_none(kernels) -> None:
    model = model_of("preactivation")
    assert outputs(model, images()[:0])[-1].shape[0] == 0
    assert not kernels.calls
    assert {reason for _, _, reason in last_plan(model).choices()} == {
        "it reads the images",
        "there is nothing to convolve",
    }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gelu", "not gelu"),
        ("groups of 3", "a group have an even number"),
        ("odd channels", "multiples of 8, and"),
        ("valid", "not of the shape of its shortcut"),
        ("dilated", "its filters are dilated"),
    ],
)
def test_reasons(kernels, kind, reason) -> None:
    model = model_of(kind)
    model(images(kind))
    choices = last_plan(model).choices()
    assert len(choices) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    why_not = [why for _, what, why in choices if what == "convolution"]
    assert any(reason in why for why in why_not), why_not
    assert {what for _, what, _ in choices} == (
        {"convolution", OP} - ({OP} if kind == "gelu" else set())
    )


# ---- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("fused_stage", [0, 1])
def test_blocks_that_are_fused_next_to_others(monkeypatch, kind, fused_stage) -> None:
    """Where a norm stands between the two, a launch normalizes."""
    kernels = serve(monkeypatch)
    row = TABLE[-1]._replace(holds=lambda facts: (facts.intensity < 14) == (fused_stage == 0))
    monkeypatch.setattr(
        cuda_choice, "TABLE", (TABLE[0], row, Row(lambda _: True, False, "it is not"))
    )
    with torch.no_grad():
        model, x = model_of(kind), images()
        actual = outputs(model, x)
        by_module = {step.convolution: what for step, what, _ in last_plan(model).choices()}
        for number, stage in enumerate(model.encoder.stages):
            whats = {by_module[m] for m in stage.modules() if isinstance(m, nn.Conv2d)}
            assert whats == {OP if number == fused_stage else "convolution"}
        names = names_of(last_plan(model))
        with use_backend(norm_convolution="reference"):
            unfused = outputs(model, x)
        with use_backend("reference"):
            oracle = outputs(copy.deepcopy(model).double(), x.double())
    for a, b, c in zip(actual, unfused, oracle, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 2**-8
    assert kernels.calls.count("norm_convolution_partials") == names.count("partials")
    assert names.count("partials") == (kind == "preactivation" and fused_stage == 0)


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck same", "dilated"])
@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_is_right(kernels, monkeypatch, kind, seed) -> None:
    """Each convolution is fused or not, by chance."""
    chance = Random(seed)
    row = TABLE[-1]._replace(holds=lambda _: chance.random() < 0.5)
    monkeypatch.setattr(
        cuda_choice, "TABLE", (TABLE[0], row, Row(lambda _: True, False, "by chance"))
    )
    model, x = model_of(kind), images()
    compare(model, x, outputs(model, x))
    assert {what for _, what, _ in plans(model)[0].choices()} == {OP, "convolution"}


def test_the_table_decides_where_nothing_is_demanded(monkeypatch) -> None:
    serve(monkeypatch)
    model = model_of("preactivation")
    with torch.no_grad():
        model(images())
        assert not any(name.startswith("norm_convolution") for name in names_of(last_plan(model)))
        model(images(count=66))
    assert "norm_convolution" in names_of(last_plan(model))
    (few, many) = ({why for _, _, why in plan.choices()} for plan in plans(model))
    assert any("too few tiles" in why for why in few)
    assert any("bound by memory" in why for why in many)


# ---- the host ---------------------------------------------------------------------------------------------


class Idle(Kernels):
    """Launches nothing, without a call of a Python function."""

    def __getitem__(self, name: str) -> Any:
        is_launch = name.removeprefix("bitfast_") in LAUNCHES
        takes_anything = partial(Exception().__init__)  # written in C, and returns None
        return takes_anything if is_launch else super().__getitem__(name)


def test_a_fused_pass_costs_the_host_no_more(kernels, monkeypatch) -> None:
    """It enters torch's dispatcher for new maps alone."""
    monkeypatch.setattr(native_cuda, "library", Idle)
    monkeypatch.setattr(launch.Launch, "launch", lambda *_: None)
    monkeypatch.setattr(launch._PublicLaunch, "__call__", lambda *_: None)
    model, x = model_of("preactivation"), images()
    fused = host.calls_of(model, x)
    with use_backend(norm_convolution="reference"):
        unfused = host.calls_of(model, x)
    print({name: (fused[name], unfused[name]) for name in ("python_calls", "operators")})
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert fused["operators"] <= unfused["operators"] - 4 * convolutions
    assert fused["operators_from_python"] <= unfused["operators_from_python"]
    assert fused["python_calls"] <= unfused["python_calls"] - convolutions
